"""The registry: the records of plugins, and lookups in them.

Entry points alone decide what is imported, never the content of a file. ``discovery.py`` loads plugins; ``current.py``
holds this process's registry.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from embedsurgery.errors import AdapterError, CheckpointError, ConfigError, UnknownSurgeryError, warn
from embedsurgery.plugin_calls import call_plugin
from embedsurgery.plugins.entry_points import GROUP

if TYPE_CHECKING:
    from pathlib import Path

    from embedsurgery.adapters.adapter import Adapter
    from embedsurgery.adapters.manifest import Manifest
    from embedsurgery.graph.architectures import Layout
    from embedsurgery.initializers import InitializerRecord
    from embedsurgery.plugins.hookspecs import (
        CardSection,
        CardSectionRecord,
        ClassifierRecord,
        CommandRecord,
        EmbeddingModule,
        LayoutRecord,
        StoreRecord,
        UnknownModule,
    )
    from embedsurgery.stores.store import Store
    from embedsurgery.surgeries.surgery import SurgeryRecord

DISABLE = "EMBEDSURGERY_DISABLE_PLUGINS"
"""Environment variable: "1" loads no plugins; names separated by commas block those plugins."""


@dataclass(frozen=True)
class PluginInfo:
    """A plugin and its state.

    Attributes:
        name: Its entry point's name.
        distribution: The package that it is in, empty for one that was registered as a module.
        version: That package's version.
        hooks: The hooks that it implements.
        error: Why it is not in use, None if it is.
    """

    name: str
    distribution: str = ""
    version: str = ""
    hooks: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Registry:
    """The records of all plugins.

    Attributes:
        surgeries: Name -> record.
        plugins: Every plugin, working or not.
        initializers: Name -> record.
        classifiers: Name -> record; they are called in this order, and the first answer counts.
        layouts: ``model_type`` or class name -> record.
        stores: Name -> record.
        commands: Name -> record.
        card_sections: Name -> record, in their order on a card.
    """

    surgeries: Mapping[str, SurgeryRecord] = field(default_factory=dict)
    plugins: tuple[PluginInfo, ...] = ()
    initializers: Mapping[str, InitializerRecord] = field(default_factory=dict)
    classifiers: Mapping[str, ClassifierRecord] = field(default_factory=dict)
    layouts: Mapping[str, LayoutRecord] = field(default_factory=dict)
    stores: Mapping[str, StoreRecord] = field(default_factory=dict)
    commands: Mapping[str, CommandRecord] = field(default_factory=dict)
    card_sections: Mapping[str, CardSectionRecord] = field(default_factory=dict)

    def for_config(self, config: object) -> SurgeryRecord:
        """Find the surgery of a config.

        Raises:
            ConfigError: It is not a config of any registered surgery.
        """
        for record in self.surgeries.values():
            if type(config) is record.config_class:
                return record
        kind, known = type(config), [r.config_class for r in self.surgeries.values()]
        namesake = next((one for one in known if one.__name__ == kind.__name__), None)
        hint = None
        if namesake is not None:  # PEFT has configs of the same names
            theirs, ours = (one.__module__.partition(".")[0] for one in (kind, namesake))
            hint = f"this one is {theirs}'s; use {ours}'s"
        elif isinstance(config, (str, os.PathLike)):
            hint = "embedsurgery.load(directory) reads an adapter"
        raise ConfigError(
            "neither a surgery's config nor an Adapter",
            found=f"{kind.__module__}.{kind.__qualname__}",
            expected=", ".join(one.__name__ for one in known),
            hint=hint,
        )

    def find_surgery(self, name: str) -> SurgeryRecord:
        """Find a surgery by its name.

        Raises:
            UnknownSurgeryError: No installed plugin brings it.
        """
        if name in self.surgeries:
            return self.surgeries[name]
        raise UnknownSurgeryError(
            "no installed plugin brings this surgery",
            where=name[:100],
            found=", ".join(self.surgeries),
            hint=f"install the {GROUP} plugin that brings it",
        )

    def for_peft_type(self, peft_type: object) -> SurgeryRecord:
        """Find the surgery that reads PEFT's files of a ``peft_type``.

        Raises:
            UnknownSurgeryError: No installed plugin reads them.
        """
        for record in self.surgeries.values():
            if record.peft_type == peft_type:
                return record
        for record in self.surgeries.values():
            if isinstance(peft_type, str) and peft_type in record.also_reads:
                return record
        raise UnknownSurgeryError(
            "no installed plugin reads adapters of this peft_type",
            where=str(peft_type)[:100],
            found=", ".join(r.peft_type for r in self.surgeries.values()),
        )

    def initializer(self, name: str) -> InitializerRecord:
        """Find an initialiser by its name.

        Raises:
            ConfigError: No installed plugin brings it.
        """
        from embedsurgery.initializers import find_initializer

        return find_initializer(name, self.initializers)

    @property
    def architectures(self) -> dict[str, Layout]:
        """Architecture -> its layout: what `walk_names` of ``graph/from_names.py`` takes."""
        return {name: record.layout for name, record in self.layouts.items()}

    def classify(self, unknown: UnknownModule) -> EmbeddingModule | None:
        """Call the classifiers until one knows a module; one that fails is skipped with a warning."""
        from embedsurgery.graph.classify import EmbeddingModule

        for record in self.classifiers.values():
            answer: EmbeddingModule | None = _call_or_warn(
                record, partial(_call_classifier, record), unknown, EmbeddingModule
            )
            if answer is not None:
                return answer
        return None

    def sections(self, manifest: Manifest) -> list[CardSection]:
        """Collect the sections of an adapter's card; a plugin that fails is skipped with a warning."""
        from embedsurgery.plugins.hookspecs import CardSection

        answers = (_call_or_warn(r, r.section, manifest, CardSection) for r in self.card_sections.values())
        return [answer for answer in answers if answer is not None]

    def format_of(self, directory: Path) -> StoreRecord:
        """Find the checkpoint format of a directory; if none recognises it, the fallback, which says what is wrong.

        Raises:
            CheckpointError: Several formats recognise it.
        """
        records = [r for r in self.stores.values() if not r.fallback]
        fits = [r for r in records if _call_or_warn(r, r.recognises, directory, bool)]
        if len(fits) > 1:
            raise CheckpointError(
                "several formats recognise this checkpoint",
                where=directory,
                found=", ".join(r.name for r in fits),
                hint=f"block the plugin of one with {DISABLE}",
            )
        fallbacks = [r for r in self.stores.values() if r.fallback]
        return [*fits, *fallbacks][0]

    def open_store(self, directory: Path, work: Path | None = None) -> Store:
        """Open a checkpoint directory of any format. All code opens checkpoints here.

        Args:
            directory: The checkpoint.
            work: Of a change in place that is under way: the directory of the files that it is writing.

        Raises:
            CheckpointError: Several formats recognise it, or its files are missing or broken.
            UnfinishedError: A change in place was interrupted or is under way, and ``work`` is None.
            PluginError: The format's ``open`` fails in another way, or does not return a store.
        """
        from embedsurgery.files.locking import refuse_linked_state, refuse_unfinished
        from embedsurgery.stores.store import Store

        record = self.format_of(directory)
        if work is None and os.path.isdir(directory):
            refuse_linked_state(directory)
            refuse_unfinished(directory)
        where = f"{record.name}.open"
        store = call_plugin(where, Store, record.open, directory, self.architectures)  # type: ignore[type-abstract]
        if not hasattr(store, "directory"):
            store.directory = directory
        return store if work is None else store.with_work_directory(work)

    def read_adapter(self, directory: str | os.PathLike[str]) -> Adapter:
        """Read an adapter's directory, in embedsurgery's form or PEFT's.

        Raises:
            AdapterError: The files are missing, broken, or contradict each other.
            UnknownSurgeryError: No installed plugin reads it.
        """
        from embedsurgery.adapters.adapter import read_adapter_files
        from embedsurgery.surgeries.checked import call_from_files

        files, manifest = read_adapter_files(directory)
        if manifest is None:
            return call_from_files(self.for_peft_type(files.config.get("peft_type")).surgery, files, None)
        surgery = self.find_surgery(manifest.surgery).surgery
        if manifest.surgery_version > surgery.version:
            raise AdapterError(
                "the adapter is of a newer version of its surgery",
                where=directory,
                expected=surgery.version,
                found=manifest.surgery_version,
                hint="upgrade the package that brings the surgery",
            )
        return call_from_files(surgery, files, manifest)


def _call_or_warn(record: Any, function: Any, argument: object, kind: type[Any]) -> Any:
    """Call a plugin's function; if it fails, warn and return None, so that the other plugins go on working."""
    try:
        answer = function(argument)
        if answer is not None and not isinstance(answer, kind):
            raise TypeError(f"returned {type(answer).__name__}, expected {kind.__name__} or None")
    except Exception as error:
        warn(f"plugin {record.name} failed and is skipped: {type(error).__name__}: {error}")
        return None
    return answer


def _call_classifier(record: ClassifierRecord, unknown: UnknownModule) -> EmbeddingModule | None:
    """Call a classifier, and check that its answer fits the module's parameters."""
    from embedsurgery.graph.classify import EmbeddingModule

    answer = record.classify(unknown)
    if isinstance(answer, EmbeddingModule):
        shape = dict(unknown.shapes).get(answer.parameter, ())
        if len(shape) != 2 or answer.role not in ("input", "output") or answer.kind not in ("vocabulary", "unknown"):
            raise ValueError(f"{answer} for {unknown.path or 'the root'} with parameters {dict(unknown.shapes)}")
    return answer

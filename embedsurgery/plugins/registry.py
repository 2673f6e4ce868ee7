"""The registry: what plugins bring, as data, and what is looked up in it.

Data never decides what is imported: entry points alone do. Plugins are loaded by ``discovery.py``; which registry holds
in this process is ``current.py``'s.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from embedsurgery.errors import AdapterError, CheckpointError, ConfigError, EmbedSurgeryWarning, UnknownSurgeryError
from embedsurgery.plugin_calls import call
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
"""Environment variable: "1" loads no plugin but the built-in one; names separated by commas block those."""


@dataclass(frozen=True)
class PluginInfo:
    """What is known of one plugin.

    Attributes:
        name: Its entry point's name.
        distribution: The package that brings it, empty where it was registered by hand.
        version: That package's version.
        hooks: The hooks it implements.
        error: Why it is not in use, None where it is.
    """

    name: str
    distribution: str = ""
    version: str = ""
    hooks: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Registry:
    """What the plugins bring.

    Attributes:
        surgeries: Name -> record.
        plugins: Every plugin, working or not.
        initializers: Name -> record.
        classifiers: Name -> record; asked in this order, so that a first answer holds.
        layouts: ``model_type`` or class name -> record.
        stores: Name -> record.
        commands: Verb -> record.
        card_sections: Name -> record, in the order of the card.
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
        """The surgery that a config asks for.

        Raises:
            ConfigError: It is no config of any registered surgery.
        """
        for record in self.surgeries.values():
            if type(config) is record.config_class:
                return record
        kind, ours = type(config), [r.config_class for r in self.surgeries.values()]
        alike = next((one for one in ours if one.__name__ == kind.__name__), None)
        hint = None
        if alike is not None:
            hint = f"this one is {kind.__module__.partition('.')[0]}'s; take {alike.__module__.partition('.')[0]}'s own"
        elif isinstance(config, (str, os.PathLike)):
            hint = "embedsurgery.load(directory) reads an adapter"
        raise ConfigError(
            "not a config of any surgery, nor an Adapter",
            found=f"{kind.__module__}.{kind.__qualname__}",
            expected=", ".join(one.__name__ for one in ours),
            hint=hint,
        )

    def named(self, name: str) -> SurgeryRecord:
        """The surgery of this name.

        Raises:
            UnknownSurgeryError: No plugin brings it.
        """
        if name in self.surgeries:
            return self.surgeries[name]
        raise UnknownSurgeryError(
            "no plugin brings this surgery",
            where=name[:100],
            found=", ".join(self.surgeries),
            hint=f"install the {GROUP} plugin that brings it",
        )

    def for_peft_type(self, peft_type: object) -> SurgeryRecord:
        """The surgery whose files PEFT calls so.

        Raises:
            UnknownSurgeryError: No plugin reads them.
        """
        for record in self.surgeries.values():
            if record.peft_type == peft_type:
                return record
        for record in self.surgeries.values():
            if isinstance(peft_type, str) and peft_type in record.also_reads:
                return record
        raise UnknownSurgeryError(
            "no plugin reads adapters of this peft_type",
            where=str(peft_type)[:100],
            found=", ".join(r.peft_type for r in self.surgeries.values()),
        )

    def initializer(self, name: str) -> InitializerRecord:
        """The initialiser of this name.

        Raises:
            ConfigError: No plugin brings it.
        """
        from embedsurgery.initializers import find_initializer

        return find_initializer(name, self.initializers)

    @property
    def architectures(self) -> dict[str, Layout]:
        """What is special about the names of which architecture: what `names.walk_names` takes."""
        return {name: record.layout for name, record in self.layouts.items()}

    def classify(self, unknown: UnknownModule) -> EmbeddingModule | None:
        """What the first classifier says that knows a module; one that fails is passed over, and that is said."""
        from embedsurgery.graph.classify import EmbeddingModule

        for record in self.classifiers.values():
            answer: EmbeddingModule | None = _answer(record, partial(_classified, record), unknown, EmbeddingModule)
            if answer is not None:
                return answer
        return None

    def sections(self, manifest: Manifest) -> list[CardSection]:
        """The parts of an adapter's card that plugins add; one that fails is left out, and that is said."""
        from embedsurgery.plugins.hookspecs import CardSection

        answers = (_answer(r, r.section, manifest, CardSection) for r in self.card_sections.values())
        return [answer for answer in answers if answer is not None]

    def format_of(self, directory: Path) -> StoreRecord:
        """The checkpoint format of a directory; where none recognises it, the built-in one, which says what is wrong.

        Raises:
            CheckpointError: Several formats recognise it.
        """
        records = [r for r in self.stores.values() if not r.fallback]
        fits = [r for r in records if _answer(r, r.recognises, directory, bool)]
        if len(fits) > 1:
            raise CheckpointError(
                "several formats recognise this checkpoint",
                where=directory,
                found=", ".join(r.name for r in fits),
                hint=f"block the plugin of one with {DISABLE}",
            )
        return [*fits, *(r for r in self.stores.values() if r.fallback)][0]

    def open_store(self, directory: Path, work: Path | None = None) -> Store:
        """Open a checkpoint directory of any format. Every checkpoint on disk is opened here and nowhere else.

        Args:
            directory: The checkpoint.
            work: A directory for files that are being made, given by the one that is changing the checkpoint in place.

        Raises:
            CheckpointError: Several formats recognise it, or its files are missing or broken.
            UnfinishedError: A change in place was interrupted or is under way, and no ``work`` is given.
            PluginError: The format's ``open`` fails in some other way, or returns no store.
        """
        from embedsurgery.files.locking import refuse_linked_state, refuse_unfinished
        from embedsurgery.stores.store import Store

        record = self.format_of(directory)
        if work is None and os.path.isdir(directory):
            refuse_linked_state(directory)
            refuse_unfinished(directory)
        where = f"{record.name}.open"
        store = call(where, Store, record.open, directory, self.architectures)  # type: ignore[type-abstract]
        if not hasattr(store, "directory"):
            store.directory = directory
        return store if work is None else store.within(work)

    def read_adapter(self, directory: str | os.PathLike[str]) -> Adapter:
        """Read an adapter's directory, in embedsurgery's form or PEFT's.

        Raises:
            AdapterError: The files are missing, broken, or contradict each other.
            UnknownSurgeryError: No installed plugin reads it.
        """
        from embedsurgery.adapters.adapter import read_adapter_files
        from embedsurgery.surgeries.checked import read

        files, manifest = read_adapter_files(directory)
        if manifest is None:
            return read(self.for_peft_type(files.config.get("peft_type")).surgery, files, None)
        surgery = self.named(manifest.surgery).surgery
        if manifest.surgery_version > surgery.version:
            raise AdapterError(
                "an adapter of a newer version of its surgery",
                where=directory,
                expected=surgery.version,
                found=manifest.surgery_version,
                hint="upgrade what brings the surgery",
            )
        return read(surgery, files, manifest)


def _answer(record: Any, function: Any, given: object, kind: type[Any]) -> Any:
    """What a plugin's function says, None where it fails: no plugin takes down what others can do."""
    try:
        answer = function(given)
        if answer is not None and not isinstance(answer, kind):
            raise TypeError(f"returned {type(answer).__name__}, expected {kind.__name__} or None")
    except Exception as error:
        warnings.warn(
            f"{record.name}: this plugin's answer is passed over: {type(error).__name__}: {error}",
            EmbedSurgeryWarning,
            stacklevel=4,
        )
        return None
    return answer


def _classified(record: ClassifierRecord, unknown: UnknownModule) -> EmbeddingModule | None:
    """What a classifier says of a module, where it can be."""
    from embedsurgery.graph.classify import EmbeddingModule

    answer = record.classify(unknown)
    if isinstance(answer, EmbeddingModule):
        shape = dict(unknown.shapes).get(answer.parameter, ())
        if len(shape) != 2 or answer.role not in ("input", "output") or answer.kind not in ("vocabulary", "unknown"):
            raise ValueError(f"{answer} of {unknown.path or 'the root'}, whose parameters are {dict(unknown.shapes)}")
    return answer

"""Which plugins there are and what they bring. Data never decides what is imported: entry points alone do.

A plugin that cannot be imported, has a hook of the wrong shape or takes a name that exists is kept as a
`PluginInfo` with its error, and everything else works on. What is the wrong shape is ``contract.py``'s to say.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

from embedsurgery import builtin
from embedsurgery._version import __version__
from embedsurgery.calling import call
from embedsurgery.contract import KINDS, HookKind, check_answer, check_plugin, refuse_clashes
from embedsurgery.errors import CheckpointError, ConfigError, EmbedSurgeryWarning, PluginError, UnknownSurgeryError
from embedsurgery.hookspecs import (
    PROJECT,
    CardSection,
    CardSectionRecord,
    ClassifierRecord,
    CommandRecord,
    EmbeddingModule,
    Hooks,
    LayoutRecord,
    StoreRecord,
    UnknownModule,
)
from embedsurgery.initializers import InitializerRecord, find_initializer
from embedsurgery.surgeries.base import SurgeryRecord

if TYPE_CHECKING:
    from embedsurgery.adapter import Manifest
    from embedsurgery.architectures import Layout
    from embedsurgery.stores.base import Store

DISABLE = "EMBEDSURGERY_DISABLE_PLUGINS"
"""Environment variable: "1" loads no plugin but the built-in one; names separated by commas block those."""

_Owned = dict[str, list[tuple[str, Any]]]
"""Hook's name -> (the plugin that brought it, its record) for each record."""


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
        raise ConfigError("not a config of any surgery, nor an Adapter", found=type(config).__name__,
                          expected=", ".join(r.config_class.__name__ for r in self.surgeries.values()))  # fmt: skip

    def named(self, name: str) -> SurgeryRecord:
        """The surgery of this name.

        Raises:
            UnknownSurgeryError: No plugin brings it.
        """
        if name in self.surgeries:
            return self.surgeries[name]
        raise UnknownSurgeryError("no plugin brings this surgery", where=name[:100], found=", ".join(self.surgeries),
                                  hint=f"install the {PROJECT} plugin that brings it")  # fmt: skip

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
        raise UnknownSurgeryError("no plugin reads adapters of this peft_type", where=str(peft_type)[:100],
                                  found=", ".join(r.peft_type for r in self.surgeries.values()))  # fmt: skip

    def initializer(self, name: str) -> InitializerRecord:
        """The initialiser of this name.

        Raises:
            ConfigError: No plugin brings it.
        """
        return find_initializer(name, self.initializers)

    @property
    def architectures(self) -> dict[str, Layout]:
        """What is special about the names of which architecture: what `names.walk_names` takes."""
        return {name: record.layout for name, record in self.layouts.items()}

    def classify(self, unknown: UnknownModule) -> EmbeddingModule | None:
        """What the first classifier says that knows a module; one that fails is passed over, and that is said."""
        for record in self.classifiers.values():
            answer: EmbeddingModule | None = _answer(record, partial(_classified, record), unknown, EmbeddingModule)
            if answer is not None:
                return answer
        return None

    def sections(self, manifest: Manifest) -> list[CardSection]:
        """The parts of an adapter's card that plugins add; one that fails is left out, and that is said."""
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
            raise CheckpointError("several formats recognise this checkpoint", where=directory,
                                  found=", ".join(r.name for r in fits),
                                  hint=f"block the plugin of one with {DISABLE}")  # fmt: skip
        return [*fits, *(r for r in self.stores.values() if r.fallback)][0]

    def open_store(self, directory: Path) -> Store:
        """A store over a checkpoint directory, of whatever format recognises it.

        Raises:
            CheckpointError: Several formats do, or its files are missing or broken.
        """
        return self.opened(self.format_of(directory), directory)

    def opened(self, form: StoreRecord, directory: Path) -> Store:
        """A store over a checkpoint directory, of a format that recognises it.

        Raises:
            CheckpointError: Its files are missing or broken.
            PluginError: What opens the format fails in some other way, or gives no store.
        """
        from embedsurgery.stores.base import Store

        return call(f"{form.name}.open", Store, form.open, directory)  # type: ignore[type-abstract]


def _answer(record: Any, function: Any, given: object, kind: type[Any]) -> Any:
    """What a plugin's function says, None where it fails: no plugin takes down what others can do."""
    try:
        answer = function(given)
        if answer is not None and not isinstance(answer, kind):
            raise TypeError(f"returned {type(answer).__name__}, expected {kind.__name__} or None")
    except Exception as error:
        warnings.warn(f"{record.name}: this plugin's answer is passed over: {type(error).__name__}: {error}",
                      EmbedSurgeryWarning, stacklevel=4)  # fmt: skip
        return None
    return answer


def _classified(record: ClassifierRecord, unknown: UnknownModule) -> EmbeddingModule | None:
    """What a classifier says of a module, where it can be."""
    answer = record.classify(unknown)
    if isinstance(answer, EmbeddingModule):
        shape = dict(unknown.shapes).get(answer.parameter, ())
        if len(shape) != 2 or answer.role not in ("input", "output") or answer.kind not in ("vocabulary", "unknown"):
            raise ValueError(f"{answer} of {unknown.path or 'the root'}, whose parameters are {dict(unknown.shapes)}")
    return answer


_current: list[Registry] = []
"""The registry of this process, last of those that `installed` has put in its place."""


def registry() -> Registry:
    """The registry of this process, made on first use."""
    if not _current:
        _current.append(build(metadata.entry_points(group=PROJECT)))
    return _current[-1]


@contextmanager
def installed(*plugins: Any) -> Iterator[Registry]:
    """Inside, these modules are plugins as if their packages were installed, beside those that are: for their tests.

    Args:
        plugins: Modules with hooks. One that is a plugin of the process already is no matter.

    Raises:
        PluginError: One of them cannot be registered.
    """
    points = list(metadata.entry_points(group=PROJECT))
    known = {point.value for point in points}
    more = [plugin for plugin in plugins if plugin.__name__ not in known]
    made = build(points, more)
    broken = [info for info in made.plugins if info.error and info.name in {plugin.__name__ for plugin in more}]
    if broken:
        raise PluginError("a plugin cannot be registered", where=broken[0].name, found=broken[0].error)
    _current.append(made)
    try:
        yield made
    finally:
        _current.remove(made)


def build(entry_points: Iterable[metadata.EntryPoint], modules: Sequence[Any] = ()) -> Registry:
    """A registry of what is built in and the plugins behind some entry points, one loaded after another.

    Args:
        entry_points: Where plugins are.
        modules: Plugins that are imported already.
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(Hooks)
    owned: _Owned = {kind.name: [] for kind in KINDS}
    infos = [_register(manager, owned, PluginInfo("builtin", PROJECT, __version__), builtin)]
    blocked = {name.strip() for name in os.environ.get(DISABLE, "").split(",")} - {""}
    for point in sorted(entry_points, key=lambda p: p.name):
        dist = point.dist
        info = PluginInfo(point.name, dist.name if dist else "", dist.version if dist else "")
        if blocked & {"1", "all", point.name}:
            infos.append(_failed(info, f"disabled by {DISABLE}"))
            continue
        try:
            plugin = point.load()
        except (Exception, SystemExit) as error:  # whatever a third party's import raises
            infos.append(_failed(info, f"cannot be imported: {type(error).__name__}: {error}"))
            continue
        infos.append(_register(manager, owned, info, plugin))
    infos += [_register(manager, owned, PluginInfo(module.__name__), module) for module in modules]
    brought = {kind.name: {r.name: r for _, r in owned[kind.name]} for kind in KINDS}
    return Registry(plugins=tuple(infos), **{name.removeprefix(f"{PROJECT}_"): r for name, r in brought.items()})


def _register(manager: pluggy.PluginManager, owned: _Owned, info: PluginInfo, plugin: Any) -> PluginInfo:
    """Register a plugin and take what it brings; on any fault it is out again, whole."""
    try:
        check_plugin(plugin)
        if manager.register(plugin, info.name) is None:
            raise PluginError("blocked", where=info.name)
        manager.check_pending()
        hooks = tuple(sorted(caller.name for caller in manager.get_hookcallers(plugin) or ()))
        if not hooks:
            raise PluginError("no hook of embedsurgery is in this plugin", where=info.name,
                              expected=f"functions marked {PROJECT}.hookimpl",
                              hint="does the entry point name the right module?")  # fmt: skip
        new = {kind.name: _records(manager, plugin, kind) for kind in KINDS}
        for kind in KINDS:
            refuse_clashes(owned[kind.name], new[kind.name], info.name, kind)
        for name, records in new.items():
            owned[name].extend((info.name, record) for record in records)
    except (Exception, SystemExit) as error:  # a wrong signature, a hook that raises, a record that is none
        if manager.is_registered(plugin) and manager.get_name(plugin) == info.name:
            manager.unregister(plugin)
        text = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
        return _failed(info, text)
    return replace(info, hooks=hooks)


def _records(manager: pluggy.PluginManager, plugin: Any, kind: HookKind) -> Sequence[Any]:
    """What one plugin answers to a hook."""
    others = [p for p in manager.get_plugins() if p is not plugin]
    answers = manager.subset_hook_caller(kind.name, remove_plugins=others)()
    return [record for answer in answers for record in check_answer(answer, kind)]


def _failed(info: PluginInfo, error: str) -> PluginInfo:
    return replace(info, error=" ".join(error.split()))

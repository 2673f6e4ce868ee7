"""Which plugins there are and what they bring. Data never decides what is imported: entry points alone do.

A plugin that cannot be imported, has a hook of the wrong shape or takes a name that exists is kept as a
`PluginInfo` with its error, and everything else works on.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from typing import Any

import pluggy

from embedsurgery import builtin
from embedsurgery._version import __version__
from embedsurgery.errors import ConfigError, PluginError, UnknownSurgeryError
from embedsurgery.hookspecs import PROJECT, Hooks
from embedsurgery.surgeries.base import Surgery, SurgeryRecord

DISABLE = "EMBEDSURGERY_DISABLE_PLUGINS"
"""Environment variable: "1" loads no plugin but the built-in one; names separated by commas block those."""


_Owned = dict[str, tuple[str, SurgeryRecord]]
"""Surgery's name -> (the plugin that brought it, its record)."""


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
    """

    surgeries: dict[str, SurgeryRecord] = field(default_factory=dict)
    plugins: tuple[PluginInfo, ...] = ()

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
        raise UnknownSurgeryError("no plugin reads adapters of this peft_type", where=str(peft_type)[:100],
                                  found=", ".join(r.peft_type for r in self.surgeries.values()))  # fmt: skip


@cache
def registry() -> Registry:
    """The registry of this process, made on first use."""
    return build(metadata.entry_points(group=PROJECT))


def build(entry_points: Iterable[metadata.EntryPoint]) -> Registry:
    """A registry of the built-in surgeries and the plugins behind some entry points, one loaded after another."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(Hooks)
    surgeries: _Owned = {}
    infos = [_register(manager, surgeries, PluginInfo("builtin", PROJECT, __version__), builtin)]
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
        infos.append(_register(manager, surgeries, info, plugin))
    return Registry({name: record for name, (_, record) in surgeries.items()}, tuple(infos))


def _register(manager: pluggy.PluginManager, surgeries: _Owned, info: PluginInfo, plugin: Any) -> PluginInfo:
    """Register a plugin and take what it brings; on any fault it is out again, whole."""
    try:
        if manager.register(plugin, info.name) is None:
            raise PluginError("blocked", where=info.name)
        manager.check_pending()
        hooks = tuple(sorted(caller.name for caller in manager.get_hookcallers(plugin) or ()))
        new = _surgeries(manager, plugin)
        _refuse_clashes(surgeries, new, info.name)
        surgeries.update({record.name: (info.name, record) for record in new})
    except (Exception, SystemExit) as error:  # a wrong signature, a hook that raises, a record that is none
        if manager.is_registered(plugin):
            manager.unregister(plugin)
        return _failed(info, str(error))
    return PluginInfo(info.name, info.distribution, info.version, hooks)


def _surgeries(manager: pluggy.PluginManager, plugin: Any) -> Sequence[SurgeryRecord]:
    others = [p for p in manager.get_plugins() if p is not plugin]
    answers = manager.subset_hook_caller("embedsurgery_surgeries", remove_plugins=others)()
    records: list[SurgeryRecord] = []
    for answer in answers:
        if not isinstance(answer, Sequence) or not all(_is_record(record) for record in answer):
            raise PluginError("a hook returned the wrong thing", where="embedsurgery_surgeries",
                              expected="a list of SurgeryRecord", found=_kinds(answer))  # fmt: skip
        records.extend(answer)
    return records


def _is_record(value: object) -> bool:
    return (
        isinstance(value, SurgeryRecord)
        and all(isinstance(part, str) and part for part in (value.name, value.peft_type))
        and isinstance(value.config_class, type)
        and isinstance(value.surgery, Surgery)
    )


def _kinds(answer: object) -> str:
    if isinstance(answer, (list, tuple)):
        return ", ".join(repr(item)[:80] if isinstance(item, SurgeryRecord) else type(item).__name__ for item in answer)
    return type(answer).__name__


def _refuse_clashes(known: _Owned, new: Sequence[SurgeryRecord], plugin: str) -> None:
    """Of two surgeries with one name, config class or peft_type, which is meant would depend on their order."""
    everything = [*known.values(), *((plugin, record) for record in new)]
    for what in ("name", "config_class", "peft_type"):
        owners: dict[object, str] = {}
        for owner, record in everything:
            key = getattr(record, what)
            if key in owners:
                raise PluginError(f"two surgeries have the {what} {getattr(key, '__name__', key)!r}",
                                  where=" and ".join(dict.fromkeys((owners[key], owner))),
                                  hint="uninstall one, or rename it")  # fmt: skip
            owners[key] = owner


def _failed(info: PluginInfo, error: str) -> PluginInfo:
    return PluginInfo(info.name, info.distribution, info.version, error=" ".join(error.split()))

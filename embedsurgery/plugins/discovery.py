"""Loads plugins one after another through pluggy, the built-in records first.

A plugin that cannot be imported, that fails a check of ``checks.py``, or that takes a name that exists becomes a
`PluginInfo` with its error. Everything else goes on working.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

import pluggy

from embedsurgery._version import __version__
from embedsurgery.errors import PluginError
from embedsurgery.plugins import builtin
from embedsurgery.plugins.checks import KINDS, HookKind, check_plugin, check_records, refuse_clashes
from embedsurgery.plugins.hookspecs import PROJECT, Hooks
from embedsurgery.plugins.registry import DISABLE, PluginInfo, Registry

_Owned = dict[str, list[tuple[str, Any]]]
"""Name of a hook -> (plugin, record) of each record."""


def discover(entry_points: Iterable[metadata.EntryPoint], modules: Sequence[Any] = ()) -> Registry:
    """Build a registry of the built-in records and those of plugins.

    Args:
        entry_points: Entry points of plugins, which are imported.
        modules: Plugins that are imported already.
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(Hooks)
    owned: _Owned = {kind.name: [] for kind in KINDS}
    infos = [_register(manager, owned, PluginInfo("builtin", PROJECT, __version__), builtin)]
    blocked = {name.strip() for name in os.environ.get(DISABLE, "").split(",")} - {""}
    for point in sorted(entry_points, key=lambda p: p.name):  # of two that clash, always the same one is refused
        dist = point.dist
        info = PluginInfo(point.name, dist.name if dist else "", dist.version if dist else "")
        if blocked & {"1", "all", point.name}:
            infos.append(_with_error(info, f"disabled by {DISABLE}"))
            continue
        try:
            plugin = point.load()
        except (Exception, SystemExit) as error:  # whatever a third party's import raises
            infos.append(_with_error(info, f"cannot be imported: {type(error).__name__}: {error}"))
            continue
        infos.append(_register(manager, owned, info, plugin))
    infos += [_register(manager, owned, PluginInfo(module.__name__), module) for module in modules]
    records = {kind.name: {r.name: r for _, r in owned[kind.name]} for kind in KINDS}
    return Registry(plugins=tuple(infos), **{name.removeprefix(f"{PROJECT}_"): r for name, r in records.items()})


def _register(manager: pluggy.PluginManager, owned: _Owned, info: PluginInfo, plugin: Any) -> PluginInfo:
    """Register a plugin and add its records; one with any fault is unregistered and adds none."""
    try:
        check_plugin(plugin)
        if manager.register(plugin, info.name) is None:
            raise PluginError("pluggy blocks this plugin", where=info.name)
        manager.check_pending()  # refuses hooks that are not in the contract, such as misspelled ones
        hooks = tuple(sorted(caller.name for caller in manager.get_hookcallers(plugin) or ()))
        if not hooks:
            raise PluginError(
                "the plugin has no hooks",
                where=info.name,
                expected=f"functions marked {PROJECT}.hookimpl",
                hint="check the module that the entry point names",
            )
        new = {kind.name: _call_hook(manager, plugin, kind) for kind in KINDS}
        for kind in KINDS:
            refuse_clashes(owned[kind.name], new[kind.name], info.name, kind)
        for name, records in new.items():
            owned[name].extend((info.name, record) for record in records)
    except (Exception, SystemExit) as error:  # a wrong signature, a hook that raises, an invalid record
        # A module with a second entry point fails here, and must stay registered under the first.
        if manager.is_registered(plugin) and manager.get_name(plugin) == info.name:
            manager.unregister(plugin)
        text = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
        return _with_error(info, text)
    return replace(info, hooks=hooks)


def _call_hook(manager: pluggy.PluginManager, plugin: Any, kind: HookKind) -> Sequence[Any]:
    """Call one plugin's implementation of a hook; returns its records."""
    others = [p for p in manager.get_plugins() if p is not plugin]
    answers = manager.subset_hook_caller(kind.name, remove_plugins=others)()
    return [record for returned in answers for record in check_records(returned, kind)]


def _with_error(info: PluginInfo, error: str) -> PluginInfo:
    return replace(info, error=" ".join(error.split()))

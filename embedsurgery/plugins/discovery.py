"""Plugins behind entry points, loaded one after another through pluggy, what is built in first.

A plugin that cannot be imported, has a hook of the wrong shape or takes a name that exists is kept as a
`PluginInfo` with its error, and everything else works on. What is the wrong shape is ``contract.py``'s to say.
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
from embedsurgery.plugins.checks import KINDS, HookKind, check_answer, check_plugin, refuse_clashes
from embedsurgery.plugins.hookspecs import PROJECT, Hooks
from embedsurgery.plugins.registry import DISABLE, PluginInfo, Registry

_Owned = dict[str, list[tuple[str, Any]]]
"""Hook's name -> (the plugin that brought it, its record) for each record."""


def discover(entry_points: Iterable[metadata.EntryPoint], modules: Sequence[Any] = ()) -> Registry:
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
            raise PluginError(
                "no hook of embedsurgery is in this plugin",
                where=info.name,
                expected=f"functions marked {PROJECT}.hookimpl",
                hint="does the entry point name the right module?",
            )
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

"""The registry of this process, and registries for tests.

Without an installed plugin, built-in records are imported kind by kind when they are asked for: a merge that starts in
a quarter of a second has no time for what it does not use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from embedsurgery._version import __version__
from embedsurgery.errors import PluginError
from embedsurgery.plugins.entry_points import GROUP, plugins_at_hand

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

from embedsurgery.plugins.registry import PluginInfo, Registry


class _BuiltIn(Mapping[str, Any]):
    """Name -> record of what is built in of one kind, imported when the first is asked for."""

    def __init__(self, hook: Callable[[], Sequence[Any]]) -> None:
        self._hook = hook

    @cached_property
    def _records(self) -> dict[str, Any]:
        return {record.name: record for record in self._hook()}

    def __getitem__(self, name: str) -> Any:
        return self._records[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)


def built_in() -> Registry:
    """What is built in alone, the same as `build` makes of no entry point, and not looked at before it is used."""
    from embedsurgery.plugins import builtin

    hooks = {name: hook for name, hook in vars(builtin).items() if name.startswith(f"{GROUP}_")}
    kinds = {name.removeprefix(f"{GROUP}_"): _BuiltIn(hook) for name, hook in hooks.items()}
    return Registry(plugins=(PluginInfo("builtin", GROUP, __version__, tuple(sorted(hooks))),), **kinds)


_current: list[Registry] = []
"""The registry of this process, last of those that `installed` has put in its place."""


def registry() -> Registry:
    """The registry of this process, made on first use."""
    if not _current:
        _current.append(build(_entry_points()) if plugins_at_hand() else built_in())
    return _current[-1]


def build(entry_points: Iterable[EntryPoint], modules: Sequence[Any] = ()) -> Registry:
    """A registry of what is built in and the plugins behind some entry points, all of it checked.

    Args:
        entry_points: Where plugins are.
        modules: Plugins that are imported already.
    """
    from embedsurgery.plugins.discovery import discover

    return discover(entry_points, modules)


def _entry_points() -> list[EntryPoint]:
    from importlib import metadata

    return list(metadata.entry_points(group=GROUP))


@contextmanager
def installed(*plugins: Any) -> Iterator[Registry]:
    """Inside, these modules are plugins as if their packages were installed, beside those that are: for their tests.

    Args:
        plugins: Modules with hooks. One that is a plugin of the process already is no matter.

    Raises:
        PluginError: One of them cannot be registered.
    """
    points = _entry_points()
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

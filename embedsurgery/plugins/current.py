"""The registry of this process, and registries for tests.

If no plugin is installed, built-in records are imported kind by kind when they are used. So a command imports neither
pluggy nor the surgeries, stores and commands that it does not need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from embedsurgery._version import __version__
from embedsurgery.errors import PluginError
from embedsurgery.plugins.entry_points import GROUP, may_have_plugins
from embedsurgery.plugins.registry import PluginInfo, Registry

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


class _LazyRecords(Mapping[str, Any]):
    """Name -> built-in record of one kind, imported when the first is used."""

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


def builtin_registry() -> Registry:
    """Build a registry of the built-in records alone: what `build_registry` returns without entry points, but lazy."""
    from embedsurgery.plugins import builtin

    hooks = {name: hook for name, hook in vars(builtin).items() if name.startswith(f"{GROUP}_")}
    kinds = {name.removeprefix(f"{GROUP}_"): _LazyRecords(hook) for name, hook in hooks.items()}
    return Registry(plugins=(PluginInfo("builtin", GROUP, __version__, tuple(sorted(hooks))),), **kinds)


_current: list[Registry] = []
"""The registry of this process, and after it those of open `installed` blocks; the last one is current."""


def registry() -> Registry:
    """Return the registry of this process, built on first use."""
    if not _current:
        _current.append(build_registry(_entry_points()) if may_have_plugins() else builtin_registry())
    return _current[-1]


def build_registry(entry_points: Iterable[EntryPoint], modules: Sequence[Any] = ()) -> Registry:
    """Build a registry of the built-in records and those of plugins, all checked.

    Args:
        entry_points: Entry points of plugins, which are imported.
        modules: Plugins that are imported already.
    """
    from embedsurgery.plugins.discovery import discover

    return discover(entry_points, modules)


def _entry_points() -> list[EntryPoint]:
    from importlib import metadata

    return list(metadata.entry_points(group=GROUP))


@contextmanager
def installed(*plugins: Any) -> Iterator[Registry]:
    """Register modules as plugins inside the block, beside the installed ones. For tests of plugins.

    Args:
        plugins: Modules with hooks. One that is installed already is not registered twice.

    Yields:
        The registry that is current inside the block.

    Raises:
        PluginError: A module cannot be registered.
    """
    points = _entry_points()
    known = {point.value for point in points}
    more = [plugin for plugin in plugins if plugin.__name__ not in known]
    current = build_registry(points, more)
    broken = [info for info in current.plugins if info.error and info.name in {plugin.__name__ for plugin in more}]
    if broken:
        raise PluginError("cannot register a plugin", where=broken[0].name, found=broken[0].error)
    _current.append(current)
    try:
        yield current
    finally:
        _current.remove(current)

"""The hooks that a plugin can implement, and what goes into them and comes out: the whole contract, in one file.

A plugin is a module with functions marked `hookimpl`, found by an entry point in the group ``embedsurgery``. Each hook
takes nothing and returns records: frozen dataclasses that say what the plugin brings under which name, and hold the
functions that do it. With ``discovery.py`` the only file that imports pluggy.

A plugin may say which contract it was written for, by a module attribute ``embedsurgery_contract = 1``; one of a newer
contract is refused with a word on it. `CONTRACT` grows when a hook or a record changes so that an older plugin fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pluggy

from embedsurgery.graph.classify import Classify
from embedsurgery.graph.classify import EmbeddingModule as EmbeddingModule
from embedsurgery.graph.classify import UnknownModule as UnknownModule
from embedsurgery.plugins.entry_points import GROUP

if TYPE_CHECKING:
    import click

    from embedsurgery.adapters.manifest import Manifest
    from embedsurgery.graph.architectures import Layout
    from embedsurgery.initializers import InitializerRecord
    from embedsurgery.stores.store import Store
    from embedsurgery.surgeries.surgery import SurgeryRecord

PROJECT = GROUP
CONTRACT = 1
"""Version of this file."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True)
class ClassifierRecord:
    """A way to recognise embedding modules.

    Attributes:
        name: Its name, once among all plugins.
        classify: Called as ``classify(unknown: UnknownModule)``; returns an `EmbeddingModule`, or None for a stranger.
    """

    name: str
    classify: Classify


@dataclass(frozen=True)
class LayoutRecord:
    """What the files of an architecture do not say by themselves: its tied names on disk.

    Attributes:
        name: ``model_type`` or class name, as in a config; once among all plugins.
        layout: The names.
    """

    name: str
    layout: Layout


@dataclass(frozen=True)
class StoreRecord:
    """A checkpoint format.

    Attributes:
        name: Its name, once among all plugins.
        recognises: Called as ``recognises(directory: Path)``; says by names and headers whether it is of this format.
        open: Called as ``open(directory: Path, architectures: Mapping[str, Layout])``; returns a `Store` that writes
            into the directory's files. The second is what `walk_names` takes: what is known of which architecture.
        fallback: Asked only where no other format recognises a directory.
    """

    name: str
    recognises: Callable[[Path], bool]
    open: Callable[[Path, Mapping[str, Layout]], Store]
    fallback: bool = False


@dataclass(frozen=True)
class CommandRecord:
    """A verb of the command line.

    Attributes:
        name: The verb, once among all plugins and built-in verbs.
        summary: Its line in the list of verbs.
        load: Called as ``load()`` when the verb is used; returns its `click.Command`.
    """

    name: str
    summary: str
    load: Callable[[], click.Command]


@dataclass(frozen=True)
class CardSection:
    """A part of a model card.

    Attributes:
        title: Its heading, without marks.
        body: Markdown.
    """

    title: str
    body: str


@dataclass(frozen=True)
class CardSectionRecord:
    """A part of the card that is pushed with an adapter.

    Attributes:
        name: Its name, once among all plugins.
        section: Called as ``section(manifest: Manifest)``; returns a `CardSection`, or None for nothing.
    """

    name: str
    section: Callable[[Manifest], CardSection | None]


class Hooks:
    """Every hook returns values and changes nothing."""

    @hookspec
    def embedsurgery_surgeries(self) -> Sequence[SurgeryRecord]:  # type: ignore[empty-body]
        """Return the records of the surgeries that this plugin brings."""

    @hookspec
    def embedsurgery_initializers(self) -> Sequence[InitializerRecord]:  # type: ignore[empty-body]
        """Return the records of the initialisers of new rows that this plugin brings."""

    @hookspec
    def embedsurgery_classifiers(self) -> Sequence[ClassifierRecord]:  # type: ignore[empty-body]
        """Return the records of what recognises embedding modules of unknown classes."""

    @hookspec
    def embedsurgery_layouts(self) -> Sequence[LayoutRecord]:  # type: ignore[empty-body]
        """Return the records of architectures whose tied names on disk this plugin knows."""

    @hookspec
    def embedsurgery_stores(self) -> Sequence[StoreRecord]:  # type: ignore[empty-body]
        """Return the records of the checkpoint formats that this plugin reads and writes."""

    @hookspec
    def embedsurgery_commands(self) -> Sequence[CommandRecord]:  # type: ignore[empty-body]
        """Return the records of the verbs that this plugin adds to the command line."""

    @hookspec
    def embedsurgery_card_sections(self) -> Sequence[CardSectionRecord]:  # type: ignore[empty-body]
        """Return the records of the parts that this plugin adds to the cards of adapters."""

"""The hooks that a plugin can implement, and the records that they return: the whole contract, in one file.

A plugin is a module with functions marked `hookimpl`, found by an entry point in the group ``embedsurgery``. Each hook
takes no arguments and returns records: frozen dataclasses that name what the plugin brings and hold the functions that
do it. Only this file and ``discovery.py`` import pluggy.

A plugin can state the contract that it is written for by a module attribute ``embedsurgery_contract = 1``; one for a
newer contract is refused. `CONTRACT` grows when a change to a hook or a record breaks older plugins.
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
"""The version of the contract."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True)
class ClassifierRecord:
    """A way to recognise embedding modules.

    Attributes:
        name: Its name, unique among all plugins.
        classify: Called as ``classify(unknown: UnknownModule)``; returns an `EmbeddingModule`, or None for a
            module that it does not know.
    """

    name: str
    classify: Classify


@dataclass(frozen=True)
class LayoutRecord:
    """An architecture's tied names on disk, which its files do not show.

    Attributes:
        name: ``model_type`` or class name, as in a config; unique among all plugins.
        layout: The names.
    """

    name: str
    layout: Layout


@dataclass(frozen=True)
class StoreRecord:
    """A checkpoint format.

    Attributes:
        name: Its name, unique among all plugins.
        recognises: Called as ``recognises(directory: Path)``; returns whether the directory has this format, judging
            by file names and headers.
        open: Called as ``open(directory: Path, architectures: Mapping[str, Layout])``; returns a `Store` that reads and
            writes the directory's files. ``architectures`` is for `walk_names`.
        fallback: Whether it opens the directories that no format recognises.
    """

    name: str
    recognises: Callable[[Path], bool]
    open: Callable[[Path, Mapping[str, Layout]], Store]
    fallback: bool = False


@dataclass(frozen=True)
class CommandRecord:
    """A command of the command line.

    Attributes:
        name: Its name, unique among all plugins and built-in commands.
        summary: Its line in the list of commands.
        load: Called as ``load()`` when the command is used; returns its `click.Command`.
    """

    name: str
    summary: str
    load: Callable[[], click.Command]


@dataclass(frozen=True)
class CardSection:
    """A section of a model card.

    Attributes:
        title: Its heading, as plain text.
        body: Markdown.
    """

    title: str
    body: str


@dataclass(frozen=True)
class CardSectionRecord:
    """A section for the cards that are pushed with adapters.

    Attributes:
        name: Its name, unique among all plugins.
        section: Called as ``section(manifest: Manifest)``; returns a `CardSection`, or None for no
            section.
    """

    name: str
    section: Callable[[Manifest], CardSection | None]


class Hooks:
    """The hooks. Each returns a list of records and changes nothing."""

    @hookspec
    def embedsurgery_surgeries(self) -> Sequence[SurgeryRecord]:  # type: ignore[empty-body]
        """Return the records of the surgeries that this plugin brings."""

    @hookspec
    def embedsurgery_initializers(self) -> Sequence[InitializerRecord]:  # type: ignore[empty-body]
        """Return the records of the initialisers of new rows that this plugin brings."""

    @hookspec
    def embedsurgery_classifiers(self) -> Sequence[ClassifierRecord]:  # type: ignore[empty-body]
        """Return the records of classifiers of embedding modules whose class embedsurgery does not know."""

    @hookspec
    def embedsurgery_layouts(self) -> Sequence[LayoutRecord]:  # type: ignore[empty-body]
        """Return the records of architectures whose tied names on disk this plugin knows."""

    @hookspec
    def embedsurgery_stores(self) -> Sequence[StoreRecord]:  # type: ignore[empty-body]
        """Return the records of the checkpoint formats that this plugin reads and writes."""

    @hookspec
    def embedsurgery_commands(self) -> Sequence[CommandRecord]:  # type: ignore[empty-body]
        """Return the records of the commands that this plugin adds to the command line."""

    @hookspec
    def embedsurgery_card_sections(self) -> Sequence[CardSectionRecord]:  # type: ignore[empty-body]
        """Return the records of the sections that this plugin adds to the cards of adapters."""

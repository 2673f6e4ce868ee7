"""The journal of a change in place: what puts the files back, written and fsynced before any of them is touched.

It is a directory, ``.embedsurgery/journal``, of parts that are plans of file edits (``file_edits.py``), beside files
that are kept and files that are being made. No part: nothing was touched. A part: it is rolled back, the last part
first. Renaming the directory is the commit. After SQLite's rollback journal: https://sqlite.org/atomiccommit.html
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from embedsurgery._version import __version__
from embedsurgery.errors import CheckpointError, PlanError, UnfinishedError
from embedsurgery.files.atomic import second_name, sync_path
from embedsurgery.files.copying import remove_tree
from embedsurgery.files.locking import DONE, JOURNAL, STATE_DIRECTORY, refuse_linked_state, segments
from embedsurgery.plan import Edit, PatchFile, Undo
from embedsurgery.plan.edit import Range
from embedsurgery.plan.file_edits import FileState, PutFile, SetBytes, journal_mismatch


class Journal:
    """The journal of the change in place that this process is making; it holds the lock on the directory.

    Args:
        directory: The checkpoint.
        facts: What a person may want to know of an interrupted change.
    """

    def __init__(self, directory: Path, facts: Mapping[str, Any]) -> None:
        self.directory = directory
        self.folder = directory / JOURNAL
        """Where what is being made lies until it takes its place."""
        self._facts = {
            **facts,
            "pid": os.getpid(),
            "version": __version__,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self._replaced: set[str] = set()
        self._ranges: dict[str, list[Range]] = {}
        self._number = 0

    def begin(self) -> None:
        """Make the directory; what a killed run left there without having touched anything goes."""
        refuse_linked_state(self.directory)
        clean(self.directory)
        (self.directory / STATE_DIRECTORY).mkdir(exist_ok=True)
        self.folder.mkdir()
        sync_path(self.directory / STATE_DIRECTORY)
        sync_path(self.directory)

    def protect(self, ranges: Mapping[str, Sequence[Range]], files: Collection[str]) -> None:
        """Make sure that bytes and files can be put back, whatever happens from now on.

        Args:
            ranges: Weight file -> the bytes that will be written over where they lie.
            files: Files that will be replaced, made or removed.
        """
        self._number += 1
        edits: list[Edit] = []
        keeps = False
        for count, path in enumerate(sorted(set(files) - self._replaced)):
            if os.path.lexists(self.directory / path):
                kept = f"{self._number:04d}-{count}.kept"
                second_name(self.directory / path, self.folder / kept)
                keeps = True
                edits.append(PutFile(path, kept, FileState.of(self.directory / path)))
            else:
                edits.append(PatchFile(path, after=None, before=None))
        for path, wanted in sorted(ranges.items()):
            fresh = subtract(wanted, self._ranges.get(path, [])) if path not in self._replaced else []
            if fresh:
                edits.append(SetBytes.as_now(self.directory, path, fresh))
                self._ranges[path] = union([*self._ranges.get(path, []), *fresh])
        if edits:
            part = self.folder / f"{self._number:04d}.part"
            Undo(tuple(edits), self._facts).save(part)
            if keeps:
                sync_path(self.folder)  # the kept names, before the part that relies on them counts
            os.rename(part, part.with_suffix(".safetensors"))
            sync_path(self.folder)
        self._replaced.update(files)

    def commit(self) -> None:
        """Let the change stand: all names that came or went are made to last, and then the journal counts no more.

        What was written into files is synced by whoever wrote it.
        """
        folders = {(self.directory / path).parent for path in self._replaced} | {self.directory / STATE_DIRECTORY}
        for folder in sorted(folder for folder in folders if folder.is_dir()):
            sync_path(folder)
        _discount(self.directory)


def subtract(wanted: Sequence[Range], known: Sequence[Range]) -> list[Range]:
    """The parts of some ranges that lie in no others; ascending, apart, those that touch as one."""
    found: list[Range] = []
    for begin, end in union(wanted):
        for low, high in union(known):
            if high <= begin or low >= end:
                continue
            if low > begin:
                found.append((begin, low))
            begin = max(begin, high)
        if begin < end:
            found.append((begin, end))
    return found


def union(ranges: Sequence[Range]) -> list[Range]:
    """Ranges as ascending ones that lie apart."""
    found: list[Range] = []
    for begin, end in sorted(ranges):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        elif begin < end:
            found.append((begin, end))
    return found


def roll_back(directory: Path) -> tuple[str, ...]:
    """Put back what a change in place has touched, and remove its journal; the caller holds the lock.

    It can be interrupted and done again.

    Returns:
        The files that were put back, removed, or had bytes put back into them.

    Raises:
        UnfinishedError: The journal is damaged, or the files are not those that it was written for.
    """
    refuse_linked_state(directory)
    undone: list[str] = []
    for plan in reversed([_load(directory, part) for part in segments(directory)]):
        for edit in plan.edits:
            try:
                path = edit.put_back(directory, directory / JOURNAL)
            except OSError as error:
                where = getattr(edit, "path", directory)
                raise UnfinishedError(
                    "a file cannot be put back",
                    where=f"{directory}: {str(where)[:200]}",
                    found=error.strerror,
                    hint="make it writable, or make room, and run recover again",
                ) from error
            if path is None:
                raise journal_mismatch(directory, "an edit of files", edit.describe())
            undone.append(path)
    for folder in {(directory / path).parent for path in undone}:
        if folder.is_dir():
            sync_path(folder)
    _discount(directory)
    return tuple(dict.fromkeys(undone))


def _load(directory: Path, part: Path) -> Undo:
    try:
        return Undo.load(part, sealed=True)
    except (CheckpointError, PlanError) as error:
        raise UnfinishedError(
            "the journal of an interrupted change in place is damaged",
            where=part,
            found=error,
            hint=f"put the checkpoint's files back from elsewhere and remove {directory / JOURNAL}",
        ) from error


def _discount(directory: Path) -> None:
    """Rename the journal, from which moment it counts no more, and remove it."""
    if (directory / JOURNAL).is_dir():
        if (directory / DONE).is_dir():
            remove_tree(directory / DONE)
        os.rename(directory / JOURNAL, directory / DONE)
        sync_path(directory / STATE_DIRECTORY)
    with contextlib.suppress(OSError):  # it counts no more, and the next change removes it
        clean(directory)


def clean(directory: Path) -> bool:
    """Remove what no longer counts, or never did, and the directories of ours that are empty then.

    Returns:
        Whether there was anything.
    """
    found = False
    for name in (JOURNAL, DONE):
        folder = directory / name
        if folder.is_dir() and not folder.is_symlink() and not (name == JOURNAL and segments(directory)):
            remove_tree(folder)
            found = True
    for name in (f"{STATE_DIRECTORY}/merges", STATE_DIRECTORY):
        with contextlib.suppress(OSError):
            (directory / name).rmdir()
    return found

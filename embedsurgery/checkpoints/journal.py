"""The journal of a change in place: how to restore each file, written and synced before that file is touched.

The journal is a directory, ``.embedsurgery/journal``. It holds segments (undos made of the edits in
``plan/file_edits.py``), kept files (second names of files that get replaced) and files under construction. Without a
segment nothing was touched yet. With segments, recovery restores them, the last one first. Renaming the directory
commits the change. The protocol is that of SQLite's rollback journal: https://sqlite.org/atomiccommit.html

``in_place.py`` uses the journal around a change, ``recovery.py`` after a crash.
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
from embedsurgery.files.atomic import link_or_copy, sync_path
from embedsurgery.files.copying import remove_tree
from embedsurgery.files.locking import DONE, JOURNAL, STATE_DIRECTORY, journal_segments, refuse_linked_state
from embedsurgery.plan import Edit, PatchFile, Undo
from embedsurgery.plan.edit import Range
from embedsurgery.plan.file_edits import FileState, PutFile, SetBytes, journal_mismatch


class Journal:
    """The journal of the change in place that this process makes; the process holds the checkpoint's lock.

    Args:
        directory: The checkpoint.
        facts: Information for a person who inspects an interrupted change.

    Attributes:
        directory: The checkpoint.
        folder: The journal's directory. New files are built here before they are renamed into place.
    """

    def __init__(self, directory: Path, facts: Mapping[str, Any]) -> None:
        self.directory = directory
        self.folder = directory / JOURNAL
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
        """Create the journal's directory; remove one without segments that a killed run left."""
        refuse_linked_state(self.directory)
        remove_leftovers(self.directory)
        (self.directory / STATE_DIRECTORY).mkdir(exist_ok=True)
        self.folder.mkdir()
        # A segment is worth nothing after a power cut if the directories above it do not survive.
        sync_path(self.directory / STATE_DIRECTORY)
        sync_path(self.directory)

    def protect(self, ranges: Mapping[str, Sequence[Range]], files: Collection[str]) -> None:
        """Add a segment that restores these bytes and files; from here on they may be changed.

        Bytes and files of earlier segments are not saved again: the first saved version is the one to restore. Nor are
        bytes of a replaced file, whose old inode is kept as a whole.

        Args:
            ranges: Weight file -> byte ranges that will be overwritten in place.
            files: Files that will be replaced, created or removed.
        """
        self._number += 1
        edits: list[Edit] = []
        any_kept = False
        for count, path in enumerate(sorted(set(files) - self._replaced)):
            if os.path.lexists(self.directory / path):
                kept = f"{self._number:04d}-{count}.kept"
                link_or_copy(self.directory / path, self.folder / kept)
                any_kept = True
                edits.append(PutFile(path, kept, FileState.of(self.directory / path)))
            else:
                edits.append(PatchFile(path, after=None, before=None))
        for path, wanted in sorted(ranges.items()):
            unsaved = subtract_ranges(wanted, self._ranges.get(path, [])) if path not in self._replaced else []
            if unsaved:
                edits.append(SetBytes.of_current_bytes(self.directory, path, unsaved))
                self._ranges[path] = join_ranges([*self._ranges.get(path, []), *unsaved])
        if edits:
            # The rename makes the segment count. So everything it refers to must be on disk before: its own bytes
            # (synced by save) and the names of kept files. The last sync makes the segment itself survive a power cut
            # before the caller writes the first byte into the checkpoint. tests/faults/test_order.py checks this order.
            part = self.folder / f"{self._number:04d}.part"
            Undo(tuple(edits), self._facts).save(part)
            if any_kept:
                sync_path(self.folder)
            os.rename(part, part.with_suffix(".safetensors"))
            sync_path(self.folder)
        self._replaced.update(files)

    def commit(self) -> None:
        """Make the change permanent: sync every directory in which names changed, then invalidate the journal.

        The caller has synced the bytes that it wrote into files.
        """
        folders = {(self.directory / path).parent for path in self._replaced} | {self.directory / STATE_DIRECTORY}
        for folder in sorted(folder for folder in folders if folder.is_dir()):
            sync_path(folder)
        _invalidate(self.directory)


def subtract_ranges(wanted: Sequence[Range], known: Sequence[Range]) -> list[Range]:
    """The parts of ``wanted`` that no range of ``known`` covers: ascending, disjoint, adjacent ones joined."""
    rest: list[Range] = []
    for begin, end in join_ranges(wanted):
        for low, high in join_ranges(known):
            if high <= begin or low >= end:
                continue
            if low > begin:
                rest.append((begin, low))
            begin = max(begin, high)
        if begin < end:
            rest.append((begin, end))
    return rest


def join_ranges(ranges: Sequence[Range]) -> list[Range]:
    """The union of ranges: ascending, disjoint, adjacent ones joined."""
    joined: list[Range] = []
    for begin, end in sorted(ranges):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        elif begin < end:
            joined.append((begin, end))
    return joined


def roll_back(directory: Path) -> tuple[str, ...]:
    """Restore what an interrupted change in place touched and remove its journal. The caller holds the lock.

    Every step can be repeated, so a rollback that is itself interrupted can be run again.

    Returns:
        The files that were restored, removed, or had bytes restored.

    Raises:
        UnfinishedError: The journal is damaged, does not fit the files, or a file cannot be written.
    """
    refuse_linked_state(directory)
    restored: list[str] = []
    # The list reads and verifies every segment before the first file is touched: a damaged one must not leave the
    # checkpoint half restored.
    for plan in reversed([_load_segment(directory, segment) for segment in journal_segments(directory)]):
        for edit in plan.edits:
            try:
                path = edit.restore_file(directory, directory / JOURNAL)
            except OSError as error:
                where = getattr(edit, "path", directory)
                raise UnfinishedError(
                    "cannot restore a file",
                    where=f"{directory}: {str(where)[:200]}",
                    found=error.strerror,
                    hint="make it writable or free some space, then run recover again",
                ) from error
            if path is None:
                raise journal_mismatch(directory, "an edit of files", edit.describe())
            restored.append(path)
    for folder in {(directory / path).parent for path in restored}:
        if folder.is_dir():
            sync_path(folder)
    _invalidate(directory)
    return tuple(dict.fromkeys(restored))


def _load_segment(directory: Path, segment: Path) -> Undo:
    try:
        return Undo.load(segment, sealed=True)
    except (CheckpointError, PlanError) as error:
        raise UnfinishedError(
            "the journal of an interrupted change in place is damaged",
            where=segment,
            found=error,
            hint=f"restore the checkpoint's files from a backup and remove {directory / JOURNAL}",
        ) from error


def _invalidate(directory: Path) -> None:
    """Rename the journal so that it no longer counts, then remove it.

    Removing a directory takes several steps and a kill in between would leave some of the segments. The rename is one
    step.
    """
    if (directory / JOURNAL).is_dir():
        if (directory / DONE).is_dir():
            remove_tree(directory / DONE)
        os.rename(directory / JOURNAL, directory / DONE)
        sync_path(directory / STATE_DIRECTORY)
    with contextlib.suppress(OSError):  # the next change removes what is left
        remove_leftovers(directory)


def remove_leftovers(directory: Path) -> bool:
    """Remove a finished journal and one without segments, then embedsurgery's directories that are empty.

    Returns:
        Whether there was a journal to remove.
    """
    found = False
    for name in (JOURNAL, DONE):
        folder = directory / name
        if folder.is_dir() and not folder.is_symlink() and not (name == JOURNAL and journal_segments(directory)):
            remove_tree(folder)
            found = True
    for name in (f"{STATE_DIRECTORY}/merges", STATE_DIRECTORY):
        with contextlib.suppress(OSError):  # not there, or not empty
            (directory / name).rmdir()
    return found

"""Cleans up after a crash: an interrupted change in place, or a new directory that was never completed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from embedsurgery import hub
from embedsurgery.checkpoints.journal import remove_leftovers, roll_back
from embedsurgery.errors import CheckpointError, ConfigError
from embedsurgery.files.atomic import remove_stale_staging
from embedsurgery.files.locking import journal_segments, lock_directory, refuse_linked_state


@dataclass(frozen=True)
class RecoveryReport:
    """What `recover_checkpoint` found and did.

    Attributes:
        directory: The checkpoint.
        restored: Files that an interrupted change in place had touched; they are as they were before it.
        finished: Whether a complete change had left a journal to remove.
        removed: Names of the outputs whose hidden build directories, left by killed runs, were removed.
    """

    directory: str
    restored: tuple[str, ...]
    finished: bool
    removed: tuple[str, ...]


def recover_checkpoint(directory: str | os.PathLike[str]) -> RecoveryReport:
    """Recover a checkpoint after a crash, a kill or a power cut.

    An incomplete change in place is rolled back: every file is as before it, bit for bit. A complete one stands, and
    only its journal is removed. Hidden directories beside the checkpoint, in which killed runs were building new ones,
    are removed; those of running processes are not touched. The recovery itself may be killed and run again.

    Args:
        directory: The checkpoint, or the output that a killed run never completed.

    Raises:
        CheckpointError: Neither the directory nor a build directory for it exists.
        BusyError: Another process is changing the checkpoint.
        ConfigError: ``directory`` is a Hub id.
        UnfinishedError: The journal is damaged or does not fit the files.
    """
    if hub.find_id(directory) is not None:
        raise ConfigError("a model on the Hub has nothing to recover", found=directory, expected="a directory")
    folder = Path(directory)
    parent = folder.absolute().parent
    removed = remove_stale_staging(parent) if os.path.isdir(parent) else []
    if not os.path.isdir(folder):
        if not removed:
            raise CheckpointError("no checkpoint and no unfinished output found", where=folder)
        return RecoveryReport(str(folder), (), False, tuple(removed))
    refuse_linked_state(folder)
    with lock_directory(folder):
        # Segments mean that the commit (the rename of the journal) was not reached. What is left otherwise is a
        # committed journal, or one of a run that was killed before it touched a file.
        if journal_segments(folder):
            return RecoveryReport(str(folder), roll_back(folder), False, tuple(removed))
        return RecoveryReport(str(folder), (), remove_leftovers(folder), tuple(removed))

"""Ending what a crash left of a change in place, or of a new directory that never appeared."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from embedsurgery import hub
from embedsurgery.checkpoints.journal import clean, roll_back
from embedsurgery.errors import CheckpointError, ConfigError
from embedsurgery.files.atomic import sweep
from embedsurgery.files.locking import locked, refuse_linked_state, segments


@dataclass(frozen=True)
class RecoveryReport:
    """What was found, and done.

    Attributes:
        directory: Where.
        restored: Files that an interrupted change in place had touched, and that are as they were before it.
        finished: Whether a change that was complete had left something to be removed.
        removed: What hidden directories beside it were to become, that killed runs left and that were removed.
    """

    directory: str
    restored: tuple[str, ...]
    finished: bool
    removed: tuple[str, ...]


def recover_checkpoint(directory: str | os.PathLike[str]) -> RecoveryReport:
    """Bring a checkpoint out of whatever state a crash, a kill or a power cut left it in.

    A change in place that was not complete is rolled back: the files are as before it, bit for bit. One that was
    complete stands, and only what it left behind is removed. Hidden directories beside it, in which killed runs were
    building new ones, are removed; those of running processes are not touched. Can itself be killed and run again.

    Args:
        directory: The checkpoint, or the output that a killed run never made.

    Raises:
        CheckpointError: There is no such directory, nor anything that was to become it.
        BusyError: Another process is changing it.
        ConfigError: It is a Hub id.
        UnfinishedError: The journal is damaged or does not fit the files; nothing is guessed.
    """
    if hub.find_id(directory) is not None:
        raise ConfigError("a model on the Hub has nothing to recover", found=directory, expected="a directory")
    folder = Path(directory)
    parent = folder.absolute().parent
    removed = sweep(parent) if os.path.isdir(parent) else []
    if not os.path.isdir(folder):
        if not removed:
            raise CheckpointError(
                "no such checkpoint directory, and nothing beside it that was to become one", where=folder
            )
        return RecoveryReport(str(folder), (), False, tuple(removed))
    refuse_linked_state(folder)
    with locked(folder):
        if segments(folder):
            return RecoveryReport(str(folder), roll_back(folder), False, tuple(removed))
        return RecoveryReport(str(folder), (), clean(folder), tuple(removed))

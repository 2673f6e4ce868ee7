"""Locks checkpoint directories, and refuses those with an unfinished change in place.

The lock is ``flock`` on the directory itself: it leaves no file behind and works on a read-only directory too. A change
in place takes it exclusively, a copy takes it shared. The journal itself is written by ``checkpoints/journal.py``.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from embedsurgery.errors import BusyError, CheckpointError, UnfinishedError, UnsupportedError

STATE_DIRECTORY = ".embedsurgery"
"""Directory in a checkpoint for all files of embedsurgery. It is a directory because inference engines load every
``*.safetensors`` at the top level."""

JOURNAL = f"{STATE_DIRECTORY}/journal"
"""Directory of the journal of a change in place, and of the files that such a change prepares."""

DONE = f"{STATE_DIRECTORY}/done"
"""Name of the journal after the change has succeeded, until it is removed."""


@contextmanager
def lock_directory(directory: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock on a directory. Never waits.

    Args:
        directory: An existing directory.
        shared: Take a shared lock. A file system without locks is then accepted.

    Raises:
        BusyError: Another process holds a conflicting lock.
        UnsupportedError: The file system has no locks, and ``shared`` is False.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(
                "another embedsurgery process uses this checkpoint",
                where=directory,
                expected="no process that changes it" if shared else "no process that reads or changes it",
                hint="wait until it has finished",
            ) from error
        except OSError as error:
            if not shared:
                raise UnsupportedError(
                    "a change in place needs a lock, and this file system has none",
                    where=directory,
                    found=error.strerror,
                    hint="write to a new directory instead",
                ) from error
        yield
    finally:
        os.close(descriptor)


def journal_segments(directory: Path) -> list[Path]:
    """Return the files of the journal in a checkpoint directory, in the order they were written."""
    folder = directory / JOURNAL
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [folder / name for name in names if name.endswith(".safetensors")]


def refuse_unfinished(directory: Path, *, held: bool = False) -> None:
    """Refuse a checkpoint with a journal: its files are partly old and partly new.

    Args:
        directory: The checkpoint.
        held: Whether the caller holds the exclusive lock, so that no other process can be changing it.

    Raises:
        UnfinishedError: A change in place is running, or was interrupted.
    """
    if not journal_segments(directory):
        return
    try:
        if not held:
            with lock_directory(directory, shared=True):
                pass
    except BusyError as error:
        raise UnfinishedError(
            "another process is changing this checkpoint in place", where=directory, hint="wait until it has finished"
        ) from error
    raise UnfinishedError(
        "a change in place was interrupted, and the files are partly changed",
        where=directory,
        found=f"a journal in {JOURNAL}",
        hint=f"run: embedsurgery recover {directory}",
    )


def refuse_linked_state(directory: Path) -> None:
    """Refuse a ``.embedsurgery``, or a directory in it, that is a link or a file.

    Through a link, records and journals would be written somewhere else.

    Raises:
        CheckpointError: It is a link or a file.
    """
    for name in (STATE_DIRECTORY, f"{STATE_DIRECTORY}/merges", JOURNAL, DONE):
        path = directory / name
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise CheckpointError(
                "cannot store files of embedsurgery here",
                where=path,
                expected="a real directory",
                found="a link" if path.is_symlink() else "a file",
                hint="remove it",
            )

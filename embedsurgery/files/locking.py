"""The lock on a checkpoint directory, and whether a change of it was never finished.

The lock is ``flock`` on the directory itself, so nothing is left behind and a directory that cannot be written can be
locked too. Whoever changes a checkpoint in place holds it alone; whoever copies one shares it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from embedsurgery.errors import BusyError, CheckpointError, UnfinishedError, UnsupportedError

STATE_DIRECTORY = ".embedsurgery"
"""What we keep beside a checkpoint: engines glob ``*.safetensors`` at the top level and would load a stray file."""

JOURNAL = f"{STATE_DIRECTORY}/journal"
"""The directory with the journal of a change in place, and with what such a change is making."""

DONE = f"{STATE_DIRECTORY}/done"
"""What the journal is called once it no longer counts, until it is removed."""


@contextmanager
def locked(directory: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock on a directory. Nobody waits: what cannot be had at once is refused.

    Args:
        directory: It exists.
        shared: Only against those who change it. A file system that has no locks is taken as it is.

    Raises:
        BusyError: Another process holds it.
        UnsupportedError: The file system has no locks.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            doing = "is changing" if shared else "is reading or changing"
            raise BusyError(
                f"another process of embedsurgery {doing} this checkpoint",
                where=directory,
                hint="wait until it is done",
            ) from error
        except OSError as error:
            if not shared:
                raise UnsupportedError(
                    "the file system cannot lock a directory, which a change in place needs",
                    where=directory,
                    found=error.strerror,
                    hint="write a new directory instead",
                ) from error
        yield
    finally:
        os.close(descriptor)


def segments(directory: Path) -> list[Path]:
    """The parts of the journal in a checkpoint directory, in the order in which they were written."""
    folder = directory / JOURNAL
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [folder / name for name in names if name.endswith(".safetensors")]


def refuse_unfinished(directory: Path, *, held: bool = False) -> None:
    """Refuse a checkpoint that a change in place is working on, or was when it was killed: its files are in between.

    Args:
        directory: The checkpoint.
        held: Whether the caller holds the lock alone, so that nobody is working on it.

    Raises:
        UnfinishedError: With the way out.
    """
    if not segments(directory):
        return
    try:
        if not held:
            with locked(directory, shared=True):
                pass
    except BusyError as error:
        raise UnfinishedError(
            "another process is changing this checkpoint in place", where=directory, hint="wait until it is done"
        ) from error
    raise UnfinishedError(
        "a change in place was interrupted, so the files are neither as before nor as after",
        where=directory,
        found=f"a journal in {JOURNAL}",
        hint=f"run: embedsurgery recover {directory}",
    )


def refuse_linked_state(directory: Path) -> None:
    """Refuse a ``.embedsurgery`` that is no directory of the checkpoint's own: what is written would lie elsewhere.

    Raises:
        CheckpointError: It is a link, or a file.
    """
    for name in (STATE_DIRECTORY, f"{STATE_DIRECTORY}/merges", JOURNAL, DONE):
        path = directory / name
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise CheckpointError(
                "not a directory of the checkpoint's own",
                where=path,
                expected="a directory",
                found="a link" if path.is_symlink() else "a file",
                hint="remove it",
            )

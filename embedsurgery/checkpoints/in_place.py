"""Changes a checkpoint in place: a journal around the change, files that must not be changed, and a warning to readers.

``journal.py`` saves and restores, ``writing.py`` makes the change.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from embedsurgery.checkpoints.footprint import PlanFootprint
from embedsurgery.checkpoints.journal import Journal, remove_leftovers, roll_back
from embedsurgery.errors import UnfinishedError, UnsupportedError, warn
from embedsurgery.files.locking import journal_segments
from embedsurgery.files.signals import defer_signals

_USE_OUTPUT = "write a new directory instead: -o / output"


@contextmanager
def change_in_place(directory: Path, edits: Collection[str]) -> Iterator[Journal]:
    """Change a checkpoint in place inside the block; if it fails or is interrupted, everything is restored.

    Args:
        directory: The checkpoint; the caller holds its lock.
        edits: One line for each edit, stored in the journal for a person who inspects it.

    Raises:
        UnfinishedError: The block failed and restoring failed too; the journal is still there.
    """
    journal = Journal(directory, {"edits": list(edits)})
    try:
        journal.begin()
        yield journal
        with defer_signals():
            journal.commit()
    except BaseException as error:  # KeyboardInterrupt included
        with defer_signals():
            _undo_change(directory, error)
        raise


def _undo_change(directory: Path, error: BaseException) -> None:
    try:
        if journal_segments(directory):
            roll_back(directory)
        else:
            remove_leftovers(directory)
    except (OSError, UnfinishedError) as second:
        if not journal_segments(directory):
            # The files are as they were: nothing was touched, or all was restored and only removing the journal
            # failed. The next change removes the rest, so the first error is the one to raise.
            return
        raise UnfinishedError(
            "a change in place failed and could not be rolled back",
            where=directory,
            found=f"{error or type(error).__name__}; then {second}",
            hint=f"run: embedsurgery recover {directory}",
        ) from error


def refuse_in_place(directory: Path, footprint: PlanFootprint, created: Collection[str] = ()) -> None:
    """Refuse to change links, files with several names, and read-only files.

    Args:
        directory: The checkpoint.
        footprint: What would be changed.
        created: Files that this change has created itself, which are not checked.

    Raises:
        UnsupportedError: A file or the directory must not be changed.
    """
    if directory.is_symlink():
        raise UnsupportedError(
            "the checkpoint is a link",
            where=directory,
            found=f"a link to {directory.resolve()}",
            hint=f"pass {directory.resolve()}",
        )
    _refuse_read_only(directory)
    for path in sorted({*footprint.ranges, *footprint.files} - set(created)):
        file = directory / path
        if not os.path.lexists(file):
            continue
        if file.is_symlink():
            # A snapshot in the Hub cache is made of links; another revision may link to the same blob.
            raise UnsupportedError(
                "a file is a link, and its target may be used elsewhere",
                where=file,
                found=f"a link to {os.readlink(file)}",
                hint=f"is this a snapshot of the Hub cache? {_USE_OUTPUT}",
            )
        links = file.stat().st_nlink
        # Only overwriting bytes reaches the other names. A file that is replaced gets a new inode.
        if path in footprint.ranges and links > 1:
            raise UnsupportedError(
                "a weight file has several names, and all of them would change",
                where=file,
                found=f"{links} hard links",
                hint=_USE_OUTPUT,
            )
        _refuse_read_only(file)


def _refuse_read_only(path: Path) -> None:
    mode = path.stat().st_mode
    if not mode & stat.S_IWUSR or not os.access(path, os.W_OK):  # root passes os.access whatever the mode is
        raise UnsupportedError(
            f"the {'directory' if stat.S_ISDIR(mode) else 'file'} is read-only",
            where=path,
            found=f"mode {stat.S_IMODE(mode):04o}",
            hint=f"chmod u+w it if it is yours to change, or {_USE_OUTPUT}",
        )


def warn_mapped_files(directory: Path, files: Collection[str]) -> None:
    """Warn that processes with a mapping of the files see rows change; list those that can be found."""
    processes = find_mapping_processes([directory / file for file in files])
    listed = f"; found: {', '.join(processes)}" if processes else ""
    warn(
        f"{', '.join(files)}: processes that have these files mapped (a server that runs the model, for example) "
        f"see the rows change{listed}"
    )


def find_mapping_processes(files: Collection[Path]) -> list[str]:
    """Find other processes that map one of the files, as "PID (name)". Those of other users are not visible."""
    wanted = {(os.major(s.st_dev), os.minor(s.st_dev), s.st_ino) for s in map(os.stat, files)}
    inodes = [b" %d " % inode for _, _, inode in wanted]
    found = []
    for process in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if not process.isdecimal() or process == str(os.getpid()):
            continue
        try:
            with open(f"/proc/{process}/maps", "rb", buffering=0) as file:
                maps = file.readall()
            # Parsing every line of every process is slow; most files do not contain the inode number at all.
            if any(inode in maps for inode in inodes) and any(
                _parse_mapping(line) in wanted for line in maps.splitlines()
            ):
                with open(f"/proc/{process}/comm", "rb") as file:
                    found.append(f"{process} ({file.read().decode(errors='replace').strip()})")
        except OSError:  # the process ended, or belongs to another user
            continue
    return sorted(found)


def _parse_mapping(line: bytes) -> tuple[int, int, int] | None:
    """(major, minor, inode) of a line of ``/proc/PID/maps``; None for a mapping without a file."""
    fields = line.split(None, 5)
    if len(fields) < 6 or fields[4] == b"0":
        return None
    major, minor = fields[3].split(b":")
    return int(major, 16), int(minor, 16), int(fields[4])

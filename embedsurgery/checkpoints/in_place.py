"""Changing a checkpoint where it lies: what forbids it, what is said before, and a journal around it."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from embedsurgery.checkpoints.footprint import PlanFootprint
from embedsurgery.checkpoints.journal import Journal, clean, roll_back
from embedsurgery.errors import EmbedSurgeryWarning, UnfinishedError, UnsupportedError
from embedsurgery.files.atomic import uninterrupted
from embedsurgery.files.locking import segments

_WAY_OUT = "write a new directory instead: -o / output"


@contextmanager
def changing(directory: Path, edits: Collection[str]) -> Iterator[Journal]:
    """Inside, a checkpoint is changed in place; a block that fails, or is interrupted, leaves it as it was.

    Args:
        directory: The checkpoint; the caller holds its lock.
        edits: A line for each edit, for whoever finds the journal.

    Raises:
        UnfinishedError: The block failed, and so did taking back what it had done: the journal is still there.
    """
    journal = Journal(directory, {"edits": list(edits)})
    try:
        journal.begin()
        yield journal
        with uninterrupted():
            journal.commit()
    except BaseException as error:
        with uninterrupted():
            _take_back(directory, error)
        raise


def _take_back(directory: Path, error: BaseException) -> None:
    try:
        if segments(directory):
            roll_back(directory)
        else:
            clean(directory)
    except (OSError, UnfinishedError) as second:
        if not segments(directory):
            return  # nothing was touched, and what is left is removed by the next change
        raise UnfinishedError(
            "a change in place failed, and so did taking it back",
            where=directory,
            found=f"{error or type(error).__name__}; then {second}",
            hint=f"run: embedsurgery recover {directory}",
        ) from error


def refuse_in_place(directory: Path, touched: PlanFootprint, ours: Collection[str] = ()) -> None:
    """Refuse files that stand for more than themselves, or that nobody is meant to write.

    Args:
        directory: The checkpoint.
        touched: What would be written over or replaced.
        ours: Files that this change has made, which it may do with as it likes.

    Raises:
        UnsupportedError: With the way out.
    """
    if directory.is_symlink():
        raise UnsupportedError(
            "the checkpoint is reached through a link",
            where=directory,
            found=f"a link to {directory.resolve()}",
            hint="name that directory itself",
        )
    _refuse_read_only(directory)
    for path in sorted({*touched.ranges, *touched.files} - set(ours)):
        file = directory / path
        if not os.path.lexists(file):
            continue
        if file.is_symlink():
            raise UnsupportedError(
                "a file is reached through a link, and what it leads to may serve others",
                where=file,
                found=f"a link to {os.readlink(file)}",
                hint=f"a snapshot of the Hub cache is such a directory; {_WAY_OUT}",
            )
        links = file.stat().st_nlink
        if path in touched.ranges and links > 1:
            raise UnsupportedError(
                "a weight file has more than one name, and all would change",
                where=file,
                found=f"{links} hard links",
                hint=_WAY_OUT,
            )
        _refuse_read_only(file)


def _refuse_read_only(path: Path) -> None:
    mode = path.stat().st_mode
    if not mode & stat.S_IWUSR or not os.access(path, os.W_OK):
        what = "directory" if stat.S_ISDIR(mode) else "file"
        raise UnsupportedError(
            f"a {what} is read-only",
            where=path,
            found=f"mode {stat.S_IMODE(mode):04o}",
            hint=f"chmod u+w it, if it is yours to change; or {_WAY_OUT}",
        )


def warn_of_readers(directory: Path, files: Collection[str]) -> None:
    """Say that whoever has the files mapped sees the rows change, and who that is, as far as can be seen."""
    found = mapped_by([directory / file for file in files])
    who = f"; now: {', '.join(found)}" if found else ""
    warnings.warn(
        f"{', '.join(files)}: processes that have these files mapped, such as a server that runs the model, "
        f"see the rows change{who}",
        EmbedSurgeryWarning,
        stacklevel=5,
    )


def mapped_by(files: Collection[Path]) -> list[str]:
    """The other processes that have one of the files mapped, as "PID (name)"; of other users' that cannot be seen."""
    wanted = {(os.major(s.st_dev), os.minor(s.st_dev), s.st_ino) for s in map(os.stat, files)}
    inodes = [b" %d " % inode for _, _, inode in wanted]
    found = []
    for process in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if not process.isdecimal() or process == str(os.getpid()):
            continue
        try:
            with open(f"/proc/{process}/maps", "rb", buffering=0) as file:
                maps = file.readall()
            if any(inode in maps for inode in inodes) and any(_mapped(line) in wanted for line in maps.splitlines()):
                with open(f"/proc/{process}/comm", "rb") as file:
                    found.append(f"{process} ({file.read().decode(errors='replace').strip()})")
        except OSError:  # gone meanwhile, or another user's
            continue
    return sorted(found)


def _mapped(line: bytes) -> tuple[int, int, int] | None:
    """Major and minor device number and inode of a line of ``/proc/PID/maps``."""
    fields = line.split(None, 5)
    if len(fields) < 6 or fields[4] == b"0":
        return None
    major, minor = fields[3].split(b":")
    return int(major, 16), int(minor, 16), int(fields[4])

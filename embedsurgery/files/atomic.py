"""Directories that appear whole or not at all, and what makes files and names last: fsync, in the right order.

A new directory is built inside a hidden one beside it, every file and directory is fsynced, it is renamed, and the
parent is fsynced. The hidden one is locked while its maker lives and says whose it is, so that the next run can tell
what a killed one left, and remove it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import signal
import stat
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from embedsurgery.errors import CheckpointError, ConfigError, EmbedSurgeryWarning, OutputExistsError
from embedsurgery.files.copying import copy_file, remove_tree
from embedsurgery.files.json_reading import NOTE, read_json
from embedsurgery.files.locking import STATE_DIRECTORY

_STAGING = re.compile(re.escape(STATE_DIRECTORY) + r"-[a-z0-9_]{8}")
"""Names of the hidden directories that new ones are built in."""

_OWNER = "owner.json"
_TREE = "tree"
_NO_SYNC = (errno.EINVAL, errno.EROFS, errno.ENOTSUP, errno.EBADF)
"""What ``fsync`` says of a directory on file systems that do not sync directories."""


@contextmanager
def staged_directory(output: Path) -> Iterator[Path]:
    """A new directory, which becomes ``output`` when the block ends well and vanishes when it does not.

    It lies in a hidden directory beside ``output``, where the block may put what is to vanish in either case. What
    killed runs left in hidden directories there is removed first, with a warning that says so.

    Raises:
        OutputExistsError: ``output`` is there already; nothing is ever written over.
        CheckpointError: Nothing can be written there, or nothing of that name.
    """
    refuse_existing(output)
    parent = output.absolute().parent
    missing = [folder for folder in (parent, *parent.parents) if not os.path.lexists(folder)]
    made: list[tuple[Path, int]] = []
    try:
        with uninterrupted():
            made.append(_begin(output, parent))
        staging = made[0][0] / _TREE
        yield staging
        sync_tree(staging)
        with uninterrupted():
            refuse_existing(output)
            _rename_new(staging, output)
            sync_path(parent)
            _end(made)
    except BaseException:
        with uninterrupted():
            _end(made)
            for folder in missing:
                with contextlib.suppress(OSError):
                    folder.rmdir()
        raise


def _begin(output: Path, parent: Path) -> tuple[Path, int]:
    """A hidden directory with an empty one in it, and its lock."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _refuse_long(output, parent)
        left = sweep(parent)
        if left:
            warnings.warn(
                f"removed what interrupted runs left in {parent}: {', '.join(left)}", EmbedSurgeryWarning, stacklevel=5
            )
        hidden, lock = _make_hidden(parent)
        try:
            _write_owner(hidden, output.name)
            (hidden / _TREE).mkdir()
        except BaseException:
            _end([(hidden, lock)])
            raise
    except OSError as error:
        found = "a file" if os.path.isfile(parent) else error.strerror
        raise CheckpointError(
            "cannot write beside the output", where=parent, found=found, expected="a directory that can be written"
        ) from error
    return hidden, lock


def _end(made: list[tuple[Path, int]]) -> None:
    """Remove hidden directories of this process, and forget them."""
    while made:
        hidden, lock = made.pop()
        with contextlib.suppress(OSError):
            remove_tree(hidden)
        os.close(lock)


def _make_hidden(parent: Path) -> tuple[Path, int]:
    """A new hidden directory and its lock. Between the two it looks like one that was left, and may be removed."""
    import tempfile

    while True:
        path = Path(tempfile.mkdtemp(prefix=f"{STATE_DIRECTORY}-", dir=parent))
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        with contextlib.suppress(OSError):  # a file system without locks: then nobody else can take it either
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.exists(path):
            return path, lock
        os.close(lock)


def _write_owner(hidden: Path, name: str) -> None:
    body = {"embedsurgery": "staging", "output": name, "pid": os.getpid(), "time": time.time()}
    with open(hidden / _OWNER, "xb") as file:
        file.write(json.dumps(body).encode())
        file.flush()
        os.fsync(file.fileno())


def sweep(parent: Path) -> list[str]:
    """Remove the hidden directories that killed runs left in a directory: ours by name and content, held by nobody.

    Returns:
        What they were to become.
    """
    removed = []
    for name in sorted(os.listdir(parent)):
        path = parent / name
        if not _STAGING.fullmatch(name) or path.is_symlink() or not path.is_dir():
            continue
        try:
            if path.stat().st_uid != os.geteuid():
                continue
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            output = _was_for(path)
            if output is not None:
                remove_tree(path)
                removed.append(output)
        except OSError:  # somebody holds it, or it cannot be known
            continue
        finally:
            os.close(lock)
    return removed


def _was_for(hidden: Path) -> str | None:
    """What a hidden directory was to become; None for one that is not ours."""
    if set(os.listdir(hidden)) <= {_OWNER}:
        return "nothing yet"  # killed before it began, and perhaps in the middle of saying whose it is
    try:
        body = read_json(hidden / _OWNER, NOTE)
        return str(body["output"]) if body["embedsurgery"] == "staging" else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _rename_new(staging: Path, output: Path) -> None:
    try:
        staging.rename(output)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        refuse_existing(output)
        raise


def _refuse_long(output: Path, parent: Path) -> None:
    most = os.pathconf(parent, "PC_NAME_MAX")
    if len(os.fsencode(output.name)) > most:
        raise CheckpointError(
            "the output's name is too long for its file system",
            where=f"{output.name[:40]}...",
            expected=f"{most} bytes at most",
            found=len(os.fsencode(output.name)),
        )


def refuse_existing(output: Path) -> None:
    """Raise OutputExistsError where something is there."""
    if str(output) in ("", "."):
        raise ConfigError("the output has no name", expected="a new directory", found=repr(str(output)))
    if os.path.lexists(output):
        raise OutputExistsError("the output exists already", where=output, hint="name a new directory, or remove it")


def refuse_inside(output: Path, source: Path) -> None:
    """Raise ConfigError where an output would lie inside what it is made from, and become a part of it."""
    if source.resolve() in (output.resolve(), *output.resolve().parents):
        raise ConfigError(
            "the output would lie inside the checkpoint it is made from",
            where=output,
            hint="name a directory beside it",
        )


def replace_files(staged: Mapping[Path, Path], *, keep: bool = True) -> None:
    """Put new files in the places of others: all, or none where one cannot be put. The files are fsynced already.

    Args:
        staged: Target, which may be there already -> the file that becomes it, on the same file system.
        keep: Keep the old ones until all is done. Otherwise it is the caller who can put them back.
    """
    kept: dict[Path, Path] = {}
    done: list[Path] = []
    try:
        for target, new in staged.items():
            if keep and target.exists():
                kept[target] = _second_name(target, new)
            os.replace(new, target)
            done.append(target)
    except BaseException:
        for target in done if keep else ():
            if target in kept:
                os.replace(kept.pop(target), target)
            else:
                target.unlink(missing_ok=True)
        raise
    finally:
        for backup in kept.values():
            backup.unlink(missing_ok=True)
    for parent in {target.parent for target in staged}:
        sync_path(parent)


def _second_name(path: Path, new: Path) -> Path:
    """A file under another name, beside the one that replaces it: a link, or a copy where there are none."""
    backup = new.with_name(f"{new.name}.before")
    backup.unlink(missing_ok=True)
    second_name(path, backup)
    return backup


def second_name(path: Path, name: Path) -> None:
    """Give a file another name on its file system: a link, or a copy where the file system has none."""
    try:
        os.link(path, name)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EEXIST):
            raise
        copy_file(path, name)


def sync_path(path: Path) -> None:
    """Fsync a file or directory.

    Raises:
        OSError: The disk could not write it. A directory on a file system that syncs none is passed over.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Fsync every directory below and including this one; files are synced as they are written."""
    for folder, _, _ in os.walk(directory):
        sync_path(Path(folder))


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside, Ctrl-C and the like wait until the end: for what must be done whole, and is short.

    Only handlers of Python's can wait, and only in the main thread are they called at all.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []

    def wait(number: int, frame: FrameType | None) -> None:
        waiting.append(number)

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if callable(signal.getsignal(number)):
            before[number] = signal.signal(number, wait)
    try:
        yield
    finally:
        for blocked, handler in before.items():
            signal.signal(blocked, handler)
        for arrived in dict.fromkeys(waiting):
            signal.raise_signal(arrived)

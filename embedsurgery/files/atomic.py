"""Directories that appear complete or not at all, atomic replacement of files, and fsync.

A new directory is built inside a hidden staging directory beside it, synced, and renamed into place. The staging
directory is locked while its process lives and records which output it is for, so that a later run can recognise and
remove what a killed run left. ``copying.py`` copies the files, ``locking.py`` locks existing checkpoints.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from embedsurgery.errors import CheckpointError, ConfigError, OutputExistsError, warn
from embedsurgery.files.copying import copy_file, remove_tree
from embedsurgery.files.json_reading import NOTE, read_json
from embedsurgery.files.locking import STATE_DIRECTORY
from embedsurgery.files.signals import defer_signals

_STAGING = re.compile(re.escape(STATE_DIRECTORY) + r"-[a-z0-9_]{8}")
"""Names of staging directories."""

_OWNER = "owner.json"
_TREE = "tree"
_DIRECTORY_SYNC_UNSUPPORTED = (errno.EINVAL, errno.EROFS, errno.ENOTSUP, errno.EBADF)
"""Errors of ``fsync`` on a directory, on file systems that do not sync directories."""


@contextmanager
def staged_directory(output: Path) -> Iterator[Path]:
    """Yield a new directory that becomes ``output`` when the block succeeds and is removed when it fails.

    Its parent is a hidden directory beside ``output``, which is removed in either case; the block may put temporary
    files there. Staging directories that killed runs left beside ``output`` are removed first, with a warning.

    Raises:
        OutputExistsError: ``output`` exists already. Nothing is ever overwritten.
        CheckpointError: The parent of ``output`` cannot be written, or the name is too long.
    """
    refuse_existing(output)
    parent = output.absolute().parent
    missing = [folder for folder in (parent, *parent.parents) if not os.path.lexists(folder)]
    created: list[tuple[Path, int]] = []
    try:
        # A Ctrl-C between creating the directory and appending it here would leave one that nobody removes.
        with defer_signals():
            created.append(_create_staging(output, parent))
        staging = created[0][0] / _TREE
        yield staging
        # The order is what makes the output appear whole after a power cut. Every file was fsynced when it was
        # written. First sync the directories: until then their entries may be lost although the files are safe. Then
        # rename, which is one atomic step. Then sync the parent, without which the rename itself may be lost.
        sync_tree(staging)
        with defer_signals():
            # Checked again because rename(2) replaces an empty directory that somebody created meanwhile.
            refuse_existing(output)
            _rename_to_output(staging, output)
            sync_path(parent)
            _remove_staging(created)
    except BaseException:
        with defer_signals():
            _remove_staging(created)
            for folder in missing:
                with contextlib.suppress(OSError):
                    folder.rmdir()
        raise


def _create_staging(output: Path, parent: Path) -> tuple[Path, int]:
    """Create a staging directory with an empty tree in it; return it with the descriptor that locks it."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _refuse_long_name(output, parent)
        stale = remove_stale_staging(parent)
        if stale:
            warn(f"removed unfinished outputs of interrupted runs in {parent}: {', '.join(stale)}")
        hidden, lock = _make_locked_directory(parent)
        try:
            _write_owner(hidden, output.name)
            (hidden / _TREE).mkdir()
        except BaseException:
            _remove_staging([(hidden, lock)])
            raise
    except OSError as error:
        raise CheckpointError(
            "cannot write to the parent directory of the output",
            where=parent,
            expected="a writable directory",
            found="a file" if os.path.isfile(parent) else error.strerror,
        ) from error
    return hidden, lock


def _remove_staging(created: list[tuple[Path, int]]) -> None:
    """Remove staging directories of this process, and empty the list."""
    while created:
        hidden, lock = created.pop()
        with contextlib.suppress(OSError):
            remove_tree(hidden)
        os.close(lock)


def _make_locked_directory(parent: Path) -> tuple[Path, int]:
    """Create a hidden directory and lock it; return both."""
    import tempfile

    while True:
        path = Path(tempfile.mkdtemp(prefix=f"{STATE_DIRECTORY}-", dir=parent))
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        # On a file system without locks no other run can take the lock either, so none removes this directory.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Until it is locked, the directory looks like a stale one, and another run may have removed it.
        if os.path.exists(path):
            return path, lock
        os.close(lock)


def _write_owner(hidden: Path, name: str) -> None:
    """Record in a staging directory which output it is for."""
    body = {"embedsurgery": "staging", "output": name, "pid": os.getpid(), "time": time.time()}
    with open(hidden / _OWNER, "xb") as file:
        file.write(json.dumps(body).encode())
        file.flush()
        os.fsync(file.fileno())


def remove_stale_staging(parent: Path) -> list[str]:
    """Remove staging directories that killed runs left in a directory.

    A directory is removed only if its name and its ``owner.json`` are embedsurgery's, it belongs to this user, and no
    process holds its lock.

    Returns:
        Names of the outputs that the removed directories were for.
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
            output = _read_planned_output(path)
            if output is not None:
                remove_tree(path)
                removed.append(output)
        except OSError:  # another process holds the lock, or the file system has none
            continue
        finally:
            os.close(lock)
    return removed


def _read_planned_output(hidden: Path) -> str | None:
    """Read which output a staging directory is for; None if it is not embedsurgery's."""
    # Killed before the tree was created. The owner file may be half written, so it is not read.
    if set(os.listdir(hidden)) <= {_OWNER}:
        return "an empty directory"
    try:
        body = read_json(hidden / _OWNER, NOTE)
        return str(body["output"]) if body["embedsurgery"] == "staging" else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _rename_to_output(staging: Path, output: Path) -> None:
    try:
        staging.rename(output)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        refuse_existing(output)
        raise


def _refuse_long_name(output: Path, parent: Path) -> None:
    limit, length = os.pathconf(parent, "PC_NAME_MAX"), len(os.fsencode(output.name))
    if length > limit:
        raise CheckpointError(
            "the output's name is too long for its file system",
            where=f"{output.name[:40]}...",
            expected=f"at most {limit} bytes",
            found=length,
        )


def refuse_existing(output: Path) -> None:
    """Refuse an output that exists.

    Raises:
        OutputExistsError: The path exists, also as a dangling link.
        ConfigError: The path is empty or the current directory.
    """
    if str(output) in ("", "."):
        raise ConfigError("the output has no name", expected="a new directory", found=repr(str(output)))
    if os.path.lexists(output):
        raise OutputExistsError(
            "the output exists already", where=output, hint="choose a new directory, or remove this one"
        )


def refuse_inside(output: Path, source: Path) -> None:
    """Refuse an output inside the directory it is made from: it would become part of its own source.

    Raises:
        ConfigError: It is inside, or is the directory itself.
    """
    if source.resolve() in (output.resolve(), *output.resolve().parents):
        raise ConfigError(
            "the output is inside the checkpoint it is made from",
            where=output,
            hint="choose a directory outside the checkpoint",
        )


def replace_files(staged: Mapping[Path, Path], *, backup: bool = True) -> None:
    """Move new files into place over old ones. If one move fails, the earlier ones are undone.

    Args:
        staged: Target, which may exist -> the new file, fsynced and on the same file system.
        backup: Keep the old files until all moves are done, to undo them. With False the caller undoes them.
    """
    kept: dict[Path, Path] = {}
    done: list[Path] = []
    try:
        for target, new in staged.items():
            if backup and target.exists():
                kept[target] = _back_up(target, new)
            os.replace(new, target)
            done.append(target)
    except BaseException:
        for target in done if backup else ():
            if target in kept:
                os.replace(kept.pop(target), target)
            else:
                target.unlink(missing_ok=True)
        raise
    finally:
        for old in kept.values():
            old.unlink(missing_ok=True)
    for parent in {target.parent for target in staged}:
        sync_path(parent)


def _back_up(path: Path, new: Path) -> Path:
    """Keep a file under another name, beside the file that will replace it; return that name."""
    backup = new.with_name(f"{new.name}.before")
    backup.unlink(missing_ok=True)
    link_or_copy(path, backup)
    return backup


def link_or_copy(path: Path, name: Path) -> None:
    """Give a file a second name on its file system: a hard link, or a copy where there are no hard links."""
    try:
        os.link(path, name)
    except OSError as error:
        # These would fail for a copy as well, or overwrite a file.
        if error.errno in (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EEXIST):
            raise
        copy_file(path, name)


def sync_path(path: Path) -> None:
    """Fsync a file or directory.

    Raises:
        OSError: The disk could not write it. Ignored for a directory on a file system that cannot sync directories.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _DIRECTORY_SYNC_UNSUPPORTED or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Fsync a directory and every directory below it. Files must be synced when they are written."""
    for folder, _, _ in os.walk(directory):
        sync_path(Path(folder))

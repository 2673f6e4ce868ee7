"""Directories that appear whole or not at all, and copies that the kernel makes.

Build in a sibling of the target, fsync every file and directory, rename, fsync the parent.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from embedsurgery.errors import CheckpointError, ConfigError, OutputExistsError

Progress = Callable[[int], None]
"""Called with the number of bytes just copied."""

_FICLONE = 0x40049409
_CHUNK = 64 << 20
SKIPPED = (".git",)
"""Directories that are no part of a checkpoint and are not copied."""


@contextmanager
def staged_directory(output: Path) -> Iterator[Path]:
    """A new directory beside ``output``, which becomes it when the block ends well and vanishes when it does not.

    Raises:
        OutputExistsError: ``output`` is there already; nothing is ever written over.
    """
    refuse_existing(output)
    parent = output.absolute().parent
    missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.embedsurgery-", dir=parent))
    except OSError as error:
        found = "a file" if parent.is_file() else error.strerror
        raise CheckpointError("cannot write beside the output", where=parent, found=found,
                              expected="a directory that can be written") from error  # fmt: skip
    try:
        os.chmod(staging, 0o777 & ~_umask())
        yield staging
        sync_tree(staging)
        refuse_existing(output)
        staging.rename(output)
        sync_path(parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def refuse_existing(output: Path) -> None:
    """Raise OutputExistsError where something is there."""
    if str(output) in ("", "."):
        raise ConfigError("the output has no name", expected="a new directory", found=repr(str(output)))
    if os.path.lexists(output):
        raise OutputExistsError("the output exists already", where=output, hint="name a new directory, or remove it")


def refuse_inside(output: Path, source: Path) -> None:
    """Raise ConfigError where an output would lie inside what it is made from, and become a part of it."""
    if source.resolve() in (output.resolve(), *output.resolve().parents):
        raise ConfigError("the output would lie inside the checkpoint it is made from", where=output,
                          hint="name a directory beside it")  # fmt: skip


def replace_files(staged: Mapping[Path, Path]) -> None:
    """Put new files in the places of others: all, or none where one cannot be put. The files are fsynced already.

    Args:
        staged: Target, which may be there already -> the file that becomes it, beside it.
    """
    kept: dict[Path, Path] = {}
    done: list[Path] = []
    try:
        for target, new in staged.items():
            if target.exists():
                kept[target] = _second_name(target)
            os.replace(new, target)
            done.append(target)
    except BaseException:
        for target in done:
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


def _second_name(path: Path) -> Path:
    """A file under another name beside it: a link, or a copy where the file system has none."""
    backup = path.with_name(f".{path.name}.{os.getpid()}.before")
    backup.unlink(missing_ok=True)
    try:
        os.link(path, backup)
    except OSError:
        copy_file(path, backup)
    return backup


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def tree_files(directory: Path) -> list[tuple[str, int]]:
    """(relative path, size) of every file below a directory, links to files and directories followed.

    Raises:
        CheckpointError: Something that is neither file nor directory, or a link that leads nowhere or in a circle.
    """
    found: list[tuple[str, int]] = []
    queue: list[tuple[str, frozenset[str]]] = [("", frozenset({os.path.realpath(directory)}))]
    while queue:
        prefix, above = queue.pop()
        for entry in sorted(os.scandir(directory / prefix), key=lambda e: e.name):
            path = f"{prefix}{entry.name}"
            try:
                status = entry.stat()
            except OSError as error:
                raise CheckpointError("a link that leads nowhere", where=entry.path) from error
            if stat.S_ISDIR(status.st_mode):
                real = os.path.realpath(entry.path)
                if real in above:
                    raise CheckpointError("a link that leads in a circle", where=entry.path)
                if entry.name not in SKIPPED:
                    queue.append((f"{path}/", above | {real}))
            elif stat.S_ISREG(status.st_mode):
                found.append((path, status.st_size))
            else:
                raise CheckpointError("neither a file nor a directory", where=entry.path, hint="remove it first")
    return sorted(found)


def copy_tree(source: Path, target: Path, files: list[tuple[str, int]], progress: Progress | None = None) -> None:
    """Copy files below one directory into another; modes, and the times of files, included."""
    for path, _ in files:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        copy_file(source / path, target / path, progress)
    for folder in {parent for path, _ in files for parent in Path(path).parents} - {Path()}:
        shutil.copymode(source / folder, target / folder)


def link_file(source: Path, target: Path) -> bool:
    """Give a file a second name, where the file system can and its owner may write it; says whether it did."""
    if source.is_symlink() or not source.stat().st_mode & stat.S_IWUSR:
        return False
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        return False
    return True


def copy_file(source: Path, target: Path, progress: Progress | None = None) -> None:
    """Copy a file by the kernel: a shared extent where the file system has it, else a copy within it; fsynced."""
    with open(source, "rb") as a, open(target, "xb") as b:
        size = os.fstat(a.fileno()).st_size
        if not _clone(a.fileno(), b.fileno()):
            _copy_range(a.fileno(), b.fileno(), size, progress)
        elif progress is not None:
            progress(size)
        if os.fstat(b.fileno()).st_size != size:
            raise CheckpointError("a file changed while it was copied", where=source, expected=f"{size} bytes",
                                  found=f"{os.fstat(b.fileno()).st_size} bytes")  # fmt: skip
        os.fsync(b.fileno())
    shutil.copystat(source, target)


@contextmanager
def writable(directory: Path, files: Iterable[str]) -> Iterator[None]:
    """Inside, these files can be written by their owner; afterwards they have the modes they had."""
    modes = {directory / file: stat.S_IMODE((directory / file).stat().st_mode) for file in files}
    for path, mode in modes.items():
        path.chmod(mode | stat.S_IWUSR)
    yield
    for path, mode in modes.items():
        path.chmod(mode)


def _clone(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False
    return True


def _copy_range(source: int, target: int, size: int, progress: Progress | None) -> None:
    done = 0
    while done < size:
        count = _copy_some(source, target, min(_CHUNK, size - done))
        if count == 0:
            return
        done += count
        if progress is not None:
            progress(count)


def copy_range(source: int, target: int, begin: int, end: int) -> None:
    """Append bytes ``begin`` to ``end`` of one open file to another, by the kernel.

    Raises:
        CheckpointError: The source ends before.
    """
    os.lseek(source, begin, os.SEEK_SET)
    while begin < end:
        count = _copy_some(source, target, min(_CHUNK, end - begin))
        if count == 0:
            raise CheckpointError("a file became shorter while it was copied", expected=f"{end} bytes",
                                  found=f"{begin} bytes", hint="is something else writing it?")  # fmt: skip
        begin += count


def _copy_some(source: int, target: int, size: int) -> int:
    try:
        return os.copy_file_range(source, target, size)
    except OSError:  # across file systems on old kernels, or a file system without it
        return os.sendfile(target, source, None, size)


def sync_path(path: Path) -> None:
    """Fsync a file or directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems do not sync directories
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Fsync every directory below and including this one; files are synced as they are written."""
    for folder, _, _ in os.walk(directory):
        sync_path(Path(folder))

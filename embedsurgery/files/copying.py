"""Copies that the kernel makes, of files and of whole trees, which keep what a file is."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from embedsurgery.errors import CheckpointError, named

Progress = Callable[[int], None]
"""Called with the number of bytes just copied."""

_FICLONE = 0x40049409
_CHUNK = 64 << 20
_NOT_HERE = (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF)
"""What ``copy_file_range`` says where a kernel or a file system cannot do it, and a plain copy can."""

SKIPPED = (".git",)
"""Directories that are no part of a checkpoint and are not copied."""


@dataclass(frozen=True)
class Tree:
    """What lies below a directory; all paths are relative to it, with forward slashes.

    Attributes:
        files: (path, size) of each file; a link to a file stands for what it leads to.
        folders: Directories, each after the one it lies in.
        links: (path, target) of each link to a directory: they are kept as links, and not followed.
    """

    files: tuple[tuple[str, int], ...]
    folders: tuple[str, ...]
    links: tuple[tuple[str, str], ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size in self.files)


def read_tree(directory: Path, without: Collection[str] = ()) -> Tree:
    """What lies below a directory.

    Args:
        directory: Where.
        without: Paths of files and directories that are passed over.

    Raises:
        CheckpointError: Something that is neither file nor directory, or a link that leads nowhere.
    """
    files: list[tuple[str, int]] = []
    folders: list[str] = []
    links: list[tuple[str, str]] = []
    queue = [""]
    while queue:
        prefix = queue.pop()
        with os.scandir(directory / prefix) as entries:
            for entry in entries:
                path = f"{prefix}{entry.name}"
                if path in without:
                    continue
                try:
                    status = entry.stat()
                except OSError as error:
                    raise CheckpointError("a link that leads nowhere", where=entry.path) from error
                if stat.S_ISDIR(status.st_mode):
                    if entry.is_symlink():
                        links.append((path, os.readlink(entry.path)))
                    elif entry.name not in SKIPPED:
                        folders.append(path)
                        queue.append(f"{path}/")
                elif stat.S_ISREG(status.st_mode):
                    files.append((path, status.st_size))
                else:
                    raise CheckpointError("neither a file nor a directory", where=entry.path, hint="remove it first")
    return Tree(tuple(sorted(files)), tuple(sorted(folders)), tuple(sorted(links)))


def tree_files(directory: Path) -> list[tuple[str, int]]:
    """(relative path, size) of every file below a directory; links to files are followed, those to directories not."""
    return list(read_tree(directory).files)


def copy_tree(
    source: Path,
    target: Path,
    tree: Tree,
    progress: Progress | None = None,
    *,
    place: Callable[[str], bool] = lambda path: False,
) -> None:
    """Copy what lies below one directory into another that is there; modes, and the times of files, included.

    Args:
        source: What ``tree`` was read of.
        target: An empty directory.
        tree: What to copy.
        progress: Called as files are copied.
        place: Called with a file's path, to put it there in another way; says whether it did.
    """
    for folder in tree.folders:
        (target / folder).mkdir()
    for path, link in tree.links:
        (target / path).symlink_to(_link_from(source, path, link))
    for path, size in tree.files:
        if not place(path):
            copy_file(source / path, target / path, progress)
        elif progress is not None:
            progress(size)
    from shutil import copymode

    for folder in reversed(tree.folders):
        copymode(source / folder, target / folder)


def _link_from(source: Path, path: str, link: str) -> str:
    """What a link of a copy says: the same where that leads to the same place of the copy, else the place it led to."""
    there, top = os.path.realpath(source / path), os.path.realpath(source)
    if os.path.commonpath([there, top]) != top:
        return there
    return link if not os.path.isabs(link) else os.path.relpath(there, os.path.realpath((source / path).parent))


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
    """Copy a file by the kernel: a shared extent where the file system has it, else a copy within it; fsynced.

    Raises:
        CheckpointError: The source became shorter, or longer, meanwhile.
        FileExistsError: The target exists.
    """
    from shutil import copystat

    with named(target), open(source, "rb", buffering=0) as a, open(target, "xb", buffering=0) as b:
        size = os.fstat(a.fileno()).st_size
        if not _clone(a.fileno(), b.fileno()):
            _copy_all(a.fileno(), b.fileno(), size, progress)
        elif progress is not None:
            progress(size)
        for end in (os.fstat(a.fileno()).st_size, os.fstat(b.fileno()).st_size):
            if end != size:
                raise CheckpointError(
                    "a file changed while it was copied",
                    where=source,
                    expected=f"{size} bytes",
                    found=f"{end} bytes",
                    hint="is something else writing it?",
                )
        copystat(source, target)
        os.fsync(b.fileno())


def _clone(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False
    return True


def _copy_all(source: int, target: int, size: int, progress: Progress | None) -> None:
    """Copy a file's bytes and leave its holes: a sparse file stays one."""
    for begin, end in _extents(source, size):
        os.lseek(target, begin, os.SEEK_SET)
        copy_range(source, target, begin, end, progress)
    os.ftruncate(target, max(size, os.fstat(target).st_size))


def _extents(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """The parts of a file that hold data; all of it where the file system does not say."""
    position = 0
    while position < size:
        try:
            begin = os.lseek(descriptor, position, os.SEEK_DATA)
            end = os.lseek(descriptor, begin, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole follows
                return
            begin, end = position, size
        yield begin, min(end, size)
        position = max(end, begin + 1)


def copy_range(source: int, target: int, begin: int, end: int, progress: Progress | None = None) -> None:
    """Copy bytes ``begin`` to ``end`` of one open file to where another stands, by the kernel.

    Raises:
        CheckpointError: The source ends before.
    """
    os.lseek(source, begin, os.SEEK_SET)
    while begin < end:
        count = _copy_some(source, target, min(_CHUNK, end - begin))
        if count == 0:
            raise CheckpointError(
                "a file became shorter while it was copied",
                expected=f"{end} bytes",
                found=f"{begin} bytes",
                hint="is something else writing it?",
            )
        begin += count
        if progress is not None:
            progress(count)


def _copy_some(source: int, target: int, size: int) -> int:
    try:
        return os.copy_file_range(source, target, size)
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
        return os.sendfile(target, source, None, size)


@contextmanager
def writable(directory: Path, files: Iterable[str]) -> Iterator[None]:
    """Inside, these files can be written by their owner; afterwards they have the modes they had."""
    modes = {directory / file: stat.S_IMODE((directory / file).stat().st_mode) for file in files}
    for path, mode in modes.items():
        path.chmod(mode | stat.S_IWUSR)
    yield
    for path, mode in modes.items():
        path.chmod(mode)


def remove_tree(directory: Path) -> None:
    """Remove a directory of our own with all in it, directories that forbid it included; links are not followed."""
    for folder, _, _ in os.walk(directory):
        try:
            mode = os.lstat(folder).st_mode
            if mode & stat.S_IRWXU != stat.S_IRWXU:
                os.chmod(folder, mode | stat.S_IRWXU)
        except OSError:
            continue
    from shutil import rmtree

    rmtree(directory)

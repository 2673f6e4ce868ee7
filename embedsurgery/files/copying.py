"""Copies files and directory trees inside the kernel, and keeps modes, times, holes and links."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from embedsurgery.errors import CheckpointError, name_os_errors

Progress = Callable[[int], None]
"""Called with the number of bytes just copied."""

_FICLONE = 0x40049409
_CHUNK = 64 << 20
_RANGE_UNSUPPORTED = (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF)
"""Errors of ``copy_file_range`` where the kernel or file system cannot do it, but a plain copy can."""

SKIPPED = (".git",)
"""Directories that are not part of a checkpoint and are not copied."""


@dataclass(frozen=True)
class Tree:
    """The contents of a directory. All paths are relative to it, with forward slashes.

    Attributes:
        files: (path, size) of each file; a link to a file is listed as that file.
        folders: Directories, parents before children.
        links: (path, target) of each link to a directory. Such links are kept, not followed.
    """

    files: tuple[tuple[str, int], ...]
    folders: tuple[str, ...]
    links: tuple[tuple[str, str], ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size in self.files)


def read_tree(directory: Path, without: Collection[str] = ()) -> Tree:
    """List the contents of a directory.

    Args:
        directory: The directory.
        without: Relative paths of files and directories to leave out.

    Raises:
        CheckpointError: It contains a dangling link, or something that is neither a file nor a directory.
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
                    raise CheckpointError("dangling link", where=entry.path, hint="remove it first") from error
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


def list_files(directory: Path) -> list[tuple[str, int]]:
    """List (relative path, size) of every file below a directory. Links to files are followed, others are not."""
    return list(read_tree(directory).files)


def copy_tree(
    source: Path,
    target: Path,
    tree: Tree,
    progress: Progress | None = None,
    *,
    place: Callable[[str], bool] = lambda path: False,
) -> None:
    """Copy the contents of a directory into an empty one, with modes and with the times of files.

    Args:
        source: The directory that ``tree`` was read from.
        target: An empty directory.
        tree: What to copy.
        progress: Called as files are copied.
        place: Called with each file's path. It may create the file in another way and return True; otherwise the file
            is copied.
    """
    for folder in tree.folders:
        (target / folder).mkdir()
    for path, link in tree.links:
        (target / path).symlink_to(_link_target(source, path, link))
    for path, size in tree.files:
        if not place(path):
            copy_file(source / path, target / path, progress)
        elif progress is not None:
            progress(size)
    from shutil import copymode

    # Modes come last and children first: a directory may be read-only.
    for folder in reversed(tree.folders):
        copymode(source / folder, target / folder)


def _link_target(source: Path, path: str, link: str) -> str:
    """Return the target of a copied link to a directory.

    A link inside the tree points to the same place in the copy. A link out of the tree becomes absolute, because the
    copy may lie elsewhere and a relative path would miss.
    """
    end, top = os.path.realpath(source / path), os.path.realpath(source)
    if os.path.commonpath([end, top]) != top:
        return end
    return link if not os.path.isabs(link) else os.path.relpath(end, os.path.realpath((source / path).parent))


def link_file(source: Path, target: Path) -> bool:
    """Create a hard link to a file; return False if that is not possible.

    Links, and files that their owner may not write, are not linked.
    """
    if source.is_symlink() or not source.stat().st_mode & stat.S_IWUSR:
        return False
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        return False
    return True


def copy_file(source: Path, target: Path, progress: Progress | None = None) -> None:
    """Copy a file with its mode and times, and fsync the copy. Extents are shared where the file system can.

    Raises:
        CheckpointError: The source changed its size during the copy.
        FileExistsError: The target exists.
    """
    from shutil import copystat

    with name_os_errors(target), open(source, "rb", buffering=0) as a, open(target, "xb", buffering=0) as b:
        size = os.fstat(a.fileno()).st_size
        if not _clone(a.fileno(), b.fileno()):
            _copy_extents(a.fileno(), b.fileno(), size, progress)
        elif progress is not None:
            progress(size)
        for end in (os.fstat(a.fileno()).st_size, os.fstat(b.fileno()).st_size):
            if end != size:
                raise CheckpointError(
                    "file changed while it was copied",
                    where=source,
                    expected=f"{size} bytes",
                    found=f"{end} bytes",
                    hint="stop the process that writes it",
                )
        copystat(source, target)
        os.fsync(b.fileno())


def _clone(source: int, target: int) -> bool:
    """Let the target share the source's extents (a reflink on btrfs, XFS and others); return False if it cannot."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False
    return True


def _copy_extents(source: int, target: int, size: int, progress: Progress | None) -> None:
    """Copy the parts of a file that hold data, so that a sparse file stays sparse."""
    for begin, end in _data_extents(source, size):
        os.lseek(target, begin, os.SEEK_SET)
        copy_range(source, target, begin, end, progress)
    # A hole at the end was not copied: extend the file to its full size.
    os.ftruncate(target, max(size, os.fstat(target).st_size))


def _data_extents(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of the parts of a file that hold data; one part where the file system cannot tell."""
    position = 0
    while position < size:
        try:
            begin = os.lseek(descriptor, position, os.SEEK_DATA)
            end = os.lseek(descriptor, begin, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole follows
                return
            begin, end = position, size
        yield begin, min(end, size)
        position = max(end, begin + 1)


def copy_range(source: int, target: int, begin: int, end: int, progress: Progress | None = None) -> None:
    """Copy bytes ``begin`` to ``end`` of an open file to the current position of another.

    Raises:
        CheckpointError: The source ends before ``end``.
    """
    os.lseek(source, begin, os.SEEK_SET)
    while begin < end:
        count = _copy_chunk(source, target, min(_CHUNK, end - begin))
        if count == 0:
            raise CheckpointError(
                "file became shorter while it was copied",
                expected=f"{end} bytes",
                found=f"{begin} bytes",
                hint="stop the process that writes it",
            )
        begin += count
        if progress is not None:
            progress(count)


def _copy_chunk(source: int, target: int, size: int) -> int:
    try:
        return os.copy_file_range(source, target, size)
    except OSError as error:
        if error.errno not in _RANGE_UNSUPPORTED:
            raise
        return os.sendfile(target, source, None, size)


@contextmanager
def make_writable(directory: Path, files: Iterable[str]) -> Iterator[None]:
    """Let the owner write these files inside the block; restore their modes when it succeeds."""
    modes = {directory / file: stat.S_IMODE((directory / file).stat().st_mode) for file in files}
    for path, mode in modes.items():
        path.chmod(mode | stat.S_IWUSR)
    # Not in a finally: the files lie in a staging directory, which is removed when the block fails.
    yield
    for path, mode in modes.items():
        path.chmod(mode)


def remove_tree(directory: Path) -> None:
    """Remove a directory that embedsurgery made, with all its contents. Links are not followed.

    Directories without write permission are removed too: copies keep the modes of their sources.
    """
    for folder, _, _ in os.walk(directory):
        try:
            mode = os.lstat(folder).st_mode
            if mode & stat.S_IRWXU != stat.S_IRWXU:
                os.chmod(folder, mode | stat.S_IRWXU)
        except OSError:
            continue
    from shutil import rmtree

    rmtree(directory)

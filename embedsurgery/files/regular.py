"""Regular files opened, read and written exactly."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from embedsurgery.errors import CheckpointError


@contextmanager
def open_regular(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """A file descriptor of a regular file; anything else (a FIFO, a device, a directory) is refused at once.

    Raises:
        CheckpointError: The path is missing, unreadable or no regular file.
    """
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise CheckpointError(
            "cannot open file", where=path, found=error.strerror, hint="is it there, and may you read it?"
        ) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CheckpointError("not a regular file", where=path, hint="put the weights themselves there")
        yield descriptor
    finally:
        os.close(descriptor)


def pread_exactly(descriptor: int, size: int, offset: int) -> bytes:
    """``size`` bytes at ``offset``.

    Raises:
        CheckpointError: The file ends before.
    """
    parts, got = [], 0
    while got < size:
        part = os.pread(descriptor, min(size - got, 1 << 30), offset + got)
        if not part:
            raise CheckpointError(
                "a file became shorter while it was read",
                expected=f"{size} bytes at {offset}",
                found=f"{got} bytes",
                hint="is something else writing it?",
            )
        parts.append(part)
        got += len(part)
    return b"".join(parts)


def pwrite_exactly(descriptor: int, data: bytes, offset: int) -> None:
    """All of ``data`` at ``offset``, however often the kernel takes only a part."""
    view = memoryview(data)
    while view:
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done

"""Opens regular files only, and reads and writes exactly as many bytes as asked for."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from embedsurgery.errors import CheckpointError


@contextmanager
def open_regular(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Open a regular file and yield its descriptor.

    Args:
        path: The file.
        flags: Of ``os.open``.

    Raises:
        CheckpointError: The path is missing, unreadable or not a regular file.
    """
    try:
        # O_NONBLOCK: opening a FIFO for reading would otherwise wait for a writer.
        descriptor = os.open(path, flags | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise CheckpointError(
            "cannot open file", where=path, found=error.strerror, hint="check that it exists and is readable"
        ) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CheckpointError("not a regular file", where=path, hint="replace it with the file itself")
        yield descriptor
    finally:
        os.close(descriptor)


def pread_exactly(descriptor: int, size: int, offset: int) -> bytes:
    """Read ``size`` bytes at ``offset``.

    Raises:
        CheckpointError: The file ends earlier.
    """
    parts, got = [], 0
    while got < size:
        part = os.pread(descriptor, min(size - got, 1 << 30), offset + got)
        if not part:
            raise CheckpointError(
                "file became shorter while it was read",
                expected=f"{size} bytes at {offset}",
                found=f"{got} bytes",
                hint="stop the process that writes it",
            )
        parts.append(part)
        got += len(part)
    return b"".join(parts)


def pwrite_exactly(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of ``data`` at ``offset``."""
    view = memoryview(data)
    while view:
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done

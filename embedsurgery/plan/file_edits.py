"""The edits that a journal is made of: bytes of a file put back, and files put back whole.

They name files and bytes and no tables, because what they put right may be a checkpoint that cannot be read as one.
They are written down in the form that ``plan.py`` gives to all edits; ``journal.py`` makes and does them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from embedsurgery.files.regular import open_regular, pread_exactly
from embedsurgery.files.safetensors import MAX_HEADER, Entry, TensorSource
from embedsurgery.tensors.raw import RawArray

CHUNK = 8 << 20
"""Bytes that are held at a time."""


@dataclass(frozen=True)
class FileState:
    """What tells a file from others, even when rows in it have changed.

    Attributes:
        size: Bytes.
        head: sha256 (hex) of a weight file's header, or of all of another file.
        mtime_ns: When it was last changed, in nanoseconds.
    """

    size: int
    head: str
    mtime_ns: int

    @classmethod
    def of(cls, path: Path, name: str | None = None) -> FileState:
        """The state of a file as it is.

        Args:
            path: Where it is.
            name: What it is called in the checkpoint, where it has another name now.

        Raises:
            CheckpointError: It is not there, or no regular file.
        """
        with open_regular(path, os.O_RDONLY | os.O_NOFOLLOW) as descriptor:
            status = os.fstat(descriptor)
            end = status.st_size
            if (name or path.name).endswith(".safetensors") and end >= 8:
                end = min(end, 8 + int.from_bytes(pread_exactly(descriptor, 8, 0), "little"), MAX_HEADER)
            digest = hashlib.sha256()
            for start in range(0, end, CHUNK):
                digest.update(pread_exactly(descriptor, min(CHUNK, end - start), start))
        return cls(status.st_size, digest.hexdigest(), status.st_mtime_ns)

    def same_file(self, other: FileState) -> bool:
        """Whether both are one file, whatever its rows are."""
        return (self.size, self.head) == (other.size, other.head)


@dataclass(frozen=True)
class SetBytes:
    """Bytes of a file become others, where they lie.

    Attributes:
        path: Relative to the checkpoint, with forward slashes.
        ranges: (begin, end) in bytes from the start of the file, ascending, apart.
        state: The file's, as it was and will be.
        chunks: Called for the new bytes of all ranges, in order, in pieces of bounded size.
    """

    path: str
    ranges: tuple[tuple[int, int], ...]
    state: FileState
    chunks: Callable[[], Iterator[bytes]]

    @classmethod
    def as_now(cls, directory: Path, path: str, ranges: Sequence[tuple[int, int]]) -> SetBytes:
        """The edit that puts back what is there now; it is read when it is written down."""
        file = directory / path

        def chunks() -> Iterator[bytes]:
            with open_regular(file) as descriptor:
                for begin, end in ranges:
                    for start in range(begin, end, CHUNK):
                        yield pread_exactly(descriptor, min(CHUNK, end - start), start)

        return cls(path, tuple(ranges), FileState.of(file), chunks)

    @property
    def size(self) -> int:
        """Bytes of all ranges."""
        return sum(end - begin for begin, end in self.ranges)

    def describe(self) -> str:
        """One line for a person."""
        return f"put {self.size:,} bytes back into {self.path}"


@dataclass(frozen=True)
class PutFile:
    """A file takes its place again, from where it was kept.

    Attributes:
        path: Relative to the checkpoint, with forward slashes.
        kept: The name under which it was kept, in the directory of the journal.
        state: Its state.
    """

    path: str
    kept: str
    state: FileState

    def describe(self) -> str:
        """One line for a person."""
        return f"put {self.path} back"


FileEdit = SetBytes | PutFile


def encode(edit: FileEdit, prefix: str, tensors: dict[str, TensorSource]) -> dict[str, Any]:
    """The JSON part of an edit; its numbers go into ``tensors`` under names that start with ``prefix``."""
    if isinstance(edit, PutFile):
        return {"edit": "PutFile", "path": edit.path, "kept": edit.kept, "state": asdict(edit.state)}
    ends = [end for part in edit.ranges for end in part]
    tensors[prefix + "ranges"] = TensorSource.of(RawArray.of_integers(ends, 2))
    tensors[prefix + "bytes"] = TensorSource("U8", (edit.size,), edit.chunks())
    return {"edit": "SetBytes", "path": edit.path, "state": asdict(edit.state)}


def decode(body: Mapping[str, Any], prefix: str, path: Path, entries: Mapping[str, Entry]) -> FileEdit | None:
    """An edit from its JSON part and the file it lies in, whose bytes stay there until they are asked for.

    Returns:
        None for an edit of another kind.

    Raises:
        ValueError: It contradicts itself, or another of Python's errors for values of the wrong kind.
    """
    if body["edit"] == "PutFile":
        return PutFile(str(body["path"]), str(body["kept"]), _state(body["state"]))
    if body["edit"] != "SetBytes":
        return None
    entry, data = entries[prefix + "ranges"], entries[prefix + "bytes"]
    if (entry.dtype, len(entry.shape), entry.shape[-1], data.dtype, len(data.shape)) != ("I64", 2, 2, "U8", 1):
        raise ValueError("ranges or bytes of another shape")
    with open_regular(path) as descriptor:
        raw = RawArray(entry.dtype, entry.shape, pread_exactly(descriptor, entry.end - entry.begin, entry.begin))
    numbers, state = raw.integers(), _state(body["state"])
    ranges = tuple(zip(numbers[::2], numbers[1::2], strict=True))
    ends = [0, *numbers, state.size]
    if ends != sorted(ends) or sum(end - begin for begin, end in ranges) != data.shape[0]:
        raise ValueError("ranges that overlap, or not of as many bytes")

    def chunks() -> Iterator[bytes]:
        with open_regular(path) as descriptor:
            for start in range(data.begin, data.end, CHUNK):
                yield pread_exactly(descriptor, min(CHUNK, data.end - start), start)

    return SetBytes(str(body["path"]), ranges, state, chunks)


def _state(body: Mapping[str, Any]) -> FileState:
    size, time = body["size"], body["mtime_ns"]
    if type(size) is not int or type(time) is not int or not (0 <= size < 2**63 and -(2**63) <= time < 2**63):
        raise ValueError("the state of a file is no numbers")
    return FileState(size, str(body["head"]), time)

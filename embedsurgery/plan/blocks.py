"""The rows of a whole table as blocks of bounded size: computed, in memory or in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from embedsurgery.files.regular import open_regular, pread_exactly
from embedsurgery.files.safetensors import Entry
from embedsurgery.tensors.raw import ITEMSIZE, RawArray

BLOCK_BYTES = 8 << 20
"""Approximate size of a block in bytes: how much of a table is in memory at a time."""

BlockFunction = Callable[[int, int, RawArray], RawArray]
"""Called with start, stop and the current rows ``start:stop``; returns the new ones, (stop - start, D)."""


@dataclass(frozen=True)
class Blocks:
    """The new rows of a whole table, block by block.

    Attributes:
        shape: (V, D).
        dtype: Dtype of the blocks that ``block`` returns.
        block: Called as ``block(start, stop, current)`` with the table's current rows ``start:stop``; returns the new
            ones, (stop - start, D).
        stored: Whether the blocks are in memory or in a file and do not depend on ``current``, so that they can be
            saved.
    """

    shape: tuple[int, int]
    dtype: str
    block: BlockFunction
    stored: bool = False

    @classmethod
    def of(cls, rows: RawArray) -> Blocks:
        """Blocks of rows in memory, (V, D)."""
        return cls((rows.shape[0], rows.shape[1]), rows.dtype, _InMemory(rows), stored=True)

    @classmethod
    def in_file(cls, path: Path, entry: Entry) -> Blocks:
        """Blocks of a tensor (V, D) in a safetensors file, which are read when they are needed."""
        rows, columns = entry.shape
        return cls((rows, columns), entry.dtype, _InFile(path, entry), stored=True)

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of consecutive blocks that cover all rows."""
        yield from spans(self.shape[0], self.shape[1] * ITEMSIZE[self.dtype])

    def read_rows(self, start: int, stop: int) -> RawArray:
        """Read rows ``start:stop`` of stored blocks."""
        return self.block(start, stop, RawArray(self.dtype, (0, self.shape[1]), b""))


@dataclass(frozen=True)
class _InMemory:
    rows: RawArray

    def __call__(self, start: int, stop: int, current: RawArray) -> RawArray:
        pitch = self.rows.shape[1] * ITEMSIZE[self.rows.dtype]
        part = self.rows.data[start * pitch : stop * pitch]
        return RawArray(self.rows.dtype, (stop - start, self.rows.shape[1]), part)


@dataclass(frozen=True, eq=False)
class _InFile:
    """Blocks in a file.

    The temporary file of an undo is removed when this object is (``stores/apply.py``). So a deep copy is the same
    object, and a pickle, which may outlive the file, holds the rows.
    """

    path: Path
    entry: Entry

    def __call__(self, start: int, stop: int, current: RawArray | None = None) -> RawArray:
        columns = self.entry.shape[1]
        pitch = columns * ITEMSIZE[self.entry.dtype]
        with open_regular(self.path) as descriptor:
            data = pread_exactly(descriptor, (stop - start) * pitch, self.entry.begin + start * pitch)
        return RawArray(self.entry.dtype, (stop - start, columns), data)

    def __deepcopy__(self, memo: object) -> _InFile:
        return self

    def __reduce__(self) -> tuple[type[_InMemory], tuple[RawArray]]:
        return _InMemory, (self(0, self.entry.shape[0]),)


def spans(rows: int, pitch: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of consecutive blocks of about `BLOCK_BYTES` bytes, for rows of ``pitch`` bytes."""
    step = max(1, BLOCK_BYTES // max(pitch, 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)

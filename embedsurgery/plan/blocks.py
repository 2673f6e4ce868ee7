"""All rows of a table as blocks of bounded size, from a computation, from memory or from a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from embedsurgery.files.regular import open_regular, pread_exactly
from embedsurgery.files.safetensors import Entry
from embedsurgery.tensors.raw import ITEMSIZE, RawArray

BLOCK_BYTES = 8 << 20
"""About how many bytes of a table are held at a time."""

BlockFunction = Callable[[int, int, RawArray], RawArray]
"""Called with start, stop and the rows ``start:stop`` as they are; returns the new ones, (stop - start, D)."""


@dataclass(frozen=True)
class Blocks:
    """All rows of a table, made block by block.

    Attributes:
        shape: (V, D).
        dtype: Of the blocks that `block` returns.
        block: Called as ``block(start, stop, current)`` with the table's rows ``start:stop`` as they are now;
            returns the new ones, (stop - start, D).
        stored: Whether the blocks come from a file or from memory, whatever ``current`` is, so that they can be saved.
    """

    shape: tuple[int, int]
    dtype: str
    block: BlockFunction
    stored: bool = False

    @classmethod
    def of(cls, rows: RawArray) -> Blocks:
        """All rows, held in memory."""
        return cls((rows.shape[0], rows.shape[1]), rows.dtype, _InMemory(rows), stored=True)

    @classmethod
    def in_file(cls, path: Path, entry: Entry) -> Blocks:
        """All rows, in a tensor of a safetensors file that is read block by block."""
        rows, columns = entry.shape
        return cls((rows, columns), entry.dtype, _InFile(path, entry), stored=True)

    def spans(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of consecutive blocks of bounded size that cover all rows."""
        yield from spans(self.shape[0], self.shape[1] * ITEMSIZE[self.dtype])

    def saved_rows(self, start: int, stop: int) -> RawArray:
        """Rows of stored blocks."""
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
    """Blocks in a file. A copy is the same object, since the file may live only as long as it; a pickle has values."""

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
    """(start, stop) of consecutive blocks of about `BLOCK_BYTES` bytes, for rows of ``pitch`` bytes."""
    step = max(1, BLOCK_BYTES // max(pitch, 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)

"""Reads and writes rows of one tensor in an open safetensors file, where they lie.

``shards.py`` opens the files and decides which tensors are written. numpy is imported only for transposed tables, whose
values have to be rearranged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from embedsurgery.files.regular import pread_exactly, pwrite_exactly
from embedsurgery.files.safetensors import Entry
from embedsurgery.plan.edit import Range
from embedsurgery.tensors.raw import ITEMSIZE, RawArray

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class TensorRows:
    """The rows of a table in an open file.

    Attributes:
        file: A file descriptor.
        entry: The tensor, (V, D) or, if transposed, (D, V).
        transposed: Whether a row is a column of the tensor. Then its values are spread over the whole tensor, and
            every access reads or writes D runs of values.
    """

    file: int
    entry: Entry
    transposed: bool

    def read(self, indices: Sequence[int]) -> RawArray:
        """Read rows, (K, D), in the order of the indices."""
        if self.transposed:
            import numpy as np

            at = np.asarray(indices, dtype=np.int64)
            rows = np.stack([self._read_run(d)[at] for d in range(self._width)], axis=1)
            return RawArray(self.entry.dtype, (len(indices), self._width), np.ascontiguousarray(rows).tobytes())
        pitch = self._pitch
        data = b"".join(pread_exactly(self.file, pitch, self.entry.begin + index * pitch) for index in indices)
        return RawArray(self.entry.dtype, (len(indices), self._width), data)

    def write(self, indices: Sequence[int], rows: RawArray) -> None:
        """Write rows, (K, D) in the dtype of the tensor."""
        if self.transposed:
            import numpy as np

            at = np.asarray(indices, dtype=np.int64)
            for d in range(self._width):
                run = self._read_run(d).copy()
                run[at] = rows.bits[:, d]
                pwrite_exactly(self.file, run.tobytes(), self._begin_of_run(d))
            return
        pitch = self._pitch
        for position, index in enumerate(indices):
            row = rows.data[position * pitch : (position + 1) * pitch]
            pwrite_exactly(self.file, row, self.entry.begin + index * pitch)

    def read_block(self, start: int, stop: int) -> RawArray:
        """Read consecutive rows, (stop - start, D)."""
        if self.transposed:
            import numpy as np

            rows = np.stack([self._read_run(d, start, stop) for d in range(self._width)], axis=1)
            return RawArray(self.entry.dtype, (stop - start, self._width), np.ascontiguousarray(rows).tobytes())
        data = pread_exactly(self.file, (stop - start) * self._pitch, self.entry.begin + start * self._pitch)
        return RawArray(self.entry.dtype, (stop - start, self._width), data)

    def write_block(self, start: int, rows: RawArray) -> None:
        """Write consecutive rows, (N, D) in the dtype of the tensor."""
        if self.transposed:
            self.write(range(start, start + rows.shape[0]), rows)
        else:
            pwrite_exactly(self.file, rows.data, self.entry.begin + start * self._pitch)

    @property
    def _width(self) -> int:
        return self.entry.shape[0 if self.transposed else 1]

    @property
    def _pitch(self) -> int:
        """Bytes of a row of a table that is not transposed."""
        return self._width * ITEMSIZE[self.entry.dtype]

    def _begin_of_run(self, d: int, start: int = 0) -> int:
        return self.entry.begin + (d * self.entry.shape[1] + start) * ITEMSIZE[self.entry.dtype]

    def _read_run(
        self, d: int, start: int = 0, stop: int | None = None
    ) -> np.ndarray[tuple[int], np.dtype[np.generic]]:
        """Read the d-th value of rows ``start:stop`` of a transposed table. They are contiguous in the file."""
        count = (self.entry.shape[1] if stop is None else stop) - start
        data = pread_exactly(self.file, count * ITEMSIZE[self.entry.dtype], self._begin_of_run(d, start))
        return RawArray(self.entry.dtype, (count,), data).bits


def row_ranges(entry: Entry, pitch: int, indices: Sequence[int]) -> list[Range]:
    """Return the byte ranges in a file of rows of ``pitch`` bytes."""
    return [(entry.begin + i * pitch, entry.begin + (i + 1) * pitch) for i in indices]

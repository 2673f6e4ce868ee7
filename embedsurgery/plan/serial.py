"""Helpers to write and read the tensors of a plan file.

Each edit defines its JSON and tensors (``encode``, ``decode``); ``plan.py`` writes and reads the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedsurgery.files.regular import open_regular, pread_exactly
from embedsurgery.files.safetensors import Entry, TensorSource
from embedsurgery.tensors.raw import RawArray

CHUNK = 8 << 20
"""Bytes that are read at a time."""


def integers_source(indices: tuple[int, ...]) -> TensorSource:
    """Create an I64 tensor of row numbers to write."""
    return TensorSource.of(RawArray.of_integers(indices))


def bytes_source(data: bytes) -> TensorSource:
    """Create a U8 tensor of bytes to write."""
    return TensorSource("U8", (len(data),), (data,))


def string_or_none(value: Any) -> str | None:
    """Return a JSON value that must be a string or null.

    Raises:
        ValueError: It is something else.
    """
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{value!r} is not a string")
    return value


@dataclass(frozen=True)
class PlanFile:
    """A plan file that is being read.

    Attributes:
        path: The file.
        entries: Its tensors.
    """

    path: Path
    entries: Mapping[str, Entry]

    def tensor(self, name: str) -> RawArray:
        """Read a tensor."""
        entry = self.entries[name]
        with open_regular(self.path) as descriptor:
            return RawArray(entry.dtype, entry.shape, pread_exactly(descriptor, entry.end - entry.begin, entry.begin))

    def integers(self, name: str) -> tuple[int, ...]:
        """Read row numbers.

        Raises:
            ValueError: The tensor is not I64 (K,).
        """
        indices = self.tensor(name)
        if indices.dtype != "I64" or len(indices.shape) != 1:
            raise ValueError(f"indices must be I64 (K,), not {indices!r}")
        return indices.integers()

    def data(self, name: str) -> bytes:
        """Read bytes.

        Raises:
            ValueError: The tensor is not U8 (N,).
        """
        raw = self.tensor(name)
        if raw.dtype != "U8" or len(raw.shape) != 1:
            raise ValueError(f"bytes must be U8 (N,), not {raw!r}")
        return raw.data

    def chunks(self, name: str) -> Callable[[], Iterator[bytes]]:
        """Return a function that reads a tensor's bytes in pieces of bounded size."""
        path, entry = self.path, self.entries[name]

        def read() -> Iterator[bytes]:
            with open_regular(path) as descriptor:
                for start in range(entry.begin, entry.end, CHUNK):
                    yield pread_exactly(descriptor, min(CHUNK, entry.end - start), start)

        return read

"""How plans and undos are written to a file: JSON in its metadata, numbers as its tensors.

What the JSON of one edit says is the edit's (``encode``, ``decode``); what frames them is ``plan.py``'s.
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
"""Bytes that are held at a time."""


def integers_source(indices: tuple[int, ...]) -> TensorSource:
    """Row numbers, as a tensor to write."""
    return TensorSource.of(RawArray.of_integers(indices))


def bytes_source(data: bytes) -> TensorSource:
    """Bytes, as a tensor to write."""
    return TensorSource("U8", (len(data),), (data,))


def string_or_none(value: Any) -> str | None:
    """A value from JSON that is a string or null.

    Raises:
        ValueError: It is something else.
    """
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{value!r} is not a string")
    return value


@dataclass(frozen=True)
class PlanFile:
    """The file of a plan while it is read.

    Attributes:
        path: The file.
        entries: Its tensors.
    """

    path: Path
    entries: Mapping[str, Entry]

    def tensor(self, name: str) -> RawArray:
        """A tensor, whole."""
        entry = self.entries[name]
        with open_regular(self.path) as descriptor:
            return RawArray(entry.dtype, entry.shape, pread_exactly(descriptor, entry.end - entry.begin, entry.begin))

    def integers(self, name: str) -> tuple[int, ...]:
        """Row numbers.

        Raises:
            ValueError: The tensor is not int64 (K,).
        """
        indices = self.tensor(name)
        if indices.dtype != "I64" or len(indices.shape) != 1:
            raise ValueError(f"indices are {indices!r}")
        return indices.integers()

    def data(self, name: str) -> bytes:
        """Bytes that lie in a tensor.

        Raises:
            ValueError: The tensor is not uint8 (N,).
        """
        raw = self.tensor(name)
        if raw.dtype != "U8" or len(raw.shape) != 1:
            raise ValueError(f"bytes are {raw!r}")
        return raw.data

    def chunks(self, name: str) -> Callable[[], Iterator[bytes]]:
        """A function that reads a tensor's bytes in pieces of bounded size when it is called."""
        path, entry = self.path, self.entries[name]

        def read() -> Iterator[bytes]:
            with open_regular(path) as descriptor:
                for start in range(entry.begin, entry.end, CHUNK):
                    yield pread_exactly(descriptor, min(CHUNK, entry.end - start), start)

        return read

"""The tensors of a tuned model, in a checkpoint or a PEFT adapter, as they are read block by block without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embedsurgery.adapters.adapter import WEIGHTS_NAME
from embedsurgery.errors import UnsupportedError
from embedsurgery.files.regular import open_regular, pread_exactly
from embedsurgery.files.safetensors import Entry, read_header
from embedsurgery.graph.wrappers import plain_name
from embedsurgery.plan.blocks import spans
from embedsurgery.plugins.current import registry
from embedsurgery.stores.shards import ShardStore
from embedsurgery.tensors.raw import ITEMSIZE, RawArray


@dataclass(frozen=True)
class Tuned:
    """A tensor of the tuned model."""

    path: Path
    entry: Entry

    def block(self, start: int, stop: int) -> RawArray:
        """Rows of a matrix, or entries of a vector."""
        width = self.entry.shape[1:]
        pitch = ITEMSIZE[self.entry.dtype] * int(np.prod(width, dtype=np.int64))
        with open_regular(self.path) as descriptor:
            data = pread_exactly(descriptor, (stop - start) * pitch, self.entry.begin + start * pitch)
        return RawArray(self.entry.dtype, (stop - start, *width), data)

    def rows(self, indices: Sequence[int]) -> RawArray:
        """Some rows of a matrix, (K, D)."""
        width = self.entry.shape[1]
        pitch = ITEMSIZE[self.entry.dtype] * width
        with open_regular(self.path) as descriptor:
            data = b"".join(pread_exactly(descriptor, pitch, self.entry.begin + index * pitch) for index in indices)
        return RawArray(self.entry.dtype, (len(indices), width), data)

    def same(self, other: Tuned) -> bool:
        """Whether both are of one dtype and shape, and byte for byte the same."""
        if (self.entry.dtype, self.entry.shape) != (other.entry.dtype, other.entry.shape):
            return False
        with open_regular(self.path) as left, open_regular(other.path) as right:
            return all(
                pread_exactly(left, stop - start, self.entry.begin + start)
                == pread_exactly(right, stop - start, other.entry.begin + start)
                for start, stop in spans(self.entry.end - self.entry.begin, 1)
            )


def open_safetensors(directory: Path) -> ShardStore:
    """A checkpoint whose tensors are compared byte by byte.

    Raises:
        UnsupportedError: It is of another format.
    """
    store = registry().open_store(directory)
    if not isinstance(store, ShardStore):
        raise UnsupportedError(
            "rows are compared in safetensors alone",
            where=directory,
            expected="safetensors",
            found=type(store).__name__,
        )
    return store


def tuned_tensors(tuned: Path) -> dict[str, Tuned]:
    """Plain name -> tensor, of a checkpoint or a PEFT adapter."""
    if os.path.exists(tuned / WEIGHTS_NAME):
        header = read_header(tuned / WEIGHTS_NAME)
        return {plain_name(name): Tuned(tuned / WEIGHTS_NAME, entry) for name, entry in header.entries.items()}
    checkpoint = open_safetensors(tuned).checkpoint
    return {plain_name(name): Tuned(checkpoint.path(name), checkpoint.entry(name)) for name in checkpoint.location}


def alike(name: str, tensors: Mapping[str, Tuned]) -> Tuned | None:
    """The tensor of this name, or the one whose name begins or ends alike: see `locate`."""
    if name in tensors:
        return tensors[name]
    near = [t for other, t in tensors.items() if other.endswith("." + name) or name.endswith("." + other)]
    return near[0] if len(near) == 1 else None

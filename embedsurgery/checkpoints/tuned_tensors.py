"""Reads the tensors of a tuned model, a checkpoint or a PEFT adapter, block by block and without torch.

``extracting.py`` compares them with the base's.
"""

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
class TunedTensor:
    """A tensor of the tuned model.

    Attributes:
        path: The file that holds it.
        entry: Its entry in the file's header.
    """

    path: Path
    entry: Entry

    def read_block(self, start: int, stop: int) -> RawArray:
        """Read consecutive rows of a matrix, (stop - start, D), or entries of a vector."""
        width = self.entry.shape[1:]
        pitch = ITEMSIZE[self.entry.dtype] * int(np.prod(width, dtype=np.int64))
        with open_regular(self.path) as descriptor:
            data = pread_exactly(descriptor, (stop - start) * pitch, self.entry.begin + start * pitch)
        return RawArray(self.entry.dtype, (stop - start, *width), data)

    def read_rows(self, indices: Sequence[int]) -> RawArray:
        """Read rows of a matrix, (K, D)."""
        width = self.entry.shape[1]
        pitch = ITEMSIZE[self.entry.dtype] * width
        with open_regular(self.path) as descriptor:
            data = b"".join(pread_exactly(descriptor, pitch, self.entry.begin + index * pitch) for index in indices)
        return RawArray(self.entry.dtype, (len(indices), width), data)

    def equals(self, other: TunedTensor) -> bool:
        """Whether both have the same dtype, shape and bytes; stops at the first block that differs."""
        if (self.entry.dtype, self.entry.shape) != (other.entry.dtype, other.entry.shape):
            return False
        with open_regular(self.path) as left, open_regular(other.path) as right:
            return all(
                pread_exactly(left, stop - start, self.entry.begin + start)
                == pread_exactly(right, stop - start, other.entry.begin + start)
                for start, stop in spans(self.entry.end - self.entry.begin, 1)
            )


def open_shard_store(directory: Path) -> ShardStore:
    """Open a safetensors checkpoint.

    Raises:
        UnsupportedError: It has another format.
    """
    store = registry().open_store(directory)
    if not isinstance(store, ShardStore):
        raise UnsupportedError(
            "rows can be compared in safetensors checkpoints only",
            where=directory,
            expected="safetensors",
            found=type(store).__name__,
        )
    return store


def read_tuned_tensors(tuned: Path) -> dict[str, TunedTensor]:
    """Plain name -> tensor of a checkpoint or a PEFT adapter; only headers are read."""
    if os.path.exists(tuned / WEIGHTS_NAME):
        header = read_header(tuned / WEIGHTS_NAME)
        return {plain_name(name): TunedTensor(tuned / WEIGHTS_NAME, entry) for name, entry in header.entries.items()}
    checkpoint = open_shard_store(tuned).checkpoint
    return {
        plain_name(name): TunedTensor(checkpoint.path(name), checkpoint.entry(name)) for name in checkpoint.location
    }


def find_tensor(name: str, tensors: Mapping[str, TunedTensor]) -> TunedTensor | None:
    """Find a tensor by its name, or the only one whose name is a suffix or an extension of it.

    Wrappers and model classes put prefixes before names (``model.``, ``base_model.model.``), and not the same ones on
    both sides.
    """
    if name in tensors:
        return tensors[name]
    near = [t for other, t in tensors.items() if other.endswith("." + name) or name.endswith("." + other)]
    return near[0] if len(near) == 1 else None

"""Identifies the memory of tensors: which are ties of one another, and which overlap in part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from embedsurgery.errors import OverlapError
from embedsurgery.tensors.sharded import local_shard


class Memory(NamedTuple):
    """The location of a tensor's elements. Two normalized values are equal if and only if the elements are the same.

    Attributes:
        owner: ``id`` of the tensor object if it has no storage (meta, fake, an empty shard), else 0. Without it, all
            tensors that have no pointer would seem to be one.
        device: The device, as a string.
        pointer: Address of the storage, 0 if there is none.
        offset: First element in the storage, in elements.
        shape: The shape; of a DTensor the global one.
        stride: In elements; of a DTensor that of a contiguous tensor of the global shape.
        dtype: The dtype.
    """

    owner: int
    device: str
    pointer: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def normalize(self) -> Memory:
        """Set the strides of axes of length 1 to 0: they have no meaning and differ between equal views."""
        stride = tuple(0 if size == 1 else step for size, step in zip(self.shape, self.stride, strict=True))
        return self._replace(stride=stride)

    def transpose(self) -> Memory:
        """Return the memory of the transposed tensor."""
        return self._replace(shape=self.shape[::-1], stride=self.stride[::-1])

    def span(self) -> tuple[int, int]:
        """Return the first byte and one past the last, relative to the storage."""
        size = self.dtype.itemsize
        last = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return self.offset * size, (self.offset + last + 1) * size

    def overlaps(self, other: Memory) -> bool:
        """Whether two memories have bytes in common."""
        if (self.owner, self.device, self.pointer) != (other.owner, other.device, other.pointer):
            return False
        (a, b), (c, d) = self.span(), other.span()
        if a >= d or c >= b:
            return False
        return not _are_disjoint_columns(self, other)


def _are_disjoint_columns(a: Memory, b: Memory) -> bool:
    """Whether two memories are disjoint columns of one row-major matrix.

    Their spans interleave and yet share no byte: a fused matrix of which two modules use slices of columns.
    """
    if a.dtype != b.dtype or len(a.shape) != 2 or len(b.shape) != 2 or a.stride != b.stride or a.stride[1] != 1:
        return False
    pitch = a.stride[0]
    left, right = a.offset % pitch, b.offset % pitch
    inside = left + a.shape[1] <= pitch and right + b.shape[1] <= pitch
    return inside and (left + a.shape[1] <= right or right + b.shape[1] <= left)


def memory_of(tensor: torch.Tensor) -> Memory:
    """Identify the memory of a tensor. A DTensor is identified by its local shard and its global shape."""
    part = local_shard(tensor)
    pointer = 0
    if part.device.type != "meta" and part.numel() > 0:
        try:
            pointer = part.untyped_storage().data_ptr()
        except RuntimeError:  # fake and functional tensors, and subclasses without storage
            pointer = 0
    # An empty shard has no pointer either, and the rank that has no rows of a table must still tell its tables apart.
    if pointer == 0:
        return Memory(
            id(tensor), str(part.device), 0, 0, tuple(tensor.shape), _contiguous_strides(tensor), tensor.dtype
        )
    if part is not tensor:
        # The local shape depends on the rank, and shards of different rows differ in it: identify by the global shape.
        offset, shape = int(part.storage_offset()), tuple(tensor.shape)
        return Memory(0, str(part.device), pointer, offset, shape, _contiguous_strides(tensor), part.dtype)
    return Memory(
        0,
        str(part.device),
        pointer,
        int(part.storage_offset()),
        tuple(part.shape),
        tuple(part.stride()),
        part.dtype,
    )


def refuse_overlaps(tables: Mapping[str, Memory], others: Mapping[str, Memory]) -> None:
    """Refuse tensors that share part of a table's memory: editing rows would change them unnoticed.

    Args:
        tables: Name -> memory of every table.
        others: Name -> memory of every other tensor that is not an alias of a table.

    Raises:
        OverlapError: It names both tensors.
    """
    for name, memory in others.items():
        for table, whole in tables.items():
            if memory.overlaps(whole):
                raise OverlapError(
                    f"parameter {name} shares part of a table's memory",
                    where=table,
                    expected=f"all of {list(whole.shape)}, or none",
                    found=f"{list(memory.shape)} with strides {list(memory.stride)}",
                    hint="clone one of the two",
                )


def _contiguous_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor of the same shape."""
    stride, step = [], 1
    for size in reversed(tensor.shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))

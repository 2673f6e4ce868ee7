"""Whose memory a tensor is, and which tensors share it in part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from embedsurgery.errors import OverlapError
from embedsurgery.tensors.sharded import local


class Memory(NamedTuple):
    """Where a tensor's elements are: equal for two tensors if and only if they are the same elements.

    Tensors without storage of their own (meta, fake, an empty shard) have no pointer: there ``owner`` is the
    identity of the Parameter object and everything else is as if they lay at 0.
    """

    owner: int
    device: str
    pointer: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def normalised(self) -> Memory:
        """Strides of axes of length 1 say nothing: made 0, so that they do not tell equals apart."""
        stride = tuple(0 if size == 1 else step for size, step in zip(self.shape, self.stride, strict=True))
        return self._replace(stride=stride)

    def transposed(self) -> Memory:
        """The memory of the tensor's transpose."""
        return self._replace(shape=self.shape[::-1], stride=self.stride[::-1])

    def span(self) -> tuple[int, int]:
        """First byte and one past the last, relative to the storage."""
        size = self.dtype.itemsize
        last = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return self.offset * size, (self.offset + last + 1) * size

    def overlaps(self, other: Memory) -> bool:
        """Whether the two have an element's bytes in common, both being in one storage."""
        if (self.owner, self.device, self.pointer) != (other.owner, other.device, other.pointer):
            return False
        (a, b), (c, d) = self.span(), other.span()
        if a >= d or c >= b:
            return False
        return not _columns_apart(self, other)


def _columns_apart(a: Memory, b: Memory) -> bool:
    """Two column ranges of one row-major matrix: their spans interleave and yet share nothing."""
    if a.dtype != b.dtype or len(a.shape) != 2 or len(b.shape) != 2 or a.stride != b.stride or a.stride[1] != 1:
        return False
    pitch = a.stride[0]
    left, right = a.offset % pitch, b.offset % pitch
    inside = left + a.shape[1] <= pitch and right + b.shape[1] <= pitch
    return inside and (left + a.shape[1] <= right or right + b.shape[1] <= left)


def memory_of(tensor: torch.Tensor) -> Memory:
    """The identity of a tensor's memory; DTensors by their local tensor, which then stands for the whole."""
    part = local(tensor)
    pointer = 0
    if part.device.type != "meta" and part.numel() > 0:
        try:
            pointer = part.untyped_storage().data_ptr()
        except RuntimeError:  # fake and functional tensors, and subclasses without storage
            pointer = 0
    if pointer == 0:
        return Memory(id(tensor), str(part.device), 0, 0, tuple(tensor.shape), _contiguous(tensor), tensor.dtype)
    if part is not tensor:
        # a shard of other rows is another shape of memory: the global shape must be part of the identity
        offset, shape = int(part.storage_offset()), tuple(tensor.shape)
        return Memory(0, str(part.device), pointer, offset, shape, _contiguous(tensor), part.dtype)
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
    """Refuse memory that is shared with a table in part: an edit of rows would reach it unseen.

    Args:
        tables: Name -> memory of every table.
        others: Name -> memory of everything that is no table or alias of one.

    Raises:
        OverlapError: It names both.
    """
    for name, memory in others.items():
        for table, whole in tables.items():
            if memory.overlaps(whole):
                raise OverlapError(
                    f"parameter {name} shares memory with a part of a table",
                    where=table,
                    expected=f"all of {list(whole.shape)} or nothing",
                    found=f"{list(memory.shape)} with strides {list(memory.stride)}",
                    hint="clone one of the two, so that an edit of rows cannot reach the other unseen",
                )


def _contiguous(tensor: torch.Tensor) -> tuple[int, ...]:
    stride, step = [], 1
    for size in reversed(tensor.shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))

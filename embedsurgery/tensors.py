"""The torch side of `raw`: dtype strings, tensors to raw bytes and back, and what a tensor's memory is.

With ``walker.py`` the only file that looks at data pointers.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from embedsurgery.errors import OverlapError, UnsupportedError
from embedsurgery.raw import RawArray

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip
_STRINGS = {dtype: name for name, dtype in DTYPES.items()}


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


def local(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor's local shard; any other tensor as it is."""
    inner = getattr(tensor, "_local_tensor", None)
    return inner if isinstance(inner, torch.Tensor) else tensor


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


def dtype_string(tensor: torch.Tensor) -> str:
    """Safetensors' string for a tensor's dtype; torch's own name for one that safetensors lacks."""
    return _STRINGS.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor: its values may lie on several ranks."""
    return hasattr(tensor, "_local_tensor")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor or a parameter of DeepSpeed's ZeRO-3 gathered, which every rank must ask for together; any other
    tensor as it is.
    """
    if hasattr(tensor, "ds_id"):
        deepspeed = importlib.import_module("deepspeed")
        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    if not is_sharded(tensor):
        return tensor
    device = tensor.device_mesh.device_type  # type: ignore[attr-defined]
    if tensor.device.type != device:  # offloaded: what gathers works on the mesh's devices only
        tensor = tensor.to(device)
    return tensor.full_tensor()  # type: ignore[attr-defined, no-any-return]


def fsdp_version(module: object) -> int | None:
    """Which of torch's two FSDPs a module was wrapped in: 2 is ``fully_shard``; None for neither."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # where that was never imported, nothing is wrapped
    if isinstance(module, getattr(fsdp, "FSDPModule", ())):
        return 2
    return 1 if isinstance(module, getattr(fsdp, "FullyShardedDataParallel", ())) else None


def rows_at(table: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows (or entries) of a tensor; of a DTensor only they are gathered, bit for bit, and without a gradient.

    Args:
        table: (V, ...), plain or a DTensor, for which every rank of its mesh must ask together.
        indices: int64 (K,), the same on every rank.

    Returns:
        (K, ...), plain.

    Raises:
        UnsupportedError: A DTensor that is not laid out by whole slices.
    """
    if not is_sharded(table):
        return table.index_select(0, indices)
    mesh, part = table.device_mesh, local(table.detach())  # type: ignore[attr-defined]
    starts, ends, contributes = _extent(table)
    mine = (indices >= starts[0]) & (indices < ends[0])
    found = torch.zeros((len(indices), *table.shape[1:]), dtype=table.dtype, device=part.device)
    if contributes and part.numel() > 0:
        inside: Any = (mine, *(slice(a, b) for a, b in zip(starts[1:], ends[1:], strict=True)))
        found[inside] = part.index_select(0, indices[mine] - starts[0])
    sent = found.to(mesh.device_type)  # itself, unless the table is offloaded
    data = sent.reshape(-1).view(torch.uint8)  # sums of bytes of which all but one are 0: no rounding, -0.0 is kept
    for axis in range(mesh.ndim):
        torch.distributed.all_reduce(data, group=mesh.get_group(axis))
    return sent.to(part.device)


def part_of(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A DTensor of plain values, the same on every rank, laid out as another; no rank talks to another."""
    starts, ends, _ = _extent(like)
    part = values[tuple(slice(a, b) for a, b in zip(starts, ends, strict=True))].clone()
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=values.shape, stride=values.stride())


def _extent(table: torch.Tensor) -> tuple[list[int], list[int], bool]:
    """Where this rank's part of a DTensor begins and ends on each axis, and whether it speaks for its replicas."""
    starts, ends, contributes = [0] * table.dim(), list(table.shape), True
    mesh, coordinate = table.device_mesh, table.device_mesh.get_coordinate()  # type: ignore[attr-defined]
    for axis, placement in enumerate(table.placements):  # type: ignore[attr-defined]
        if type(placement).__name__ == "Shard":
            dim = placement.dim % table.dim()
            step = -(-(ends[dim] - starts[dim]) // mesh.size(axis))
            begin = min(starts[dim] + step * coordinate[axis], ends[dim])
            starts[dim], ends[dim] = begin, min(begin + step, ends[dim])
        elif type(placement).__name__ == "Replicate":
            contributes = contributes and coordinate[axis] == 0
        else:
            raise UnsupportedError("a table of this layout over devices cannot be read by rows",
                                   expected="Shard or Replicate", found=repr(placement))  # fmt: skip
    if tuple(b - a for a, b in zip(starts, ends, strict=True)) != tuple(local(table).shape):
        raise UnsupportedError("a table's part on this rank is not what its layout says",
                               expected=f"{starts} to {ends}", found=list(local(table).shape))  # fmt: skip
    return starts, ends, contributes


def to_raw(tensor: torch.Tensor) -> RawArray:
    """A copy of a tensor's values as raw bytes, from any device and layout; a DTensor is gathered."""
    tensor = whole(tensor)
    if tensor.numel() == 0:
        return RawArray(dtype_string(tensor), tuple(tensor.shape), b"")
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return RawArray(dtype_string(tensor), tuple(tensor.shape), flat.numpy().tobytes())


def from_raw(raw: RawArray) -> torch.Tensor:
    """A new tensor with the raw bytes as its values, on the CPU."""
    if not raw.data:
        return torch.empty(raw.shape, dtype=DTYPES[raw.dtype])
    flat = torch.from_numpy(np.frombuffer(raw.data, dtype=np.uint8).copy())
    return flat.view(DTYPES[raw.dtype]).reshape(raw.shape)

"""Tensors that lie on several ranks: DTensor, FSDP and ZeRO-3."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch

from embedsurgery.errors import UnsupportedError


def local(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor's local shard; any other tensor as it is."""
    inner = getattr(tensor, "_local_tensor", None)
    return inner if isinstance(inner, torch.Tensor) else tensor


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
            raise UnsupportedError(
                "a table of this layout over devices cannot be read by rows",
                expected="Shard or Replicate",
                found=repr(placement),
            )
    if tuple(b - a for a, b in zip(starts, ends, strict=True)) != tuple(local(table).shape):
        raise UnsupportedError(
            "a table's part on this rank is not what its layout says",
            expected=f"{starts} to {ends}",
            found=list(local(table).shape),
        )
    return starts, ends, contributes

"""Reads and builds tensors that are sharded over ranks: DTensor, FSDP and DeepSpeed's ZeRO-3."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch

from embedsurgery.errors import UnsupportedError


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """Return a DTensor's local shard; other tensors are returned unchanged."""
    inner = getattr(tensor, "_local_tensor", None)
    return inner if isinstance(inner, torch.Tensor) else tensor


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor, whose values may be on several ranks."""
    return hasattr(tensor, "_local_tensor")


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Return all values of a DTensor or of a ZeRO-3 parameter; other tensors are returned unchanged.

    Every rank of the tensor's mesh must call this together.
    """
    if hasattr(tensor, "ds_id"):
        deepspeed = importlib.import_module("deepspeed")
        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    if not is_sharded(tensor):
        return tensor
    device = tensor.device_mesh.device_type  # type: ignore[attr-defined]
    # An offloaded parameter is on the CPU, but gathering works on the mesh's devices only.
    if tensor.device.type != device:
        tensor = tensor.to(device)
    return tensor.full_tensor()  # type: ignore[attr-defined, no-any-return]


def fsdp_version(module: object) -> int | None:
    """Return which FSDP wraps a module: 1 is ``FullyShardedDataParallel``, 2 is ``fully_shard``, None is neither."""
    # Looked up, not imported: if nobody has imported it, nothing is wrapped.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if isinstance(module, getattr(fsdp, "FSDPModule", ())):
        return 2
    return 1 if isinstance(module, getattr(fsdp, "FullyShardedDataParallel", ())) else None


def gather_rows(table: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Read rows (or entries) of a tensor. Of a DTensor only these rows are sent, bit for bit and without gradient.

    Args:
        table: (V, ...), a plain tensor or a DTensor. Every rank of a DTensor's mesh must call this together.
        indices: int64 (K,), the same on every rank.

    Returns:
        (K, ...), a plain tensor.

    Raises:
        UnsupportedError: The DTensor has placements other than ``Shard`` and ``Replicate``.
    """
    if not is_sharded(table):
        return table.index_select(0, indices)
    mesh, part = table.device_mesh, local_shard(table.detach())  # type: ignore[attr-defined]
    starts, ends, contributes = _local_extent(table)
    mine = (indices >= starts[0]) & (indices < ends[0])
    found = torch.zeros((len(indices), *table.shape[1:]), dtype=table.dtype, device=part.device)
    if contributes and part.numel() > 0:
        inside: Any = (mine, *(slice(a, b) for a, b in zip(starts[1:], ends[1:], strict=True)))
        found[inside] = part.index_select(0, indices[mine] - starts[0])
    sent = found.to(mesh.device_type)  # a copy only if the table is offloaded
    # Each row comes from one rank and is 0 on the others. Summing bytes instead of floats keeps every bit: a sum of
    # floats would turn -0.0 + 0.0 into 0.0 and change NaN payloads.
    data = sent.reshape(-1).view(torch.uint8)
    for axis in range(mesh.ndim):
        torch.distributed.all_reduce(data, group=mesh.get_group(axis))
    return sent.to(part.device)


def shard_like(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Build a DTensor with the layout of another from plain values, which must be equal on every rank.

    Each rank cuts out its own shard, so nothing is communicated.
    """
    starts, ends, _ = _local_extent(like)
    part = values[tuple(slice(a, b) for a, b in zip(starts, ends, strict=True))].clone()
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=values.shape, stride=values.stride())


def _local_extent(table: torch.Tensor) -> tuple[list[int], list[int], bool]:
    """Compute this rank's shard of a DTensor.

    Returns:
        Its start and its end on each axis, and whether this rank is the one that contributes it among its replicas.

    Raises:
        UnsupportedError: The placement is not ``Shard`` or ``Replicate``, or the local shard has another shape.
    """
    starts, ends, contributes = [0] * table.dim(), list(table.shape), True
    mesh, coordinate = table.device_mesh, table.device_mesh.get_coordinate()  # type: ignore[attr-defined]
    for axis, placement in enumerate(table.placements):  # type: ignore[attr-defined]
        if type(placement).__name__ == "Shard":
            # As torch.chunk: all shards but the last ones have ceil(rows / ranks) rows. A second Shard of the same
            # axis divides what the first one left.
            dim = placement.dim % table.dim()
            step = -(-(ends[dim] - starts[dim]) // mesh.size(axis))
            begin = min(starts[dim] + step * coordinate[axis], ends[dim])
            starts[dim], ends[dim] = begin, min(begin + step, ends[dim])
        elif type(placement).__name__ == "Replicate":
            contributes = contributes and coordinate[axis] == 0
        else:
            raise UnsupportedError(
                "cannot read rows of a DTensor with this placement",
                expected="Shard or Replicate",
                found=repr(placement),
            )
    if tuple(b - a for a, b in zip(starts, ends, strict=True)) != tuple(local_shard(table).shape):
        raise UnsupportedError(
            "the local shard does not match the DTensor's placements",
            expected=f"{starts} to {ends}",
            found=list(local_shard(table).shape),
        )
    return starts, ends, contributes

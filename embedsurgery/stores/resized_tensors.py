"""Creates resized copies of tensors, with the same memory layout and the same ties.

``tensor_store.py`` finds the tensors of a vocabulary and replaces them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from embedsurgery.errors import UnsupportedError
from embedsurgery.tensors.convert import from_raw
from embedsurgery.tensors.memory import Memory, memory_of
from embedsurgery.tensors.raw import RawArray


def refuse_irreplaceable(name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor whose replacement would lose something.

    Raises:
        UnsupportedError: Its class may store values elsewhere, or hooks are registered on it.
    """
    if type(tensor) not in (torch.Tensor, nn.Parameter) and not issubclass(type(tensor), nn.Parameter):
        raise UnsupportedError(
            "a tensor of this class cannot grow",
            where=name,
            found=type(tensor).__name__,
            expected="a plain tensor or a Parameter",
            hint="grow the vocabulary before the model is quantised or wrapped",
        )
    hooks = getattr(tensor, "_backward_hooks", None) or getattr(tensor, "_post_accumulate_grad_hooks", None)
    if hooks:
        raise UnsupportedError(
            "hooks are registered on the table, and a resized table would not have them",
            where=name,
            found=f"{len(hooks)} hooks",
            hint="remove the hooks first and register them again afterwards",
        )


def memory_and_transpose(tensor: torch.Tensor) -> tuple[Memory, Memory]:
    """Return the memory of a tensor and that of its transpose, both normalized."""
    memory = memory_of(tensor)
    return memory.normalize(), memory.transpose().normalize()


def resize_tensors(
    tensors: Iterable[torch.Tensor], axis: int, count: int, new: RawArray | None
) -> dict[int, torch.Tensor]:
    """Resize tensors that share one memory. The results share one new memory in the same way.

    The values are copied once into memory of the new size, without a copy in another dtype or on another device.

    Args:
        tensors: The old tensors. Others than the first may be its transpose.
        axis: The axis of the first tensor with one entry per token.
        count: Number of entries to add along the axis; negative to remove.
        new: The values to add, (count, D) or (count,), in the dtype of the tensors. None for a negative count.

    Returns:
        ``id`` of the old tensor -> new tensor, of the same class, device, dtype and attributes.
    """
    olds = list(tensors)
    first = olds[0]
    data = _resize_axis(first.detach(), axis, count, new)
    own, _ = memory_and_transpose(first)
    found = {}
    for old in olds:
        is_view = memory_and_transpose(old)[0] == own
        found[id(old)] = _wrap_like(old, data if is_view else data.t())
    return found


def _resize_axis(tensor: torch.Tensor, axis: int, count: int, new: RawArray | None) -> torch.Tensor:
    """Copy a tensor to another length of one axis. The order of its axes in memory stays the same."""
    size = tensor.shape[axis]
    shape = [*tensor.shape]
    shape[axis] = size + count
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: (-strides[d], d))
    data = torch.empty([shape[d] for d in order], dtype=tensor.dtype, device=tensor.device)
    data = data.permute([order.index(d) for d in range(tensor.dim())])
    kept = min(size, size + count)
    with torch.no_grad():
        data.narrow(axis, 0, kept).copy_(tensor.narrow(axis, 0, kept))
        if new is not None:
            values = from_raw(new)
            part = data.narrow(axis, size, count)
            part.copy_(values.t() if values.dim() == 2 and axis == 1 else values.reshape(part.shape))
    return data


def _wrap_like(old: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    """Create a tensor over ``data`` with the class, attributes and ``requires_grad`` of another."""
    if isinstance(old, nn.Parameter):
        # Not type(old)(data): a subclass of Parameter may have a constructor of its own.
        new: torch.Tensor = torch.Tensor._make_subclass(type(old), data, False)
    else:
        new = data.view(data.shape)  # two old objects over one memory become two new objects
    new.requires_grad_(old.requires_grad and old.is_leaf)
    new.__dict__.update(old.__dict__)
    return new

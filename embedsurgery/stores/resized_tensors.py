"""Tensors with more or fewer rows than others, laid out alike and sharing memory alike.

Which tensors a vocabulary has is ``tensors.py``'s, and putting them in their places too.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from embedsurgery.errors import UnsupportedError
from embedsurgery.tensors.convert import from_raw
from embedsurgery.tensors.memory import Memory, memory_of
from embedsurgery.tensors.raw import RawArray


def refuse_odd(name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor that cannot be replaced by a grown one unseen.

    Raises:
        UnsupportedError: It is of a class that may keep its values elsewhere, or hooks hang on it.
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
            "hooks hang on the table's gradient, which a grown table would not have",
            where=name,
            hint="remove them first, and register them again",
        )


def memories(tensor: torch.Tensor) -> tuple[Memory, Memory]:
    """A tensor's memory, and that of its transpose."""
    memory = memory_of(tensor)
    return memory.normalised(), memory.transposed().normalised()


def grown(tensors: Iterable[torch.Tensor], axis: int, count: int, new: RawArray | None) -> dict[int, torch.Tensor]:
    """New tensors for some that lie over one memory, which in the same way lie over one new memory.

    A plain ``.copy_`` of what stays and of what is new: one new copy of the memory and nothing else.

    Args:
        tensors: The old ones. The first has its entries of a token along ``axis``; others may be its transpose.
        axis: Of the first one's.
        count: How many rows more; negative for fewer.
        new: Their values: (count, D) or (count,), in the tensor's dtype. None for a negative count.

    Returns:
        ``id(old)`` -> new, of the old one's class, device, dtype and attributes.
    """
    olds = list(tensors)
    first = olds[0]
    data = _resized(first.detach(), axis, count, new)
    own, _ = memories(first)
    found = {}
    for old in olds:
        alike = memories(old)[0] == own
        found[id(old)] = _like(old, data if alike else data.t())
    return found


def _resized(tensor: torch.Tensor, axis: int, count: int, new: RawArray | None) -> torch.Tensor:
    """Values along another length of one axis, with the axes in memory in the same order."""
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


def _like(old: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    """A tensor over ``data`` that is otherwise as another is."""
    if isinstance(old, nn.Parameter):
        new: torch.Tensor = torch.Tensor._make_subclass(type(old), data, False)
    else:
        new = data.view(data.shape)  # an object of its own for each of the old ones
    new.requires_grad_(old.requires_grad and old.is_leaf)
    new.__dict__.update(old.__dict__)
    return new

"""What a step does, counted instead of timed: the same on every machine, whatever else that is doing.

Arithmetic is torch's own count of the floating-point operations of matrix products. Traffic is what the kernels read
and write, by the sizes of their arguments and results in memory: of an expanded tensor its elements once, of a sparse
one its indices and values. One that picks rows counts those alone, and views nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

_PICK = frozenset({"embedding", "index_select", "index", "gather", "slice", "select"})
"""Read as much as they write, however large the argument is."""

_PUT = frozenset({"index_put_", "index_add_", "index_copy_", "scatter_", "scatter_add_", "_index_put_impl_"})
"""Write as much as the values that they are given, however large the result is, which they also read."""


class Traffic(TorchDispatchMode):
    """Adds up ``bytes`` over the kernels that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if func.is_view or name == "_unsafe_view":
            return result
        given = tree_leaves((args, {key: value for key, value in (kwargs or {}).items() if key != "out"}))
        made = tree_leaves(result)
        if name in _PICK:
            self.bytes += 2 * _size(made)
        elif name in _PUT:
            self.bytes += 3 * _size(given[1:])
        elif not name.startswith(("empty", "new_empty", "detach", "_has_compatible")):
            self.bytes += _size(given) + _size(made)
        return result


def _size(values: list[Any]) -> int:
    return sum(_bytes(value) for value in values if isinstance(value, torch.Tensor))


def _bytes(tensor: torch.Tensor) -> int:
    if tensor.is_sparse:
        return _bytes(tensor._indices()) + _bytes(tensor._values())
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return prod(size for size, stride in strides if stride or not size) * tensor.element_size()


def count(step: Callable[[], object]) -> dict[str, int]:
    """Do a step and count its arithmetic and its traffic in bytes."""
    traffic, arithmetic = Traffic(), FlopCounterMode(display=False)
    with arithmetic, traffic:
        step()
    return {"arithmetic": arithmetic.get_total_flops(), "traffic_bytes": traffic.bytes}

"""What a step does, counted instead of timed: the same on every machine, whatever else that is doing.

Arithmetic is torch's own count of the floating-point operations of matrix products. Traffic is what the kernels read
and write, by the sizes of their arguments and results in memory: of an expanded tensor its elements once, of a sparse
one its indices and values. One that picks rows counts those alone, and views nothing.

What a kernel writes is what it makes and what its schema says that it changes, once, whether it returns that or, as the
fused optimizers do, nothing. What it changes counts as read, too, for a schema does not tell ``copy_`` and ``zero_``,
which only write, from ``add_``; results that it is given to fill (``out=``) do not.
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
        read, written = _read_and_written(func._schema, name, args, kwargs or {}, result)
        if name in _PICK:
            self.bytes += 2 * _size(written)
        elif name in _PUT:
            self.bytes += 3 * _size(read[1:])
        elif not name.startswith(("empty", "new_empty", "detach", "_has_compatible")):
            self.bytes += _size(read) + _size(written)
        return result


def _read_and_written(
    schema: Any, name: str, args: Any, kwargs: dict[str, Any], result: Any
) -> tuple[list[Any], list[Any]]:
    """The leaves of a kernel's arguments and results by what happens to them, those that it changes in both."""
    values = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
    given = [argument for argument in schema.arguments if argument.name in values]
    changed = {argument.name for argument in given if _is_written(argument)}
    if name.startswith("_fused_") and values.get("grad_scale") is None:
        changed.discard("grads")  # which are marked for the sake of scaled ones: those are written back unscaled
    read = [values[argument.name] for argument in given if not argument.is_out]
    results = result if len(schema.returns) > 1 else (result,)
    made = [one for one, returned in zip(results, schema.returns, strict=False) if not _is_written(returned)]
    return tree_leaves(read), tree_leaves(([values[key] for key in changed], made))


def _is_written(argument: Any) -> bool:
    """Whether a schema marks an argument as changed, or a result as an argument that was."""
    return argument.alias_info is not None and bool(argument.alias_info.is_write)


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

"""Lookups of fewer tokens than there are rows: work and gradient are of the size of the tokens.

A lookup of N tokens in K rows has a gradient with N rows that are not zero. A tied head has a gradient with K rows.
Their sum would cost K x D reads and writes, so the lookup's goes as a sparse tensor to an autograd node that both
share, and is added to the head's in place there. The gradient that leaves the node is always dense. ``columns.py`` has
the head's arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from embedsurgery.runtime.rows.rows import Rows


def is_eager() -> bool:
    """Whether operations run one by one on tensors: they are not compiled, traced or transformed."""
    return not torch.compiler.is_compiling() and not is_transformed() and not torch._C._get_tracing_state()


def is_transformed() -> bool:
    """Whether eager operations run below a transform of ``torch.func``, or have forward-mode derivatives."""
    if torch.compiler.is_compiling():
        return False
    functions: Any = torch._C
    return forward_ad._current_level >= 0 or functions._functorch.peek_interpreter_stack() is not None


def should_pick(rows: Rows, tokens: int) -> bool:
    """Whether `pick_rows` is possible, and cheaper than a lookup in all K rows."""
    return is_eager() and rows.values.shape[0] > tokens and not torch.are_deterministic_algorithms_enabled()


def pick_rows(rows: Rows, place: torch.Tensor) -> torch.Tensor:
    """Return some of the rows, with a sparse gradient.

    Args:
        rows: Rows that are not sharded, (K, D).
        place: Positions in ``rows.values``, int64 (N,).

    Returns:
        (N, D), in the rows' dtype.
    """
    if not (torch.is_grad_enabled() and rows.values.requires_grad):
        return rows.values.index_select(0, place)
    if not _is_current(rows):
        rows.shared = _SharedValues.apply(rows.values)  # type: ignore[no-untyped-call]
    assert rows.shared is not None
    return _PickRows.apply(rows.shared[0], place)  # type: ignore[no-untyped-call, no-any-return]


def values_for_head(rows: Rows) -> torch.Tensor:
    """Return the rows' values, (K, D), behind the node that a lookup's gradient goes through, if there is one."""
    needs_grad = is_eager() and torch.is_grad_enabled() and rows.values.requires_grad
    return rows.shared[1] if needs_grad and rows.shared is not None and _is_current(rows) else rows.values


def _is_current(rows: Rows) -> bool:
    """Whether the shared node has the rows' present values, and passes its gradient on to them."""
    if rows.shared is None:
        return False
    node: Any = rows.shared[0].grad_fn
    leads_to = getattr(node.next_functions[0][0], "variable", None)
    return leads_to is rows.values and _memory_of(rows.shared[0]) == _memory_of(rows.values)


def _is_batched(gradient: torch.Tensor) -> bool:
    """Whether it is a batch of gradients, of ``torch.func.vmap`` or ``torch.autograd.grad(is_grads_batched=True)``."""
    functions: Any = torch._C._functorch
    return bool(functions.is_batchedtensor(gradient) or functions.is_legacy_batchedtensor(gradient))


def _memory_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return where a tensor's values are: ``.data`` may have been set to others, also in the same storage."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


class _SharedValues(torch.autograd.Function):
    """The identity, with an output for lookups and one for heads. It saves nothing, so one node serves all forwards."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        return values.detach(), values.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> torch.Tensor | None:
        lookups, heads = gradients
        if lookups is None or not lookups.is_sparse:
            return lookups if heads is None else heads if lookups is None else heads + lookups
        if heads is None:
            heads = torch.zeros(lookups.shape, dtype=lookups.dtype, device=lookups.device)
        # In place is safe: a head's gradient is the product of a backward that no other node receives.
        return heads.index_add_(0, lookups._indices()[0], lookups._values())


class _PickRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(place)
        ctx.shape = values.shape
        return values.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        gradient = gradients[0].to_dense() if gradients[0].is_sparse else gradients[0]
        (place,) = ctx.saved_tensors
        if torch.is_grad_enabled() or _is_batched(gradient):  # sparse tensors have no derivatives, and no batches
            return gradient.new_zeros(ctx.shape).index_add(0, place, gradient), None
        return torch.sparse_coo_tensor(place.unsqueeze(0), gradient, ctx.shape, check_invariants=False), None

"""Rows that a lookup takes, where there are more of them than tokens: work and gradient of the tokens' size.

The gradient of K rows that a lookup of N tokens gives has N rows that are not zero. Where a head gives one too, whose
rows are not, the sum of both would cost K x D reads and writes: so the lookup's goes as a sparse tensor to the node
that both go through, which adds it to the head's in place. What leaves the node is always dense.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from embedsurgery.runtime.rows.rows import Rows


def is_eager() -> bool:
    """Whether operations run one by one on tensors as they are: nothing compiles, traces or transforms them."""
    return not torch.compiler.is_compiling() and not is_transformed() and not torch._C._get_tracing_state()


def is_transformed() -> bool:
    """Whether eager operations are differentiated forwards too, or run below a transform of ``torch.func``."""
    if torch.compiler.is_compiling():
        return False
    functions: Any = torch._C
    return forward_ad._current_level >= 0 or functions._functorch.peek_interpreter_stack() is not None


def picks(rows: Rows, tokens: int) -> bool:
    """Whether `picked` takes less than a lookup in all K rows."""
    return is_eager() and rows.values.shape[0] > tokens and not torch.are_deterministic_algorithms_enabled()


def picked(rows: Rows, place: torch.Tensor) -> torch.Tensor:
    """Some of the rows.

    Args:
        rows: Plain ones, (K, D).
        place: Positions among them, int64 (N,).

    Returns:
        (N, D), in the rows' dtype.
    """
    if not (torch.is_grad_enabled() and rows.values.requires_grad):
        return rows.values.index_select(0, place)
    if not _is_current(rows):
        rows.shared = _Shared.apply(rows.values)  # type: ignore[no-untyped-call]
    assert rows.shared is not None
    return _Picked.apply(rows.shared[0], place)  # type: ignore[no-untyped-call, no-any-return]


def shared(rows: Rows) -> torch.Tensor:
    """The rows' values, by way of the node that the gradient of a lookup goes through, if there is one."""
    wanted = is_eager() and torch.is_grad_enabled() and rows.values.requires_grad
    return rows.shared[1] if wanted and rows.shared is not None and _is_current(rows) else rows.values


def _is_current(rows: Rows) -> bool:
    """Whether what is shared is of the rows' values as they are now, and gives its gradient to them."""
    if rows.shared is None:
        return False
    node: Any = rows.shared[0].grad_fn
    leads_to = getattr(node.next_functions[0][0], "variable", None)
    return leads_to is rows.values and _lies(rows.shared[0]) == _lies(rows.values)


def _is_batched(gradient: torch.Tensor) -> bool:
    """Whether it is several at once, of ``torch.func.vmap`` or ``torch.autograd.grad(is_grads_batched=True)``."""
    functions: Any = torch._C._functorch
    return bool(functions.is_batchedtensor(gradient) or functions.is_legacy_batchedtensor(gradient))


def _lies(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Where a tensor's numbers lie: ``.data`` may be set to other ones, also in the same memory."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


class _Shared(torch.autograd.Function):
    """The identity, for lookups and for heads. It keeps nothing for its backward, so one node serves every forward."""

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
        return heads.index_add_(0, lookups._indices()[0], lookups._values())  # a product's, made for this node alone


class _Picked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(place)
        ctx.shape = values.shape
        return values.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        gradient = gradients[0].to_dense() if gradients[0].is_sparse else gradients[0]
        (place,) = ctx.saved_tensors
        if torch.is_grad_enabled() or _is_batched(gradient):  # sparse tensors have no derivatives
            return gradient.new_zeros(ctx.shape).index_add(0, place, gradient), None
        return torch.sparse_coo_tensor(place.unsqueeze(0), gradient, ctx.shape, check_invariants=False), None

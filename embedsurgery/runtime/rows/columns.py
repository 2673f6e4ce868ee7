"""The logits of K rows, with the gradients that turn the old columns of frozen logits into new ones.

A head's logits are computed with its own weight, and K of their columns are replaced. Their values are
``hidden @ rows.T + bias``; the gradient of ``hidden`` has to lose what it gets through the K old rows, and to win what
it gets through the new ones: what arrives times ``rows - weight[indices]``. With that, K columns cost one product
forward and two backward; written into the logits they are one write forward and one read backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from embedsurgery.runtime.rows.sparse_lookup import is_eager

_CHUNK = 2 << 20
"""Bytes of rows whose change is made at a time: what stays in a processor's cache."""


def columns(
    hidden: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, indices: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """New columns of logits, whose gradients are those of the change from old columns to them: to be added to logits.

    Args:
        hidden: (..., D).
        rows: The new rows, (K, D).
        weight: The table, (V, D), frozen.
        indices: int64 (K,).
        bias: Entries of the head's bias, (K,), which cancel in the change; or None.

    Returns:
        ``hidden @ rows.T + bias``, (..., K).
    """
    return _Columns.apply(hidden, rows, weight, indices, bias)  # type: ignore[no-untyped-call, no-any-return]


def replaced(
    logits: torch.Tensor,
    hidden: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    indices: torch.Tensor,
    start: int | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Logits with new columns, in their own memory.

    Args:
        logits: ``hidden @ weight.T + bias``, (..., V); changed in place.
        hidden: As for `columns`.
        rows: As for `columns`.
        weight: As for `columns`.
        indices: As for `columns`.
        start: The first of the indices, where they are consecutive numbers: then slices do what is picked else.
        bias: As for `columns`.

    Returns:
        (..., V), in the logits' dtype.
    """
    if not logits._is_view():
        return _Replaced.apply(logits, hidden, rows, weight, indices, start, bias)  # type: ignore[no-untyped-call, no-any-return]
    # Of a view that is changed, autograd copies the gradient twice: so what it is a view of is changed.
    whole, shape = logits._base, logits.shape
    assert whole is not None
    flat = _Replaced.apply(whole, hidden.reshape(-1, hidden.shape[-1]), rows, weight, indices, start, bias)  # type: ignore[no-untyped-call]
    return flat.view(shape)  # type: ignore[no-any-return]


def can_replace(logits: torch.Tensor) -> bool:
    """Whether `replaced` takes these logits: fresh ones, or a view of all of fresh ones that are (n, V)."""
    if not is_eager() or not logits.is_contiguous():
        return False
    base = logits._base
    return base is None or (
        base.dim() == 2
        and base.is_contiguous()
        and base.shape[1] == logits.shape[-1]
        and base.numel() == logits.numel()
        and base.dtype == logits.dtype
    )


class _Columns(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        hidden: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, indices: torch.Tensor, bias: Any
    ) -> torch.Tensor:
        return F.linear(hidden, rows, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        hidden, rows, weight, indices, _ = inputs
        ctx.save_for_backward(hidden, rows, weight, indices)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        hidden, rows, weight, indices = ctx.saved_tensors
        return (
            *_gradients(gradients[0], hidden, rows, weight, indices, None, ctx.needs_input_grad[:2]),
            None,
            None,
            None,
        )


class _Replaced(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        hidden: torch.Tensor,
        rows: torch.Tensor,
        weight: torch.Tensor,
        indices: torch.Tensor,
        start: int | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, rows, weight, indices)
        ctx.start = start
        ctx.mark_dirty(logits)
        put(logits, F.linear(hidden, rows, bias), indices, start)
        return logits

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        hidden, rows, weight, indices = ctx.saved_tensors
        if ctx.start is None:
            taken = gradient.gather(
                -1, indices.expand(*gradient.shape[:-1], -1)
            )  # row by row: half of index_select's time
        else:
            taken = gradient.narrow(-1, ctx.start, indices.numel())
        found = _gradients(taken, hidden, rows, weight, indices, ctx.start, ctx.needs_input_grad[1:3])
        return gradient, *found, None, None, None, None


def put(logits: torch.Tensor, new: torch.Tensor, indices: torch.Tensor, start: int | None) -> None:
    """Write columns into logits, in place.

    Args:
        logits: (..., V).
        new: (..., K).
        indices: int64 (K,).
        start: As for `replaced`.
    """
    if start is None:
        logits.scatter_(-1, indices.expand(new.shape), new.to(logits.dtype))  # row by row, as memory lies
    else:
        logits.narrow(-1, start, indices.numel()).copy_(new)


def _gradients(
    gradient: torch.Tensor,
    hidden: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    indices: torch.Tensor,
    start: int | None,
    wanted: tuple[bool, ...],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Those of hidden, (..., D), and rows, (K, D), where they are wanted; under autocast what arrives has its dtype."""
    to_hidden = to_rows = None
    if wanted[0]:
        to_hidden = _through_change(gradient, rows, weight, indices, start).to(hidden.dtype)
    if wanted[1]:
        flat = gradient.reshape(-1, gradient.shape[-1])
        inputs = hidden.reshape(-1, hidden.shape[-1]).to(gradient.dtype)
        to_rows = (flat.t() @ inputs).to(rows.dtype)
    return to_hidden, to_rows


def _through_change(
    gradient: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, indices: torch.Tensor, start: int | None
) -> torch.Tensor:
    """``gradient @ (rows - weight[indices])``, (..., D); the change, (K, D), is never there as a whole."""
    count, width = rows.shape
    flat = gradient.reshape(-1, count)
    step = max(_CHUNK // (width * rows.element_size()), flat.shape[0], 1) if is_eager() else count

    def part(first: int, size: int) -> torch.Tensor:
        old = (
            weight.index_select(0, indices[first : first + size])
            if start is None
            else weight.narrow(0, start + first, size)
        )
        return (rows.narrow(0, first, size) - old).to(gradient.dtype)

    if step >= count:
        return gradient @ part(0, count)
    total = torch.zeros(
        (flat.shape[0], width), dtype=torch.promote_types(gradient.dtype, torch.float32), device=flat.device
    )
    for first in range(0, count, step):
        size = min(step, count - first)
        here = flat.narrow(1, first, size)
        if total.dtype == gradient.dtype:
            total = torch.addmm(total, here, part(first, size))
        else:
            total = total + here @ part(first, size)
    return total.reshape(*gradient.shape[:-1], width)

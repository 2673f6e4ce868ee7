"""Replaces K columns of a head's logits, with the gradients that a head with the new rows would have.

The module computes the logits with its own weight, and K of their columns are replaced. The new columns are
``hidden @ rows.T + bias``. The module's gradient of ``hidden`` contains a part through the K old rows, so the new
columns add what is missing: their gradient times ``rows - weight[indices]``. K columns cost one product forward and two
backward. Written into the logits, they cost one write forward and one read backward.

``sites.py`` decides which rows are replaced here; many consecutive rows are cheaper in ``sliced_head.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from embedsurgery.runtime.rows.sparse_lookup import is_eager

_CHUNK_BYTES = 2 << 20
"""Bytes of row differences that are computed at a time, so that they stay in a processor's cache."""


def new_columns(
    hidden: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, indices: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Compute new columns, with the gradients of the change from the old columns. The caller adds them to the logits.

    Args:
        hidden: (..., D).
        rows: The new rows, (K, D).
        weight: The table, (V, D), frozen.
        indices: Row numbers, int64 (K,).
        bias: Entries of the head's bias, (K,), or None. The bias cancels in the change, so it gets no gradient.

    Returns:
        ``hidden @ rows.T + bias``, (..., K).
    """
    return _NewColumns.apply(hidden, rows, weight, indices, bias)  # type: ignore[no-untyped-call, no-any-return]


def replace_columns(
    logits: torch.Tensor,
    hidden: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    indices: torch.Tensor,
    start: int | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Replace columns of logits in place.

    Args:
        logits: ``hidden @ weight.T + bias``, (..., V), that `can_replace` accepts; changed in place.
        hidden: As for `new_columns`.
        rows: As for `new_columns`.
        weight: As for `new_columns`.
        indices: As for `new_columns`.
        start: The first index if they are consecutive, which is faster; else None.
        bias: As for `new_columns`.

    Returns:
        The logits, (..., V), in their dtype.
    """
    if not logits._is_view():
        return _ReplaceColumns.apply(logits, hidden, rows, weight, indices, start, bias)  # type: ignore[no-untyped-call, no-any-return]
    # If a view is changed in place, autograd copies its gradient twice. So the tensor under the view is changed.
    whole, shape = logits._base, logits.shape
    assert whole is not None
    flat = _ReplaceColumns.apply(whole, hidden.reshape(-1, hidden.shape[-1]), rows, weight, indices, start, bias)  # type: ignore[no-untyped-call]
    return flat.view(shape)  # type: ignore[no-any-return]


def can_replace(logits: torch.Tensor) -> bool:
    """Whether `replace_columns` accepts logits: not a view, or a view of all of an (n, V) tensor."""
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


class _NewColumns(torch.autograd.Function):
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
        found = _input_gradients(gradients[0], hidden, rows, weight, indices, None, ctx.needs_input_grad[:2])
        return *found, None, None, None


class _ReplaceColumns(torch.autograd.Function):
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
        write_columns(logits, F.linear(hidden, rows, bias), indices, start)
        return logits

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        hidden, rows, weight, indices = ctx.saved_tensors
        if ctx.start is None:  # gather() reads row by row, in half of the time of index_select() over columns
            own = gradient.gather(-1, indices.expand(*gradient.shape[:-1], -1))
        else:
            own = gradient.narrow(-1, ctx.start, indices.numel())
        found = _input_gradients(own, hidden, rows, weight, indices, ctx.start, ctx.needs_input_grad[1:3])
        # All of the gradient goes on to the logits, as their own backward uses the old rows for these columns too:
        # _gradient_through_change() corrects that.
        return gradient, *found, None, None, None, None


def write_columns(logits: torch.Tensor, new: torch.Tensor, indices: torch.Tensor, start: int | None) -> None:
    """Write columns into logits, in place.

    Args:
        logits: (..., V).
        new: The columns, (..., K).
        indices: int64 (K,).
        start: As for `replace_columns`.
    """
    if start is None:
        logits.scatter_(-1, indices.expand(new.shape), new.to(logits.dtype))  # row by row, in the order of the memory
    else:
        logits.narrow(-1, start, indices.numel()).copy_(new)


def _input_gradients(
    gradient: torch.Tensor,
    hidden: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    indices: torch.Tensor,
    start: int | None,
    needed: tuple[bool, ...],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of hidden, (..., D), and of rows, (K, D), if needed.

    Under autocast ``gradient`` has another dtype than they, and the products are computed in it.
    """
    to_hidden = to_rows = None
    if needed[0]:
        to_hidden = _gradient_through_change(gradient, rows, weight, indices, start).to(hidden.dtype)
    if needed[1]:
        flat = gradient.reshape(-1, gradient.shape[-1])
        inputs = hidden.reshape(-1, hidden.shape[-1]).to(gradient.dtype)
        to_rows = (flat.t() @ inputs).to(rows.dtype)
    return to_hidden, to_rows


def _gradient_through_change(
    gradient: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, indices: torch.Tensor, start: int | None
) -> torch.Tensor:
    """Return ``gradient @ (rows - weight[indices])``, (..., D), from chunks of the (K, D) difference."""
    count, width = rows.shape
    flat = gradient.reshape(-1, count)
    step = max(_CHUNK_BYTES // (width * rows.element_size()), flat.shape[0], 1) if is_eager() else count

    def difference(first: int, size: int) -> torch.Tensor:
        if start is None:
            old = weight.index_select(0, indices[first : first + size])
        else:
            old = weight.narrow(0, start + first, size)
        return (rows.narrow(0, first, size) - old).to(gradient.dtype)

    if step >= count:
        return gradient @ difference(0, count)
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    total = torch.zeros((flat.shape[0], width), dtype=dtype, device=flat.device)
    for first in range(0, count, step):
        size = min(step, count - first)
        part = flat.narrow(1, first, size)
        if total.dtype == gradient.dtype:
            total = torch.addmm(total, part, difference(first, size))
        else:
            total = total + part @ difference(first, size)
    return total.reshape(*gradient.shape[:-1], width)

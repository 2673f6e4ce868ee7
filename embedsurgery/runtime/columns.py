"""The logits of K rows, with the gradients that turn the old columns of frozen logits into new ones.

A head's logits are computed with its own weight, and K of their columns are replaced. Their values are
``hidden @ rows.T + bias``; the gradient of ``hidden`` has to lose what it gets through the K old rows, and to win what
it gets through the new ones: what arrives times ``rows - weight[indices]``. Columns with that gradient, *added* to the
logits, give all gradients that are wanted, for one product forward and two backward instead of two and three.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F


def columns(
    hidden: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, indices: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """New columns of logits, whose gradients are those of the change from old columns to them.

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
        (gradient,) = gradients  # under autocast in its dtype, and hidden and rows in theirs
        hidden, rows, weight, indices = ctx.saved_tensors
        to_hidden = to_rows = None
        if ctx.needs_input_grad[0]:
            change = rows - weight.index_select(0, indices)
            to_hidden = (gradient @ change.to(gradient.dtype)).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            flat = gradient.reshape(-1, gradient.shape[-1])
            inputs = hidden.reshape(-1, hidden.shape[-1]).to(gradient.dtype)
            to_rows = (flat.t() @ inputs).to(rows.dtype)
        return to_hidden, to_rows, None, None, None

"""A table with the live rows in the place of its own: the values, and a gradient that goes to the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from embedsurgery.runtime.rows import Rows
from embedsurgery.runtime.sharded import plain_rows


def full_copy(base: torch.Tensor, rows: Sequence[Rows]) -> torch.Tensor:
    """A table with rows in the place of its own.

    Args:
        base: (V, D).
        rows: Those that are live.

    Returns:
        (V, D), apart from the base.

    Raises:
        UnsupportedError: The rows are sharded here, and a gradient is wanted.
    """
    new = [plain_rows(part.values) for part in rows]
    if torch.compiler.is_compiling():  # which knows how to make the least of this
        for part, values in zip(rows, new, strict=True):
            if part.samples is not None:  # a copy is right for some samples only: no numbers rather than wrong ones
                values = torch.full_like(values, torch.nan)
            base = base.index_copy(0, part.indices, values.to(base.dtype))
        return base
    with torch.no_grad():
        made = base.clone()
        for part, values in zip(rows, new, strict=True):
            made.index_copy_(0, part.indices, values.to(base.dtype))
    return with_gradient(made, base, rows)


def with_gradient(shown: torch.Tensor, base: torch.Tensor, rows: Sequence[Rows], turned: bool = False) -> torch.Tensor:
    """Values as they are, whose gradient goes to a table and to the rows that are in the place of its own.

    Nothing is saved for it, so it may be run through as often as parts of a forward are computed again.

    Args:
        shown: (V, D), or (D, V) where it is turned.
        base: The table, as ``shown``.
        rows: Those that are live.
        turned: Whether both are transposed.
    """
    new = [plain_rows(part.values) for part in rows]
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in (base, *new)):
        return shown
    indices = [part.indices for part in rows]
    found: torch.Tensor = _WithRows.apply(shown, base, turned, len(rows), *indices, *new)  # type: ignore[no-untyped-call]
    return found


class _WithRows(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(shown: torch.Tensor, base: torch.Tensor, *_: Any) -> torch.Tensor:
        return shown.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, _, ctx.turned, count, *parts = inputs
        ctx.indices = parts[:count]
        ctx.dtypes = [part.dtype for part in parts[count:]]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        whole = gradients[0].t() if ctx.turned else gradients[0]
        rows = [whole.index_select(0, i).to(dtype) for i, dtype in zip(ctx.indices, ctx.dtypes, strict=True)]
        base = None
        if ctx.needs_input_grad[1]:
            base = whole
            for i in ctx.indices:
                base = base.index_fill(0, i, 0)
            base = base.t() if ctx.turned else base
        return None, base, None, None, *[None] * len(ctx.indices), *rows

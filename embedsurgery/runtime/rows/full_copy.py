"""A table with the live rows in the place of its own: the values, and a gradient that goes to the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from embedsurgery.errors import AttachmentError
from embedsurgery.runtime.rows.rows import Rows
from embedsurgery.runtime.rows.sparse_lookup import is_transformed
from embedsurgery.runtime.rows.whole_tables import has_whole_tables, over, tensors_of


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
    new = [tensors_of(part) for part in rows]
    if torch.compiler.is_compiling() or is_transformed():  # the one makes the least of this, the other all derivatives
        for number, part in enumerate(rows):
            if part.samples is not None:  # a copy is right for some samples only: no numbers rather than wrong ones
                new[number] = [torch.full_like(values, torch.nan) for values in new[number]]
        return _laid_over(base, rows, new)
    with torch.no_grad():
        if has_whole_tables(rows):
            made = _laid_over(base, rows, new)
        else:
            made = base.clone()
            for part, (values,) in zip(rows, new, strict=True):
                made.index_copy_(0, part.indices, values.to(base.dtype))
    return with_gradient(made, base, rows)


def _laid_over(base: torch.Tensor, rows: Sequence[Rows], new: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    for part, tensors in zip(rows, new, strict=True):
        base = over(base, part, tensors)
    return base


def values_of(rows: Sequence[Rows]) -> list[torch.Tensor]:
    """Every tensor that rows are made of, as it is in a forward."""
    return [tensor for part in rows for tensor in tensors_of(part)]


def with_gradient(shown: torch.Tensor, base: torch.Tensor, rows: Sequence[Rows], turned: bool = False) -> torch.Tensor:
    """Values as they are, whose gradient goes to a table and to the rows that are in the place of its own.

    Nothing is saved for it that a backward frees, so it may be run through as often as parts of a forward are computed
    again.

    Args:
        shown: (V, D), or (D, V) where it is turned.
        base: The table, as ``shown``.
        rows: Those that are live.
        turned: Whether both are transposed.
    """
    new = values_of(rows)
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in (base, *new)):
        return shown
    found: torch.Tensor
    if has_whole_tables(rows):
        found = _Changed.apply(shown, base, turned, tuple(rows), *new)  # type: ignore[no-untyped-call]
        return found
    indices = [part.indices for part in rows]
    found = _WithRows.apply(shown, base, turned, len(rows), *indices, *new)  # type: ignore[no-untyped-call]
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
        ctx.like = output.shape, output.dtype, output.device

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> torch.Tensor:
        shape, dtype, device = ctx.like
        base = tangents[1]
        made = torch.zeros(shape, dtype=dtype, device=device) if base is None else base
        made = made.t() if ctx.turned else made
        for i, tangent in zip(ctx.indices, tangents[4 + len(ctx.indices) :], strict=True):
            new = made.new_zeros((i.numel(), made.shape[1])) if tangent is None else tangent.to(dtype)
            made = made.index_copy(0, i, new)
        return made.t() if ctx.turned else made

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


class _Changed(torch.autograd.Function):
    """Where a whole table is changed, the gradient is what autograd says of the change, made once more."""

    @staticmethod
    def forward(ctx: Any, shown: torch.Tensor, base: torch.Tensor, turned: bool, rows: Any, *new: Any) -> torch.Tensor:
        ctx.turned, ctx.rows, ctx.base, ctx.new = turned, rows, base, new
        ctx.versions = [tensor._version for tensor in new]
        return shown.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        if ctx.versions != [tensor._version for tensor in ctx.new]:
            raise AttachmentError(
                "rows were changed in place between a forward and its backward",
                hint="step the optimizer after the backward",
            )
        wanted = (ctx.needs_input_grad[1], *ctx.needs_input_grad[4:])
        inputs = [t.detach().requires_grad_(w) for t, w in zip((ctx.base, *ctx.new), wanted, strict=True)]
        counts = [len(tensors_of(part)) for part in ctx.rows]
        given = iter(inputs[1:])
        with torch.enable_grad():
            base = inputs[0].t() if ctx.turned else inputs[0]
            made = _laid_over(base, ctx.rows, [[next(given) for _ in range(count)] for count in counts])
            made = made.t() if ctx.turned else made
            asked = [tensor for tensor, is_wanted in zip(inputs, wanted, strict=True) if is_wanted]
            found = iter(torch.autograd.grad(made, asked, gradients[0].to(made.dtype), allow_unused=True))
        base_gradient, *rest = [next(found) if is_wanted else None for is_wanted in wanted]
        return None, base_gradient, None, None, *rest

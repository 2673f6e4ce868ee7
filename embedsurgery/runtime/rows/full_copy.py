"""A full copy of a table with the live rows in it, whose gradient goes to the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from embedsurgery.errors import AttachmentError
from embedsurgery.runtime.rows.rows import Rows
from embedsurgery.runtime.rows.sparse_lookup import is_transformed
from embedsurgery.runtime.rows.whole_tables import has_whole_tables, insert_rows, tensors_of


def full_copy(base: torch.Tensor, rows: Sequence[Rows]) -> torch.Tensor:
    """Return a copy of a table with live rows in it.

    Args:
        base: The table, (V, D).
        rows: The live rows.

    Returns:
        (V, D), in memory of its own.

    Raises:
        UnsupportedError: The rows are sharded here and need a gradient.
    """
    new = [tensors_of(part) for part in rows]
    # Plain operations: the compiler fuses them, and they have derivatives of every order and mode.
    if torch.compiler.is_compiling() or is_transformed():
        for number, part in enumerate(rows):
            if part.samples is not None:  # a copy is right for some samples only, so the result is NaN, not wrong
                new[number] = [torch.full_like(values, torch.nan) for values in new[number]]
        return _insert_all(base, rows, new)
    with torch.no_grad():
        if has_whole_tables(rows):
            made = _insert_all(base, rows, new)
        else:
            made = base.clone()
            for part, (values,) in zip(rows, new, strict=True):
                made.index_copy_(0, part.indices, values.to(base.dtype))
    return with_gradient(made, base, rows)


def _insert_all(base: torch.Tensor, rows: Sequence[Rows], new: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    for part, tensors in zip(rows, new, strict=True):
        base = insert_rows(base, part, tensors)
    return base


def values_of(rows: Sequence[Rows]) -> list[torch.Tensor]:
    """Return all tensors of rows, as plain tensors."""
    return [tensor for part in rows for tensor in tensors_of(part)]


def with_gradient(
    shown: torch.Tensor, base: torch.Tensor, rows: Sequence[Rows], transposed: bool = False
) -> torch.Tensor:
    """Return the values of ``shown``, with a gradient that goes to a table and to the rows in it.

    It saves nothing that a backward frees, so several backwards may run through it, as with gradient checkpointing.

    Args:
        shown: The values, (V, D), or (D, V) if transposed.
        base: The table, in the shape of ``shown``.
        rows: The live rows.
        transposed: Whether both are transposed.
    """
    new = values_of(rows)
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in (base, *new)):
        return shown
    found: torch.Tensor
    if has_whole_tables(rows):
        found = _Changed.apply(shown, base, transposed, tuple(rows), *new)  # type: ignore[no-untyped-call]
        return found
    indices = [part.indices for part in rows]
    found = _WithRows.apply(shown, base, transposed, len(rows), *indices, *new)  # type: ignore[no-untyped-call]
    return found


class _WithRows(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(shown: torch.Tensor, base: torch.Tensor, *_: Any) -> torch.Tensor:
        return shown.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, _, ctx.transposed, count, *parts = inputs
        ctx.indices = parts[:count]
        ctx.dtypes = [part.dtype for part in parts[count:]]
        ctx.like = output.shape, output.dtype, output.device

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> torch.Tensor:
        shape, dtype, device = ctx.like
        base = tangents[1]
        made = torch.zeros(shape, dtype=dtype, device=device) if base is None else base
        made = made.t() if ctx.transposed else made
        for i, tangent in zip(ctx.indices, tangents[4 + len(ctx.indices) :], strict=True):
            new = made.new_zeros((i.numel(), made.shape[1])) if tangent is None else tangent.to(dtype)
            made = made.index_copy(0, i, new)
        return made.t() if ctx.transposed else made

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        whole = gradients[0].t() if ctx.transposed else gradients[0]
        rows = [whole.index_select(0, i).to(dtype) for i, dtype in zip(ctx.indices, ctx.dtypes, strict=True)]
        base = None
        if ctx.needs_input_grad[1]:
            base = whole
            for i in ctx.indices:
                base = base.index_fill(0, i, 0)
            base = base.t() if ctx.transposed else base
        return None, base, None, None, *[None] * len(ctx.indices), *rows


class _Changed(torch.autograd.Function):
    """For changes of whole tables: the backward computes the change again, and autograd its gradient."""

    @staticmethod
    def forward(
        ctx: Any, shown: torch.Tensor, base: torch.Tensor, transposed: bool, rows: Any, *new: Any
    ) -> torch.Tensor:
        ctx.transposed, ctx.rows, ctx.base, ctx.new = transposed, rows, base, new
        ctx.versions = [tensor._version for tensor in new]
        return shown.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        if ctx.versions != [tensor._version for tensor in ctx.new]:
            raise AttachmentError(
                "rows were changed in place between a forward and its backward",
                hint="step the optimizer after the backward",
            )
        needs = (ctx.needs_input_grad[1], *ctx.needs_input_grad[4:])
        inputs = [t.detach().requires_grad_(n) for t, n in zip((ctx.base, *ctx.new), needs, strict=True)]
        counts = [len(tensors_of(part)) for part in ctx.rows]
        given = iter(inputs[1:])
        with torch.enable_grad():
            base = inputs[0].t() if ctx.transposed else inputs[0]
            made = _insert_all(base, ctx.rows, [[next(given) for _ in range(count)] for count in counts])
            made = made.t() if ctx.transposed else made
            needed = [tensor for tensor, is_needed in zip(inputs, needs, strict=True) if is_needed]
            found = iter(torch.autograd.grad(made, needed, gradients[0].to(made.dtype), allow_unused=True))
        base_gradient, *rest = [next(found) if is_needed else None for is_needed in needs]
        return None, base_gradient, None, None, *rest

"""The product of a head with many new rows that are consecutive: as large as a dense model's, without a copy.

Columns that are replaced (``columns.py``) cost two products over the K rows that a dense model has not. Where the rows
are consecutive they cut the weight in three, and three products into one tensor do what one over a dense weight does.
The module itself still runs: what lies over its weight while it does answers its ``F.linear``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from embedsurgery.runtime.rows.rows import Rows
from embedsurgery.runtime.rows.sparse_lookup import is_eager, shared
from embedsurgery.runtime.rows.whole_tables import TableRows
from embedsurgery.tensors.sharded import is_sharded

_MANY = 1 / 128
"""The share of the table from which its rows are many. Below, the two products are lost in the one over the table."""

_ALIGNED = 8
"""Columns of logits at whose multiples an accelerator's products begin at full speed."""


class _Here(threading.local):
    sliced = False


_here = _Here()
"""Whether this thread's head has been given what lies over a weight."""


class SlicedWeight(torch.Tensor):
    """Is a weight for everything but the one ``F.linear`` that a plain head calls.

    Attributes:
        weight: What it lies over, (V, D).
        rows: The new rows, K consecutive ones.
    """

    weight: torch.Tensor
    rows: Rows

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and len(args) == 3 and isinstance(args[1], SlicedWeight) and _fits(*args):
            hidden, cover, bias = args
            rows = shared(cover.rows).to(cover.weight.dtype)
            _here.sliced = True
            return _Sliced.apply(hidden, rows, cover.weight, cover.rows.first, bias)  # type: ignore[no-untyped-call]
        args, kwargs = tree_map(lambda one: one.weight if isinstance(one, SlicedWeight) else one, (args, kwargs))
        return func(*args, **kwargs)


def sliced(module: nn.Module, weight: nn.Parameter, live: list[Rows]) -> SlicedWeight | None:
    """What to lay over a head's weight while it runs, if that makes it right and cheaper.

    Args:
        module: The head.
        weight: Its weight, (V, D), as it is now.
        live: The rows that are live for it.
    """
    rows = live[0] if len(live) == 1 else None
    if rows is None or isinstance(rows, TableRows) or rows.first is None or rows.samples is not None:
        return None
    if not is_eager() or not torch.is_grad_enabled() or weight.requires_grad or weight.dim() != 2:
        return None
    count, size = rows.values.shape[0], weight.shape[0]
    ends = (rows.first, rows.first + count)
    if count < size * _MANY or (weight.device.type != "cpu" and any(end % _ALIGNED and end < size for end in ends)):
        return None
    if type(module).forward is not nn.Linear.forward or "forward" in module.__dict__:
        return None
    if any(is_sharded(part) or part.device != weight.device for part in (rows.values, weight)):
        return None
    cover = weight.detach().as_subclass(SlicedWeight)
    cover.weight, cover.rows = weight, rows
    return cover


def uncover(module: nn.Module, parameter: str) -> None:
    """Take off what `sliced` gave, where that lies over a weight; it stays there if a forward is interrupted."""
    if isinstance(module.__dict__.get(parameter), SlicedWeight):
        module.__dict__.pop(parameter, None)  # another thread may have done so


def was_sliced() -> bool:
    """Whether a head that has just run here has the rows in its logits already; asked once for each run.

    Neither what lies over the weight says so, which is all threads', nor the logits, which a hook may have changed.
    """
    if torch.compiler.is_compiling():
        return False
    found, _here.sliced = _here.sliced, False
    return found


def _fits(hidden: Any, cover: SlicedWeight, bias: torch.Tensor | None) -> bool:
    """Whether nothing but the plain product is asked for, in the weight's own dtype."""
    plain = type(hidden) in (torch.Tensor, nn.Parameter) and hidden.dim() > 0 and hidden.dtype == cover.dtype
    wanted = plain and (hidden.requires_grad or cover.rows.values.requires_grad)
    return wanted and not torch.is_autocast_enabled(hidden.device.type) and (bias is None or not bias.requires_grad)


class _Sliced(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, start: int, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, rows, weight)
        ctx.start = start
        logits = hidden.new_empty(*hidden.shape[:-1], weight.shape[0])
        flat, out = hidden.reshape(-1, hidden.shape[-1]), logits.view(-1, weight.shape[0])
        for first, part in _slices(rows, weight, start):
            columns = out.narrow(1, first, part.shape[0])
            if bias is None:
                torch.mm(flat, part.t(), out=columns)
            else:
                torch.addmm(bias.narrow(0, first, part.shape[0]), flat, part.t(), out=columns)
        return logits

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        hidden, rows, weight = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, weight.shape[0])
        to_hidden = to_rows = None
        if ctx.needs_input_grad[0]:
            for first, part in _slices(rows, weight, ctx.start):
                columns = gradient.narrow(1, first, part.shape[0])
                to_hidden = columns @ part if to_hidden is None else torch.addmm(to_hidden, columns, part)
            assert to_hidden is not None
            to_hidden = to_hidden.view(hidden.shape)
        if ctx.needs_input_grad[1]:
            to_rows = gradient.narrow(1, ctx.start, rows.shape[0]).t() @ hidden.reshape(-1, hidden.shape[-1])
        return to_hidden, to_rows, None, None, None


def _slices(rows: torch.Tensor, weight: torch.Tensor, start: int) -> Iterator[tuple[int, torch.Tensor]]:
    """The weight with the rows in the place of its own, in parts: where each begins, and the part, (n, D)."""
    end = start + rows.shape[0]
    parts = ((0, weight.narrow(0, 0, start)), (start, rows), (end, weight.narrow(0, end, weight.shape[0] - end)))
    return (part for part in parts if len(part[1]))

"""Computes a head's logits with many consecutive new rows: in three products into one tensor, without a copy.

Replacing columns (``columns.py``) costs two products over the K rows more than a dense model. Consecutive rows cut the
weight into three parts, so three products cost as much as the one of a dense weight. The module itself still runs: its
weight is covered by a `SlicedWeight`, which computes the module's ``F.linear``.
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
from embedsurgery.runtime.rows.sparse_lookup import is_eager, values_for_head
from embedsurgery.runtime.rows.whole_tables import TableRows
from embedsurgery.tensors.sharded import is_sharded

_MANY = 1 / 128
"""The share of the table from which its rows are many. Below, the cost of the two products is negligible."""

_ALIGNED = 8
"""Products on an accelerator are fastest if they start at a column that is a multiple of this."""


class _Here(threading.local):
    sliced = False


_here = _Here()
"""Whether the head that ran last in this thread has used a `SlicedWeight`."""


class SlicedWeight(torch.Tensor):
    """A weight with new rows for the one ``F.linear`` that a plain head calls; for all else, the base's weight.

    Attributes:
        weight: The base's weight, (V, D).
        rows: The new rows, K consecutive ones.
    """

    weight: torch.Tensor
    rows: Rows

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and len(args) == 3 and isinstance(args[1], SlicedWeight) and _is_plain_product(*args):
            hidden, cover, bias = args
            rows = values_for_head(cover.rows).to(cover.weight.dtype)
            _here.sliced = True
            return _Sliced.apply(hidden, rows, cover.weight, cover.rows.run_start, bias)  # type: ignore[no-untyped-call]
        args, kwargs = tree_map(lambda one: one.weight if isinstance(one, SlicedWeight) else one, (args, kwargs))
        return func(*args, **kwargs)


def make_sliced_weight(module: nn.Module, weight: nn.Parameter, live: list[Rows]) -> SlicedWeight | None:
    """Return a cover for a head's weight while it runs, or None if it would not be right, or not cheaper.

    Args:
        module: The head.
        weight: Its present weight, (V, D).
        live: Its live rows.
    """
    rows = live[0] if len(live) == 1 else None
    if rows is None or isinstance(rows, TableRows) or rows.run_start is None or rows.samples is not None:
        return None
    if not is_eager() or not torch.is_grad_enabled() or weight.requires_grad or weight.dim() != 2:
        return None
    count, size = rows.values.shape[0], weight.shape[0]
    ends = (rows.run_start, rows.run_start + count)
    if count < size * _MANY or (weight.device.type != "cpu" and any(end % _ALIGNED and end < size for end in ends)):
        return None
    if type(module).forward is not nn.Linear.forward or "forward" in module.__dict__:
        return None
    if any(is_sharded(part) or part.device != weight.device for part in (rows.values, weight)):
        return None
    cover = weight.detach().as_subclass(SlicedWeight)
    cover.weight, cover.rows = weight, rows
    return cover


def remove_sliced_weight(module: nn.Module, parameter: str) -> None:
    """Uncover a weight that a `SlicedWeight` covers, also one that an interrupted forward has left."""
    if isinstance(module.__dict__.get(parameter), SlicedWeight):
        module.__dict__.pop(parameter, None)  # with a default, as another thread may have done it


def take_sliced_flag() -> bool:
    """Whether the head that ran last in this thread has the rows in its logits; resets the flag.

    The weight's cover cannot show it, as all threads share it, nor can the logits, which a hook may have replaced.
    """
    if torch.compiler.is_compiling():
        return False
    found, _here.sliced = _here.sliced, False
    return found


def _is_plain_product(hidden: Any, cover: SlicedWeight, bias: torch.Tensor | None) -> bool:
    """Whether the call is a plain product in the weight's dtype that needs a gradient of hidden states or rows."""
    plain = type(hidden) in (torch.Tensor, nn.Parameter) and hidden.dim() > 0 and hidden.dtype == cover.dtype
    needs_grad = plain and (hidden.requires_grad or cover.rows.values.requires_grad)
    return needs_grad and not torch.is_autocast_enabled(hidden.device.type) and (bias is None or not bias.requires_grad)


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
    """Yield the weight with the rows in it, in parts: the start of each part, and the part, (n, D)."""
    end = start + rows.shape[0]
    parts = ((0, weight.narrow(0, 0, start)), (start, rows), (end, weight.narrow(0, end, weight.shape[0] - end)))
    return (part for part in parts if len(part[1]))

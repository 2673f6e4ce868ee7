"""Batches that mix adapters: finds the entries of a tensor at a site that belong to each sample.

A site sees a tensor, not the batch. Most models keep the samples in the first axis, some flatten other axes into it,
and generation repeats each sample for its beams. A few models put the tokens first (XLNet), or keep only some of them
(ModernBERT). So the shapes of the model's inputs are noted while it runs, and a tensor whose first axis does not hold
the samples is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from math import prod
from operator import mul
from typing import Any

import torch
from torch import nn

from embedsurgery.errors import UnsupportedError
from embedsurgery.runtime.hooks import tensors_in
from embedsurgery.runtime.rows.rows import Rows


class Batch:
    """The inputs of the attached model, inside `Attachment.per_sample`. It has the model's pre-hook and post-hook.

    Attributes:
        mixed: Whether the model is inside `Attachment.per_sample`.
        first_axes: Sizes of the inputs' first axes.
        first_sizes: For each input the products of its first axis, its first two axes, and so on: possible sizes of the
            first axis of a tensor that keeps the samples first.
        token_counts: Products of the first two axes of the ids, or of all inputs if there are no ids.
        ids: The inputs that may be token ids, int64 or int32 (B, T).
    """

    def __init__(self) -> None:
        self.mixed = False
        self._clear()

    def _clear(self) -> None:
        self.first_axes: frozenset[int] = frozenset()
        self.first_sizes: frozenset[int] = frozenset()
        self.token_counts: frozenset[int] = frozenset()
        self.ids: list[torch.Tensor] = []

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note the inputs; a pre-hook of the model."""
        if not self.mixed or torch.compiler.is_compiling():
            return
        inputs = list(tensors_in((args, kwargs)))
        self.first_axes = frozenset(tensor.shape[0] for tensor in inputs if tensor.dim())
        self.first_sizes = frozenset(size for tensor in inputs for size in accumulate(tensor.shape, mul))
        self.ids = [t for t in inputs if t.dim() == 2 and t.dtype in (torch.int64, torch.int32)]
        by_token = self.ids or [tensor for tensor in inputs if tensor.dim()]
        self.token_counts = frozenset(prod(tensor.shape[:2]) for tensor in by_token)

    def leave(self, *_: Any) -> None:
        """Drop the inputs; a post-hook of the model."""
        if self.first_sizes:
            self._clear()

    def mask(self, samples: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        """Spread a mask of samples over a tensor whose first axis holds each sample once, or n times in succession.

        Only generation repeats samples, for its beams. In training there is one name for each.

        Args:
            samples: bool (B,).
            tensor: Ids or logits at a site.

        Returns:
            bool, (size of the first axis, 1, ...).

        Raises:
            UnsupportedError: The first axis does not hold the samples.
        """
        size, count = (tensor.shape[0] if tensor.dim() else 0), samples.numel()
        fits = size % count == 0 and (size == count or not self.first_sizes or size in self.first_sizes)
        if torch.is_grad_enabled() and self.first_axes and count not in self.first_axes:
            fits = False
        # A tensor with one row per token, but not for all tokens: the samples of the rows are unknown. There may even
        # be as many rows as samples, as in ModernBERT, which keeps only labelled tokens.
        is_flat = tensor.dim() == (2 if tensor.is_floating_point() else 1)
        if self.token_counts and is_flat and size not in self.token_counts:
            fits = False
        if not tensor.dim() or not fits or self._puts_tokens_first(tensor):
            raise UnsupportedError(
                "the batch does not have the samples of attachment.per_sample()",
                where="first axis of a site's tensor",
                expected=f"{count} samples, or each of them equally often",
                found=f"a tensor of shape {list(tensor.shape)}",
                hint="give one adapter name (or None) per sample; if the model does not keep the samples in the first "
                "axis, run the samples of each adapter separately",
            )
        return samples.repeat_interleave(size // count).reshape(-1, *[1] * (tensor.dim() - 1))

    def _puts_tokens_first(self, ids: torch.Tensor) -> bool:
        """Whether ids are an input transposed. It is told from the values if the shape fits: one axis, or a square."""
        if ids.is_floating_point() or ids.dim() > 2:
            return False
        alike = [one for one in self.ids if one.numel() == ids.numel() and (ids.dim() == 1 or one.is_same_size(ids))]
        if any(torch.equal(one.reshape(ids.shape), ids) for one in alike):
            return False
        return any(torch.equal(one.t().reshape(ids.shape), ids) for one in alike)

    def __getstate__(self) -> dict[str, Any]:
        empty: frozenset[int] = frozenset()
        return {"mixed": False, "first_axes": empty, "first_sizes": empty, "token_counts": empty, "ids": []}


@contextmanager
def per_sample_rows(rows: Sequence[tuple[str, Rows]], names: Sequence[str | None]) -> Iterator[None]:
    """Limit rows to the samples of a batch that name their adapter, inside the block.

    Args:
        rows: Adapter names and their rows.
        names: The adapter of each sample.
    """
    outside = [(part, part.samples, part.names) for _, part in rows]
    try:
        for own, part in rows:
            part.samples = torch.tensor([name == own for name in names], device=part.indices.device)
            part.names = tuple(names)
        yield
    finally:
        for part, samples, before in outside:
            part.samples, part.names = samples, before

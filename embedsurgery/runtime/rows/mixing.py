"""Batches that mix adapters: which entries of a tensor at a site belong to which samples.

A site sees a tensor and not the batch. Most models keep the samples first, some flatten axes onto them, generation
repeats each for its beams; a few put the tokens first (XLNet), or keep some of the tokens only. So what the whole model
was given is remembered while it runs, and a tensor whose first axis is not its samples is refused.
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
    """What the attached model was given, while a batch mixes adapters: its pre and post hooks.

    Attributes:
        mixed: Whether it does.
    """

    def __init__(self) -> None:
        self.mixed = False
        self._forget()

    def _forget(self) -> None:
        self.sizes: frozenset[int] = frozenset()
        self.firsts: frozenset[int] = frozenset()
        self.tokens: frozenset[int] = frozenset()
        self.texts: list[torch.Tensor] = []

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Pre-hook of the model."""
        if not self.mixed or torch.compiler.is_compiling():
            return
        given = list(tensors_in((args, kwargs)))
        self.firsts = frozenset(tensor.shape[0] for tensor in given if tensor.dim())
        self.sizes = frozenset(size for tensor in given for size in accumulate(tensor.shape, mul))
        self.texts = [t for t in given if t.dim() == 2 and t.dtype in (torch.int64, torch.int32)]
        by_token = self.texts or [tensor for tensor in given if tensor.dim()]
        self.tokens = frozenset(prod(tensor.shape[:2]) for tensor in by_token)

    def leave(self, *_: Any) -> None:
        """Post-hook of the model."""
        if self.sizes:
            self._forget()

    def mask(self, samples: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        """The mask of samples spread over a tensor whose first axis holds each sample once, or n times together.

        Only generation gives a model each sample n times, for its beams: in training there is a name for each.

        Args:
            samples: bool (B,).
            tensor: Ids or logits at a site.

        Returns:
            bool, (first axis, 1, ...).

        Raises:
            UnsupportedError: The first axis is something else.
        """
        count, known = (tensor.shape[0] if tensor.dim() else 0), samples.numel()
        fits = count % known == 0 and (count == known or not self.sizes or count in self.sizes)
        if torch.is_grad_enabled() and self.firsts and known not in self.firsts:
            fits = False
        if self.tokens and tensor.dim() == (2 if tensor.is_floating_point() else 1) and count not in self.tokens:
            fits = False  # some of the tokens, of nobody knows which samples
        if not tensor.dim() or not fits or self._is_turned(tensor):
            raise UnsupportedError(
                "the batch is not that of att.per_sample()",
                where="first axis of a site's tensor",
                expected=f"{known} samples, or each of them as many times",
                found=f"a tensor of shape {list(tensor.shape)}",
                hint="give one adapter name (or None) for each sample; where the model puts other "
                "things first, run the samples of each adapter by themselves",
            )
        return samples.repeat_interleave(count // known).reshape(-1, *[1] * (tensor.dim() - 1))

    def _is_turned(self, ids: torch.Tensor) -> bool:
        """Whether ids whose shape tells nothing have come with the tokens first: in one axis, or as many as samples."""
        if ids.is_floating_point() or ids.dim() > 2:
            return False
        same = [
            text for text in self.texts if text.numel() == ids.numel() and (ids.dim() == 1 or text.is_same_size(ids))
        ]
        if any(torch.equal(text.reshape(ids.shape), ids) for text in same):
            return False
        return any(torch.equal(text.t().reshape(ids.shape), ids) for text in same)

    def __getstate__(self) -> dict[str, Any]:
        return {"mixed": False, "sizes": frozenset(), "firsts": frozenset(), "tokens": frozenset(), "texts": []}


@contextmanager
def each_its_own(rows: Sequence[tuple[str, Rows]], names: Sequence[str | None]) -> Iterator[None]:
    """Inside, rows are for those samples of a batch that name their adapter.

    Args:
        rows: Adapter's name and rows.
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

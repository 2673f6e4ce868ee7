"""Soft prompts that are live on a model: virtual tokens before its input, which whoever calls the model does not see.

What reads the tokens is given ids that stand for virtual tokens among the real ones, masks and positions that know
them, and its lookup gives their vectors. So the model computes what it will when the prompt is baked into it, and
heads, losses and poolers, which come after, get hidden states of the input's length. What a hook does to one call is
in ``stack_hooks.py`` and ``outer_hooks.py``; ``installation.py`` puts the hooks on and off. What they look at is here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from embedsurgery.errors import UnsupportedError
from embedsurgery.graph import EmbeddingGraph
from embedsurgery.runtime.calls import Calls
from embedsurgery.runtime.prompts.caches import CachedPrompt
from embedsurgery.runtime.prompts.layout import FIRST, Layout
from embedsurgery.runtime.prompts.stacks import Stack, stacks_of
from embedsurgery.runtime.rows.rows import Rows
from embedsurgery.runtime.rows.sharded import plain_rows
from embedsurgery.surgeries.soft_prompt.surgery import PromptOverride
from embedsurgery.tensors.raw import RawArray


class PromptEmbedding(Rows):
    """The virtual tokens of one adapter: indices (B, n) -> their vectors (B, n, D).

    Attributes:
        values: Parameter (n x submodules, D), fp32; rounded to the dtype of real tokens' vectors in the forward.
        count: n.
        stacks: Names of the stacks that they stand in front of, in the order of their rows.
        keep: Whether outputs keep the prompt's positions.
    """

    def __init__(self, values: RawArray, override: PromptOverride, device: torch.device) -> None:
        super().__init__(values, (), device)
        self.count = override.count
        self.stacks = override.submodules
        self.keep = override.keep

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """Vectors by number of the virtual token."""
        return F.embedding(indices, plain_rows(self.values, "the soft prompt"))

    def start(self, stack: str) -> int:
        """The first row of a stack's prompt."""
        return self.stacks.index(stack) * self.count


@dataclass(frozen=True)
class StackPrompt:
    """What stands in front of one stack just now.

    Attributes:
        count: N, the length of the longest prompt.
        names: The adapter of each sample, or the one of all.
        ids: Ids of the virtual tokens: (N,), or (samples, N) where each sample has its own, fillers in front.
        lengths: Length of each sample's prompt, int64 (samples,); None where all have the same.
        keep: Whether outputs keep the prompt's positions.
    """

    count: int
    names: tuple[str | None, ...]
    ids: torch.Tensor
    lengths: torch.Tensor | None
    keep: bool

    def of_batch(self, batch: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Ids and lengths for a batch in which each sample may stand several times.

        Raises:
            UnsupportedError: A batch of another number of samples.
        """
        if self.lengths is None:
            return self.ids, None
        samples = self.lengths.numel()
        if batch % samples:
            raise UnsupportedError(
                "the batch is not that of att.per_sample()",
                where="input_ids",
                found=batch,
                expected=f"{samples} samples, or a multiple",
                hint="give one adapter name (or None) for each sample",
            )
        times = batch // samples
        return self.ids.repeat_interleave(times, 0), self.lengths.repeat_interleave(times)

    def layout(self, batch: int, length: int, first: torch.Tensor | None, rolled: bool) -> Layout:
        """Where the prompts stand in a batch."""
        return Layout(self.count, batch, length, first, self.of_batch(batch)[1], rolled)


@dataclass(eq=False)
class StackCall:
    """One running call of a stack.

    Attributes:
        owner: The hooks that began it.
        prompt: The prompt in front of the stack.
        layout: Where the virtual tokens stand, if this call inserted them.
        seat: The seat of the prompt in a cache that holds it already.
        asked: The caller's ``logits_to_keep``, where the hooks handle it.
        plain: How many virtual tokens each sample begins with in the ids that are looked up next, if nothing else is
            among them; else 0.
        shape: Shape of the ids that the stack was given.
        ids: Ids that the running lookup was given.
    """

    owner: object
    prompt: StackPrompt
    layout: Layout | None = None
    seat: CachedPrompt | None = None
    asked: Any = None
    plain: int = 0
    shape: tuple[int, ...] = ()
    ids: torch.Tensor | None = None


@dataclass(eq=False)
class HeadCall:
    """One running call of the root module, whose head handles the prompt.

    Attributes:
        kept: How many entries the head was given for the prompt, where outputs keep it.
        one_more: Whether the head wants an entry that predicts the first token of the input.
    """

    kept: int = 0
    one_more: bool = False


class LivePrompts:
    """Which soft prompts of an attachment are live, and the calls that are running. The hooks read this.

    Args:
        model: The attached model.
        graph: Its graph.

    Attributes:
        stacks: The modules of the model that read tokens.
        stack_calls: Running calls of those.
        head_calls: Running calls of the root, where its head handles the prompt.
    """

    def __init__(self, model: nn.Module, graph: EmbeddingGraph) -> None:
        self._model = (model,)  # in a tuple, so that the model does not become a submodule
        self.stacks: tuple[Stack, ...] = stacks_of(model, graph)
        self._live: list[tuple[str, PromptEmbedding]] = []
        self.stack_calls: Calls[StackCall] = Calls()
        self.head_calls: Calls[HeadCall] = Calls()

    @property
    def model(self) -> nn.Module:
        """The attached model."""
        return self._model[0]

    def refresh(self, live: Iterable[tuple[str, PromptEmbedding]]) -> None:
        """Say which prompts are live."""
        self._live = list(live)
        self.stack_calls.settle()
        self.head_calls.settle()

    def of(self, stack: str) -> StackPrompt | None:
        """What stands in front of a stack now; None where nothing does.

        Raises:
            UnsupportedError: Prompts of one batch that keep their positions, and others that do not.
        """
        found: list[tuple[str, PromptEmbedding, int]] = []
        begin = 0
        for name, prompt in self._live:
            if stack in prompt.stacks:
                found.append((name, prompt, FIRST - begin - prompt.start(stack)))
            begin += prompt.values.shape[0]
        if not found:
            return None
        count = max(prompt.count for _, prompt, _ in found)
        name, prompt, first = found[0]
        device = prompt.values.device
        if prompt.samples is None:
            return StackPrompt(count, (name,), first - torch.arange(count, device=device), None, prompt.keep)
        keeps = {other.keep for _, other, _ in found}
        if len(keeps) > 1:
            raise UnsupportedError(
                "a batch cannot mix prompts that are kept in the outputs and others",
                where=", ".join(name for name, *_ in found),
                hint="give all of them the same keep_prompt",
            )
        ids = torch.full((len(prompt.names), count), self.filler(), device=device)
        lengths = torch.zeros(len(prompt.names), dtype=torch.int64, device=device)
        for _, prompt, first in found:
            assert prompt.samples is not None
            own = first - torch.arange(prompt.count, device=device)
            row = F.pad(own, (count - prompt.count, 0), value=self.filler())
            ids = torch.where(prompt.samples[:, None], row, ids)
            lengths = torch.where(prompt.samples, prompt.count, lengths)
        return StackPrompt(count, found[0][1].names, ids, lengths, keeps.pop())

    def filler(self) -> int:
        """The id of padding."""
        config: Any = getattr(self.model, "config", None)
        pad = getattr(config, "pad_token_id", None)
        return pad if isinstance(pad, int) and pad >= 0 else 0

    def vectors(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The vectors of virtual tokens by their ids, (..., D); those of other ids have no meaning."""
        parts = [plain_rows(prompt.values, "the soft prompt").to(dtype) for _, prompt in self._live]
        table = parts[0] if len(parts) == 1 else torch.cat(parts)
        return F.embedding((FIRST - ids).clamp(0, table.shape[0] - 1), table)

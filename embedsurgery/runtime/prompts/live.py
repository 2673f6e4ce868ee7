"""State of the soft prompts that are live on a model, which the hooks read: prompts, and the calls that are running.

The module that reads the tokens gets ids of virtual tokens inserted among the real ones, and masks and positions that
include them; its lookup returns the virtual tokens' vectors. So the model computes what it will after the prompt is
baked into it. Heads, losses and poolers, which come after, get hidden states of the input's length, so that the caller
sees nothing of the prompt.

``stack_hooks.py`` and ``outer_hooks.py`` are the hooks, ``installation.py`` registers and removes them.
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
from embedsurgery.runtime.calls import ActiveCalls
from embedsurgery.runtime.prompts.caches import CachedPrompt
from embedsurgery.runtime.prompts.layout import FIRST_ID, PromptLayout
from embedsurgery.runtime.prompts.stacks import Stack, find_stacks
from embedsurgery.runtime.rows.rows import Rows
from embedsurgery.runtime.rows.sharded import plain_rows
from embedsurgery.surgeries.soft_prompt.surgery import PromptOverride
from embedsurgery.tensors.raw import RawArray


class PromptEmbedding(Rows):
    """The virtual tokens of one adapter: their numbers (B, n) -> their vectors (B, n, D).

    Attributes:
        values: Parameter (n x submodules, D), fp32; rounded to the dtype of real tokens' vectors in the forward.
        count: n.
        stacks: Names of the stacks that get a prompt, in the order of their rows.
        keep: Whether outputs keep the prompt's positions.
    """

    def __init__(self, values: RawArray, override: PromptOverride, device: torch.device) -> None:
        super().__init__(values, (), device)
        self.count = override.count
        self.stacks = override.submodules
        self.keep = override.keep

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the vectors of virtual tokens by their number."""
        return F.embedding(indices, plain_rows(self.values, "the soft prompt"))

    def first_row(self, stack: str) -> int:
        """Return the first row of a stack's prompt."""
        return self.stacks.index(stack) * self.count


@dataclass(frozen=True)
class StackPrompt:
    """The live prompts of one stack.

    Attributes:
        count: N, the length of the longest prompt.
        names: The adapter of each sample, or one for all.
        ids: Ids of the virtual tokens, int64 (N,), or (samples, N) with fillers in front if each sample has its own.
        lengths: Length of each sample's prompt, int64 (samples,); None if one prompt serves all.
        keep: Whether outputs keep the prompt's positions.
    """

    count: int
    names: tuple[str | None, ...]
    ids: torch.Tensor
    lengths: torch.Tensor | None
    keep: bool

    def for_batch(self, batch: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return ids and lengths for a batch, in which each sample may be repeated, as beam search does.

        Raises:
            UnsupportedError: The batch is not a multiple of the samples.
        """
        if self.lengths is None:
            return self.ids, None
        samples = self.lengths.numel()
        if batch % samples:
            raise UnsupportedError(
                "the batch does not have the samples of att.per_sample()",
                where="input_ids",
                found=batch,
                expected=f"{samples} samples, or a multiple",
                hint="give one adapter name (or None) for each sample",
            )
        times = batch // samples
        return self.ids.repeat_interleave(times, 0), self.lengths.repeat_interleave(times)

    def layout(self, batch: int, length: int, first: torch.Tensor | None, rolled: bool) -> PromptLayout:
        """Return the layout of the prompts in a batch."""
        return PromptLayout(self.count, batch, length, first, self.for_batch(batch)[1], rolled)


@dataclass(eq=False)
class StackCall:
    """A running call of a stack.

    Attributes:
        owner: The hooks that began it.
        prompt: The stack's prompt.
        layout: The layout, if this call inserted the virtual tokens.
        cached: The record of the prompt, if the cache holds it already.
        logits_to_keep: The caller's ``logits_to_keep``, if the hooks apply it instead of the stack.
        leading: Number of virtual tokens that every sample begins with in the next lookup's ids, if no others are among
            them; else 0.
        shape: Shape of the ids that the stack got.
        ids: Ids that the running lookup got.
    """

    owner: object
    prompt: StackPrompt
    layout: PromptLayout | None = None
    cached: CachedPrompt | None = None
    logits_to_keep: Any = None
    leading: int = 0
    shape: tuple[int, ...] = ()
    ids: torch.Tensor | None = None


@dataclass(eq=False)
class HeadCall:
    """A running call of the root module, whose head needs entries for the prompt.

    Attributes:
        room: Number of entries for the prompt that the head's arguments got, if outputs keep it.
        extra_entry: Whether the head gets an extra entry that predicts the first token of the input.
    """

    room: int = 0
    extra_entry: bool = False


class LivePrompts:
    """Tracks the live soft prompts of an attachment, and the running calls of its model.

    Args:
        model: The attached model.
        graph: Its graph.

    Attributes:
        stacks: The modules of the model that read tokens.
        stack_calls: Running calls of the stacks.
        head_calls: Running calls of the root whose head needs entries for the prompt.
    """

    def __init__(self, model: nn.Module, graph: EmbeddingGraph) -> None:
        self._model = (model,)  # in a tuple, so that the model does not become a submodule
        self.stacks: tuple[Stack, ...] = find_stacks(model, graph)
        self._live: list[tuple[str, PromptEmbedding]] = []
        self.stack_calls: ActiveCalls[StackCall] = ActiveCalls()
        self.head_calls: ActiveCalls[HeadCall] = ActiveCalls()

    @property
    def model(self) -> nn.Module:
        """The attached model."""
        return self._model[0]

    def refresh(self, live: Iterable[tuple[str, PromptEmbedding]]) -> None:
        """Set which prompts are live."""
        self._live = list(live)
        self.stack_calls.clear_compiled()
        self.head_calls.clear_compiled()

    def of_stack(self, stack: str) -> StackPrompt | None:
        """Return the live prompts of a stack, or None.

        Raises:
            UnsupportedError: Some prompts of the batch keep their positions in the outputs, and others do not.
        """
        found: list[tuple[str, PromptEmbedding, int]] = []
        begin = 0
        for name, prompt in self._live:
            if stack in prompt.stacks:
                found.append((name, prompt, FIRST_ID - begin - prompt.first_row(stack)))
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
                "a batch cannot mix soft prompts with different keep_prompt",
                where=", ".join(name for name, *_ in found),
                hint="give all of them the same keep_prompt",
            )
        ids = torch.full((len(prompt.names), count), self.filler_id(), device=device)
        lengths = torch.zeros(len(prompt.names), dtype=torch.int64, device=device)
        for _, prompt, first in found:
            assert prompt.samples is not None
            own = first - torch.arange(prompt.count, device=device)
            row = F.pad(own, (count - prompt.count, 0), value=self.filler_id())
            ids = torch.where(prompt.samples[:, None], row, ids)
            lengths = torch.where(prompt.samples, prompt.count, lengths)
        return StackPrompt(count, found[0][1].names, ids, lengths, keeps.pop())

    def filler_id(self) -> int:
        """Return the id of fillers: the padding id, or 0."""
        config: Any = getattr(self.model, "config", None)
        pad = getattr(config, "pad_token_id", None)
        return pad if isinstance(pad, int) and pad >= 0 else 0

    def vectors(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the vectors of virtual tokens by their ids, (..., D). Those of other ids are arbitrary."""
        parts = [plain_rows(prompt.values, "the soft prompt").to(dtype) for _, prompt in self._live]
        table = parts[0] if len(parts) == 1 else torch.cat(parts)
        return F.embedding((FIRST_ID - ids).clamp(0, table.shape[0] - 1), table)

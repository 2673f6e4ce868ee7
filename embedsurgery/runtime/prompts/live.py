"""Soft prompts that are live on a model: virtual tokens before its input, which whoever calls the model does not see.

What reads the tokens is given ids that stand for virtual tokens among the real ones, masks and positions that know
them, and its lookup gives their vectors. So the model computes what it will when the prompt is baked into it, and
heads, losses and poolers, which come after, get hidden states of the input's length. What a hook does to one call is
in ``prompt_hooks.py`` and ``prompt_around.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from embedsurgery.adapters.adapter import Adapter
from embedsurgery.errors import BaseMismatchError, ConfigError, UnsupportedError
from embedsurgery.graph import EmbeddingGraph
from embedsurgery.graph.config import position_limit
from embedsurgery.graph.wrappers import submodule
from embedsurgery.runtime.calls import Calls
from embedsurgery.runtime.hooks import Installed, after, before, guard, remove
from embedsurgery.runtime.prompts.layout import FIRST, Layout
from embedsurgery.runtime.prompts.outer_hooks import Decoding, Front, Heads, Parent, later_masks
from embedsurgery.runtime.prompts.stack_hooks import Call, PromptLookup, Reading
from embedsurgery.runtime.prompts.stacks import Stack, need, stacks_of
from embedsurgery.runtime.prompts.task_heads import refuse_other_head
from embedsurgery.runtime.rows.rows import Rows
from embedsurgery.runtime.rows.sharded import plain_rows
from embedsurgery.runtime.rows.unchanged import Unchanged
from embedsurgery.runtime.rows.whole_tables import rows_for
from embedsurgery.surgeries.soft_prompt.surgery import PromptOverride
from embedsurgery.surgeries.surgery import RowOverride
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
class Live:
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
            raise UnsupportedError("the batch is not that of att.rows()", where="input_ids", found=batch,
                                   expected=f"{samples} samples, or a multiple",
                                   hint="give one adapter name (or None) for each sample")  # fmt: skip
        times = batch // samples
        return self.ids.repeat_interleave(times, 0), self.lengths.repeat_interleave(times)

    def layout(self, batch: int, length: int, first: torch.Tensor | None, rolled: bool) -> Layout:
        """Where the prompts stand in a batch."""
        return Layout(self.count, batch, length, first, self.of_batch(batch)[1], rolled)


class Prompts:
    """The hooks of an attachment's soft prompts, and which of them are live.

    Args:
        model: The attached model.
        graph: Of it.
        guards: Pre-hooks for its root and every lookup.

    Attributes:
        stacks: What of the model reads tokens.
        reads: What reads tokens and runs just now.
        fronts: The root, where it runs just now and its head sees to the prompt.
    """

    def __init__(self, model: nn.Module, graph: EmbeddingGraph, guards: Sequence[Callable[..., Any]]) -> None:
        self._model = (model,)  # as in the attachment
        self._guards = guards
        self.stacks: tuple[Stack, ...] = stacks_of(model, graph)
        self._live: list[tuple[str, PromptEmbedding]] = []
        self._hooks: Installed = []
        self.reads: Calls[Call] = Calls()
        self.fronts: Calls[Front] = Calls()

    @property
    def model(self) -> nn.Module:
        """The attached model."""
        return self._model[0]

    def checked(self, overrides: Iterable[RowOverride], adapter: Adapter) -> tuple[RowOverride, ...]:
        """The overrides of an adapter, with the stacks that the submodules of a soft prompt mean here.

        Raises:
            UnsupportedError: The model has none of them.
            ConfigError: The prompt takes all positions that the model has.
            BaseMismatchError: It is of another width, or comes with a head that is not the model's.
        """
        return tuple(self._checked(o, adapter) if isinstance(o, PromptOverride) else o for o in overrides)

    def _checked(self, override: PromptOverride, adapter: Adapter) -> PromptOverride:
        stacks = need(self.stacks, override.submodules, self.model)
        width = adapter.raw[override.tensor].shape[1]
        for stack in stacks:
            limit = position_limit(getattr(submodule(self.model, stack.path), "config", None))
            if limit is not None and override.count >= limit:
                raise ConfigError("the soft prompt is too long for the model's positions", where=stack.path or "model",
                                  expected=f"fewer than {limit} virtual tokens", found=override.count)  # fmt: skip
            for path in stack.lookups:
                table = getattr(submodule(self.model, path), "weight", None)
                if isinstance(table, torch.Tensor) and table.dim() == 2 and table.shape[1] != width:
                    raise BaseMismatchError("the base has another width", where=path, expected=width,
                                            found=table.shape[1])  # fmt: skip
        refuse_other_head(self.model, adapter)
        return replace(override, submodules=tuple(stack.name for stack in stacks))

    def install(self) -> None:
        """Put the hooks on, unless they are."""
        if self._hooks:
            return
        try:
            self._put()
        except BaseException:  # a KeyboardInterrupt
            self.remove()
            raise

    def _put(self) -> None:
        model = self.model
        paths = dict.fromkeys(path for stack in self.stacks for path in stack.lookups)
        unchanged = Unchanged()
        watched = (*paths, *(path for stack in self.stacks for path, _ in stack.levels))
        unchanged.sites = [(path, submodule(model, path)) for path in watched]
        guard(self._hooks, model, self._guards)
        before(self._hooks, model, unchanged)
        for module in {id(m): m for m in (submodule(model, path) for path in paths)}.values():
            lookup = PromptLookup(self)
            guard(self._hooks, module, self._guards)
            before(self._hooks, module, lookup.enter)
            self._hooks.append((module, lookup.leave))
            module.register_forward_hook(lookup.leave, with_kwargs=True, always_call=True)  # after those of rows
        two = len(self.stacks) > 1
        for name, path, parameters in [(stack.name, *level) for stack in self.stacks for level in stack.levels]:
            module = submodule(model, path)
            if two and name == "decoder":
                before(self._hooks, module, Decoding(self, parameters).enter)
            reading = Reading(self, name, parameters, module, model, cuts=not (two and name == "encoder"))
            before(self._hooks, module, reading.enter)
            after(self._hooks, module, reading.leave, always=True)
        if two:
            parent = Parent(self, submodule(model, _common(self.stacks[0].path, self.stacks[1].path)))
            after(self._hooks, parent.module[0], parent.leave)
        elif self.stacks[0].path:
            heads = Heads(self, self.stacks[0], model)
            before(self._hooks, model, heads.enter)
            after(self._hooks, model, heads.leave, always=True)
        if hasattr(model, "prepare_inputs_for_generation"):
            model.__dict__["create_masks_for_generate"] = later_masks(self)

    def refresh(self, live: Iterable[tuple[str, PromptEmbedding]]) -> None:
        """Say which prompts are live."""
        self._live = list(live)
        self.reads.settle()
        self.fronts.settle()

    def remove(self) -> None:
        """Take everything off."""
        if self._hooks:
            self.model.__dict__.pop("create_masks_for_generate", None)
        self.refresh(())
        remove(self._hooks)

    def of(self, stack: str) -> Live | None:
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
            return Live(count, (name,), first - torch.arange(count, device=device), None, prompt.keep)
        keeps = {other.keep for _, other, _ in found}
        if len(keeps) > 1:
            raise UnsupportedError("a batch cannot mix prompts that are kept in the outputs and others",
                                   where=", ".join(name for name, *_ in found),
                                   hint="give all of them the same keep_prompt")  # fmt: skip
        ids = torch.full((len(prompt.names), count), self.filler(), device=device)
        lengths = torch.zeros(len(prompt.names), dtype=torch.int64, device=device)
        for _, prompt, first in found:
            assert prompt.samples is not None
            own = first - torch.arange(prompt.count, device=device)
            row = F.pad(own, (count - prompt.count, 0), value=self.filler())
            ids = torch.where(prompt.samples[:, None], row, ids)
            lengths = torch.where(prompt.samples, prompt.count, lengths)
        return Live(count, found[0][1].names, ids, lengths, keeps.pop())

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


def modules_for(
    overrides: Sequence[RowOverride], raw: Mapping[str, RawArray], devices: Sequence[torch.device]
) -> list[Rows]:
    """The trainable module of each override, in their order; arguments as of `whole_tables.rows_for`."""
    if not any(isinstance(override, PromptOverride) for override in overrides):
        return rows_for(overrides, raw, devices)
    prompts = [(o, d) for o, d in zip(overrides, devices, strict=True) if isinstance(o, PromptOverride)]
    assert len(prompts) == len(overrides), "a soft prompt changes no rows"
    return [PromptEmbedding(raw[override.tensor], override, device) for override, device in prompts]


def _common(one: str, other: str) -> str:
    parts = []
    for a, b in zip(one.split("."), other.split("."), strict=False):
        if a != b:
            break
        parts.append(a)
    return ".".join(parts)

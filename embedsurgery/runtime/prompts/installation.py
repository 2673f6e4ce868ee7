"""Puts the hooks of an attachment's soft prompts on its model and takes them off again.

What the hooks look at is in ``live.py``, what they do in ``stack_hooks.py`` and ``outer_hooks.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from embedsurgery.adapters.adapter import Adapter
from embedsurgery.errors import BaseMismatchError, ConfigError
from embedsurgery.graph.config import position_limit
from embedsurgery.graph.wrappers import submodule
from embedsurgery.runtime.hooks import Installed, after, before, guard, remove
from embedsurgery.runtime.prompts.live import LivePrompts, PromptEmbedding
from embedsurgery.runtime.prompts.outer_hooks import Decoding, Heads, Parent, later_masks
from embedsurgery.runtime.prompts.stack_hooks import PromptLookup, Reading
from embedsurgery.runtime.prompts.stacks import need
from embedsurgery.runtime.prompts.task_heads import refuse_other_head
from embedsurgery.runtime.rows.rows import Rows
from embedsurgery.runtime.rows.unchanged import Unchanged
from embedsurgery.runtime.rows.whole_tables import rows_for
from embedsurgery.surgeries.soft_prompt.surgery import PromptOverride
from embedsurgery.surgeries.surgery import RowOverride
from embedsurgery.tensors.raw import RawArray


class PromptHooks:
    """The hooks of an attachment's soft prompts.

    Args:
        prompts: Which prompts are live.
        guards: Pre-hooks for the root and every lookup.
    """

    def __init__(self, prompts: LivePrompts, guards: Sequence[Callable[..., Any]]) -> None:
        self._prompts = prompts
        self._guards = guards
        self._hooks: Installed = []

    def checked(self, overrides: Iterable[RowOverride], adapter: Adapter) -> tuple[RowOverride, ...]:
        """The overrides of an adapter, with the stacks that the submodules of a soft prompt mean here.

        Raises:
            UnsupportedError: The model has none of them.
            ConfigError: The prompt takes all positions that the model has.
            BaseMismatchError: It is of another width, or comes with a head that is not the model's.
        """
        return tuple(self._checked(o, adapter) if isinstance(o, PromptOverride) else o for o in overrides)

    def _checked(self, override: PromptOverride, adapter: Adapter) -> PromptOverride:
        stacks = need(self._prompts.stacks, override.submodules, self._prompts.model)
        width = adapter.raw[override.tensor].shape[1]
        for stack in stacks:
            limit = position_limit(getattr(submodule(self._prompts.model, stack.path), "config", None))
            if limit is not None and override.count >= limit:
                raise ConfigError(
                    "the soft prompt is too long for the model's positions",
                    where=stack.path or "model",
                    expected=f"fewer than {limit} virtual tokens",
                    found=override.count,
                )
            for path in stack.lookups:
                table = getattr(submodule(self._prompts.model, path), "weight", None)
                if isinstance(table, torch.Tensor) and table.dim() == 2 and table.shape[1] != width:
                    raise BaseMismatchError(
                        "the base has another width", where=path, expected=width, found=table.shape[1]
                    )
        refuse_other_head(self._prompts.model, adapter)
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
        model, prompts, stacks = self._prompts.model, self._prompts, self._prompts.stacks
        paths = dict.fromkeys(path for stack in stacks for path in stack.lookups)
        unchanged = Unchanged()
        watched = (*paths, *(path for stack in stacks for path, _ in stack.levels))
        unchanged.sites = [(path, submodule(model, path)) for path in watched]
        guard(self._hooks, model, self._guards)
        before(self._hooks, model, unchanged)
        for module in {id(m): m for m in (submodule(model, path) for path in paths)}.values():
            lookup = PromptLookup(prompts)
            guard(self._hooks, module, self._guards)
            before(self._hooks, module, lookup.enter)
            self._hooks.append((module, lookup.leave))
            module.register_forward_hook(lookup.leave, with_kwargs=True, always_call=True)  # after those of rows
        two = len(stacks) > 1
        for name, path, parameters in [(stack.name, *level) for stack in stacks for level in stack.levels]:
            module = submodule(model, path)
            if two and name == "decoder":
                before(self._hooks, module, Decoding(prompts, parameters).enter)
            reading = Reading(prompts, name, parameters, module, model, cuts=not (two and name == "encoder"))
            before(self._hooks, module, reading.enter)
            after(self._hooks, module, reading.leave, always=True)
        if two:
            parent = Parent(prompts, submodule(model, _common(stacks[0].path, stacks[1].path)))
            after(self._hooks, parent.module[0], parent.leave)
        elif stacks[0].path:
            heads = Heads(prompts, stacks[0], model)
            before(self._hooks, model, heads.enter)
            after(self._hooks, model, heads.leave, always=True)
        if hasattr(model, "prepare_inputs_for_generation"):
            model.__dict__["create_masks_for_generate"] = later_masks(prompts)

    def remove(self) -> None:
        """Take everything off."""
        if self._hooks:
            self._prompts.model.__dict__.pop("create_masks_for_generate", None)
        self._prompts.refresh(())
        remove(self._hooks)


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

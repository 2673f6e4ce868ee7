"""Registers the hooks of an attachment's soft prompts on its model, and removes them.

The hooks are in ``stack_hooks.py``, ``lookup_hooks.py`` and ``outer_hooks.py``; the state that they read is in
``live.py``.
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
from embedsurgery.runtime.hooks import InstalledHooks, add_guards, add_post_hook, add_pre_hook, remove_hooks
from embedsurgery.runtime.prompts.live import LivePrompts, PromptEmbedding
from embedsurgery.runtime.prompts.lookup_hooks import LookupHooks
from embedsurgery.runtime.prompts.outer_hooks import DecoderHooks, DeferredMasks, EncoderDecoderHooks, HeadHooks
from embedsurgery.runtime.prompts.stack_hooks import StackHooks
from embedsurgery.runtime.prompts.stacks import select_stacks
from embedsurgery.runtime.prompts.task_heads import refuse_other_head
from embedsurgery.runtime.rows.rows import Rows
from embedsurgery.runtime.rows.unchanged import ChangeDetector
from embedsurgery.runtime.rows.whole_tables import make_rows
from embedsurgery.surgeries.soft_prompt.surgery import PromptOverride
from embedsurgery.surgeries.surgery import RowOverride
from embedsurgery.tensors.raw import RawArray


class PromptHooks:
    """The hooks of an attachment's soft prompts.

    Args:
        prompts: The live prompts, which the hooks read.
        guards: Pre-hooks for the root and every lookup.
    """

    def __init__(self, prompts: LivePrompts, guards: Sequence[Callable[..., Any]]) -> None:
        self._prompts = prompts
        self._guards = guards
        self._hooks: InstalledHooks = []

    def resolve_overrides(self, overrides: Iterable[RowOverride], adapter: Adapter) -> tuple[RowOverride, ...]:
        """Return an adapter's overrides, in which a soft prompt's submodules are names of this model's stacks.

        Raises:
            UnsupportedError: The model lacks a submodule, or does not support soft prompts.
            ConfigError: The prompt takes all positions that the model has.
            BaseMismatchError: Its vectors have another width, or its file holds a head that differs from the model's.
        """
        return tuple(self._resolve(o, adapter) if isinstance(o, PromptOverride) else o for o in overrides)

    def _resolve(self, override: PromptOverride, adapter: Adapter) -> PromptOverride:
        stacks = select_stacks(self._prompts.stacks, override.submodules, self._prompts.model)
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
                        "the width of the base's rows differs", where=path, expected=width, found=table.shape[1]
                    )
        refuse_other_head(self._prompts.model, adapter)
        return replace(override, submodules=tuple(stack.name for stack in stacks))

    def install(self) -> None:
        """Register the hooks, unless they are registered."""
        if self._hooks:
            return
        try:
            self._register()
        except BaseException:  # a KeyboardInterrupt would leave half of them, which the next call takes for all
            self.remove()
            raise

    def _register(self) -> None:
        model, prompts, stacks = self._prompts.model, self._prompts, self._prompts.stacks
        paths = dict.fromkeys(path for stack in stacks for path in stack.lookups)
        unchanged = ChangeDetector()
        watched = (*paths, *(path for stack in stacks for path, _ in stack.levels))
        unchanged.sites = [(path, submodule(model, path)) for path in watched]
        add_guards(self._hooks, model, self._guards)
        add_pre_hook(self._hooks, model, unchanged)
        for module in {id(m): m for m in (submodule(model, path) for path in paths)}.values():
            lookup = LookupHooks(prompts)
            add_guards(self._hooks, module, self._guards)
            add_pre_hook(self._hooks, module, lookup.enter)
            self._hooks.append((module, lookup.leave))
            module.register_forward_hook(lookup.leave, with_kwargs=True, always_call=True)  # after the hooks of rows
        two = len(stacks) > 1
        for name, path, parameters in [(stack.name, *level) for stack in stacks for level in stack.levels]:
            module = submodule(model, path)
            if two and name == "decoder":
                add_pre_hook(self._hooks, module, DecoderHooks(prompts, parameters).enter)
            hooks = StackHooks(prompts, name, parameters, module, model, cuts=not (two and name == "encoder"))
            add_pre_hook(self._hooks, module, hooks.enter)
            add_post_hook(self._hooks, module, hooks.leave, always=True)
        if two:
            parent = EncoderDecoderHooks(prompts, submodule(model, _common_path(stacks[0].path, stacks[1].path)))
            add_post_hook(self._hooks, parent.module[0], parent.leave)
        elif stacks[0].path:
            heads = HeadHooks(prompts, stacks[0], model)
            add_pre_hook(self._hooks, model, heads.enter)
            add_post_hook(self._hooks, model, heads.leave, always=True)
        if hasattr(model, "prepare_inputs_for_generation"):
            model.__dict__["create_masks_for_generate"] = DeferredMasks(prompts)

    def remove(self) -> None:
        """Remove all hooks."""
        if self._hooks:
            self._prompts.model.__dict__.pop("create_masks_for_generate", None)
        self._prompts.refresh(())
        remove_hooks(self._hooks)


def modules_for(
    overrides: Sequence[RowOverride], raw: Mapping[str, RawArray], devices: Sequence[torch.device]
) -> list[Rows]:
    """Return the trainable module of each override, in their order.

    Args:
        overrides: The overrides of one adapter: prompts alone, or none.
        raw: The adapter's tensors.
        devices: The device of each module.
    """
    if not any(isinstance(override, PromptOverride) for override in overrides):
        return make_rows(overrides, raw, devices)
    prompts = [(o, d) for o, d in zip(overrides, devices, strict=True) if isinstance(o, PromptOverride)]
    assert len(prompts) == len(overrides), "a soft prompt overrides no rows"
    return [PromptEmbedding(raw[override.tensor], override, device) for override, device in prompts]


def _common_path(one: str, other: str) -> str:
    parts = []
    for a, b in zip(one.split("."), other.split("."), strict=False):
        if a != b:
            break
        parts.append(a)
    return ".".join(parts)

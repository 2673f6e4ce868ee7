"""What the hooks of a soft prompt do around what reads the tokens: to heads, to a decoder, to what holds two stacks.

Each is a pair of hooks, of which the second runs whatever happens, so that a call that fails leaves nothing behind.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from embedsurgery.runtime.prompts.caches import cache_of, is_filled
from embedsurgery.runtime.prompts.inputs import IGNORED, first_of, has_input, is_by_token, size_of, with_front
from embedsurgery.runtime.prompts.live import HeadCall, LivePrompts
from embedsurgery.runtime.prompts.masks import extended_mask
from embedsurgery.runtime.prompts.outputs import cut_encoder, trimmed
from embedsurgery.runtime.prompts.stacks import Stack, can_generate


class Decoding:
    """A decoder whose encoder has a prompt: the mask of what it attends to there has to know it."""

    def __init__(self, prompts: LivePrompts, parameters: tuple[str, ...]) -> None:
        self.prompts = prompts
        self.parameters = parameters

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook."""
        live = None if self.prompts.stack_calls.now() is not None else self.prompts.of("encoder")
        if live is None:
            return None
        given = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        states, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
        if states is None or (mask is not None and mask.shape[-1] + live.count != states.shape[1]):
            return None  # what was encoded without a prompt
        if mask is None and live.lengths is None:
            return None
        batch, length = states.shape[0], states.shape[1] - live.count
        if mask is None:
            mask = torch.ones(batch, length, dtype=torch.int64, device=states.device)
        layout = live.layout(batch, length, first_of(mask), rolled=True)
        given["encoder_attention_mask"] = extended_mask(mask, layout, came=False)
        return (), given


class Parent:
    """What holds encoder and decoder: its outputs tell of the encoder's, which are cut here."""

    def __init__(self, prompts: LivePrompts, module: nn.Module) -> None:
        self.prompts = prompts
        self.module = (module,)
        self.parameters = tuple(inspect.signature(module.forward).parameters)

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Post-hook."""
        live = self.prompts.of("encoder")
        if live is None or live.keep:
            return None
        given = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        first = first_of(given.get("attention_mask"))
        return cut_encoder(output, lambda batch, size: live.layout(batch, size - live.count, first, rolled=True))


class Heads:
    """The root, where it is more than what reads the tokens: its labels, and outputs that keep the prompt.

    A model of language learns to say the first token after the prompt as well, so its head gets one entry more.
    """

    def __init__(self, prompts: LivePrompts, stack: Stack, root: nn.Module) -> None:
        self.prompts = prompts
        self.stack = stack
        self.parameters = tuple(inspect.signature(root.forward).parameters)
        self.shifts = can_generate(root)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook."""
        prompts = self.prompts
        left = prompts.head_calls.now()
        if left is not None:  # by compiled code that was broken off
            prompts.head_calls.end(left)
        live = prompts.of(self.stack.name)
        if live is None:
            return None
        given = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        cache = cache_of(given)
        if (cache is not None and is_filled(cache)) or not has_input(given):
            return None
        batch, length = size_of(given)
        labels = given.get("labels")
        if live.keep:
            prompts.head_calls.begin(HeadCall(live.count, self.shifts and is_by_token(labels, batch, length)))
            return (), with_front(given, live.count, prompts.filler(), batch, length)
        if not self.shifts or not is_by_token(labels, batch, length):
            return None
        prompts.head_calls.begin(HeadCall(one_more=True))
        front = labels.new_full((batch, 1), IGNORED)
        _, lengths = live.of_batch(batch)
        if lengths is not None:  # what has no prompt has nothing that says its first token
            first = first_of(given.get("attention_mask"))
            begin = torch.zeros_like(lengths) if first is None else first
            bare = (lengths == 0)[:, None] & (torch.arange(length, device=labels.device) == begin[:, None])
            labels = labels.masked_fill(bare, IGNORED)
        given["labels"] = torch.cat([front, labels], dim=1)
        if isinstance(given.get("logits_to_keep"), torch.Tensor) or given.get("logits_to_keep"):
            given["logits_to_keep"] = given["logits_to_keep"] + 1
        return (), given

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Post-hook."""
        front = self.prompts.head_calls.now()
        if front is None:
            return None
        self.prompts.head_calls.end(front)
        if front.kept or output is None:
            return None
        labels = kwargs["labels"]
        return trimmed(output, labels.shape[1])


def later_masks(prompts: LivePrompts) -> Callable[..., Any]:
    """What makes the masks of a generation before its model runs, which is too early for a prompt."""
    return _LaterMasks(prompts)


class _LaterMasks:
    def __init__(self, prompts: LivePrompts) -> None:
        self.prompts = prompts

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.prompts.model
        if any(self.prompts.of(stack.name) is not None for stack in self.prompts.stacks):
            return kwargs["attention_mask"]
        own = getattr(type(model), "create_masks_for_generate", None)
        if own is not None:
            return own(*args, **kwargs)
        from transformers.masking_utils import create_masks_for_generate

        return create_masks_for_generate(*args, **kwargs)

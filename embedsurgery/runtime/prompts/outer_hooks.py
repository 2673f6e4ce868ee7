"""Hooks of a soft prompt on the modules around those that read tokens: heads, decoders, and encoder-decoder models.

A hook that notes a running call has a second one that always runs, so that a failed call leaves nothing behind. The
hooks on the modules that read tokens are in ``stack_hooks.py``.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from embedsurgery.runtime.prompts.caches import cache_of, is_filled
from embedsurgery.runtime.prompts.inputs import (
    IGNORED,
    add_prompt_room,
    are_token_labels,
    has_input,
    input_size,
    text_starts,
)
from embedsurgery.runtime.prompts.live import HeadCall, LivePrompts, StackPrompt
from embedsurgery.runtime.prompts.masks import extend_mask
from embedsurgery.runtime.prompts.outputs import remove_encoder_prompt, remove_extra_entry
from embedsurgery.runtime.prompts.stacks import Stack, can_generate


class DecoderHooks:
    """Hook on a decoder whose encoder has a prompt: the mask of its cross-attention has to include that prompt."""

    def __init__(self, prompts: LivePrompts, parameters: tuple[str, ...]) -> None:
        self.prompts = prompts
        self.parameters = parameters

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook: extend ``encoder_attention_mask``."""
        live = None if self.prompts.stack_calls.now() is not None else self.prompts.of_stack("encoder")
        if live is None:
            return None
        given = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        states, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
        # States of another length were encoded without a prompt, by a caller who passes them in, for example.
        if states is None or (mask is not None and mask.shape[-1] + live.count != states.shape[1]):
            return None
        if mask is None and live.lengths is None:
            return None
        batch, length = states.shape[0], states.shape[1] - live.count
        if mask is None:
            mask = torch.ones(batch, length, dtype=torch.int64, device=states.device)
        layout = live.layout(batch, length, text_starts(mask), rolled=True)
        given["encoder_attention_mask"] = extend_mask(mask, layout, inserting=False)
        return (), given


class EncoderDecoderHooks:
    """Hook on the module that has encoder and decoder: its outputs include the encoder's, which are shortened here."""

    def __init__(self, prompts: LivePrompts, module: nn.Module) -> None:
        self.prompts = prompts
        self.module = (module,)  # in a tuple, so that it does not become a submodule
        self.parameters = tuple(inspect.signature(module.forward).parameters)

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Post-hook: remove the encoder's prompt."""
        live = self.prompts.of_stack("encoder")
        if live is None or live.keep:
            return None
        given = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        first = text_starts(given.get("attention_mask"))
        return remove_encoder_prompt(
            output, lambda batch, size: live.layout(batch, size - live.count, first, rolled=True)
        )


class HeadHooks:
    """Hooks on the root if it has a head: they fit labels and outputs to the prompt.

    A language model's loss compares the logits at each index with the label at the next one. So that the input's first
    token is predicted too, by the prompt's last one, labels and logits get an extra entry in front.
    """

    def __init__(self, prompts: LivePrompts, stack: Stack, root: nn.Module) -> None:
        self.prompts = prompts
        self.stack = stack
        self.parameters = tuple(inspect.signature(root.forward).parameters)
        self.shifts = can_generate(root)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook: give the head's arguments the entries that its outputs will have."""
        prompts = self.prompts
        left = prompts.head_calls.now()
        if left is not None:  # compiled code was interrupted, and its post-hook did not run
            prompts.head_calls.end(left)
        live = prompts.of_stack(self.stack.name)
        if live is None:
            return None
        given = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        cache = cache_of(given)
        if (cache is not None and is_filled(cache)) or not has_input(given):
            return None
        batch, length = input_size(given)
        labels = given.get("labels")
        if live.keep:
            prompts.head_calls.begin(HeadCall(live.count, self.shifts and are_token_labels(labels, batch, length)))
            return (), add_prompt_room(given, live.count, prompts.filler_id(), batch, length)
        if not self.shifts or not are_token_labels(labels, batch, length):
            return None
        prompts.head_calls.begin(HeadCall(extra_entry=True))
        front = labels.new_full((batch, 1), IGNORED)
        labels = _ignore_unpredicted(labels, live, given.get("attention_mask"))
        given["labels"] = torch.cat([front, labels], dim=1)
        if isinstance(given.get("logits_to_keep"), torch.Tensor) or given.get("logits_to_keep"):
            given["logits_to_keep"] = given["logits_to_keep"] + 1
        return (), given

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Post-hook: remove the extra entry."""
        head = self.prompts.head_calls.now()
        if head is None:
            return None
        self.prompts.head_calls.end(head)
        if head.room or output is None:
            return None
        labels = kwargs["labels"]
        return remove_extra_entry(output, labels.shape[1])


def _ignore_unpredicted(labels: torch.Tensor, live: StackPrompt, mask: Any) -> torch.Tensor:
    """Ignore the labels of first tokens in samples without a prompt, because nothing precedes and predicts them."""
    batch, length = labels.shape
    _, lengths = live.for_batch(batch)
    if lengths is None:
        return labels
    first = text_starts(mask)
    begin = torch.zeros_like(lengths) if first is None else first
    bare = (lengths == 0)[:, None] & (torch.arange(length, device=labels.device) == begin[:, None])
    return labels.masked_fill(bare, IGNORED)


class DeferredMasks:
    """Replaces a model's ``create_masks_for_generate``, so that the masks of a generation are made in its forward.

    With a static cache ``generate`` makes them before it calls the model, and so before the prompt is inserted. It is
    a class and not a closure because models with an attachment are copied and pickled.
    """

    def __init__(self, prompts: LivePrompts) -> None:
        self.prompts = prompts

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the 2-D mask as it is if a prompt is live, and else what the model would."""
        model: Any = self.prompts.model
        if any(self.prompts.of_stack(stack.name) is not None for stack in self.prompts.stacks):
            return kwargs["attention_mask"]
        own = getattr(type(model), "create_masks_for_generate", None)
        if own is not None:
            return own(*args, **kwargs)
        from transformers.masking_utils import create_masks_for_generate  # transformers is optional

        return create_masks_for_generate(*args, **kwargs)

"""Hooks of a soft prompt on the modules that read tokens.

They are a pair whose second hook always runs, so that a failed call leaves nothing behind. ``lookup_hooks.py`` gives
the inserted ids their vectors, ``outputs.py`` removes the prompt from the outputs, and ``outer_hooks.py`` has the hooks
on the modules around these.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import nn

from embedsurgery.errors import ConfigError, UnsupportedError
from embedsurgery.runtime.prompts.caches import (
    CachedPrompt,
    cache_of,
    cached_prompt_of,
    check_cached_prompt,
    grow_static_cache,
    is_filled,
    record_prompt,
)
from embedsurgery.runtime.prompts.inputs import (
    IGNORED,
    are_token_labels,
    has_input,
    input_size,
    refuse_packed,
    remove_prompt_room,
    text_starts,
)
from embedsurgery.runtime.prompts.layout import (
    PromptLayout,
    count_positions,
    extend_positions,
    insert_prefix,
    is_virtual,
)
from embedsurgery.runtime.prompts.live import LivePrompts, StackCall
from embedsurgery.runtime.prompts.masks import extend_masks
from embedsurgery.runtime.prompts.outputs import caches_in, keep_logits, remove_prompt
from embedsurgery.runtime.prompts.positions import PositionSource, learned_position_limit, window_of
from embedsurgery.runtime.prompts.stacks import can_generate

_PER_TOKEN = (
    "token_type_ids",
    "mm_token_type_ids",
    "moe_mm_token_type_ids",
    "global_attention_mask",
    "langs",
    "bbox",
    "visual_pos_masks",
)
"""Arguments with one entry per token, apart from ids, masks and positions. A virtual token's entry is 0."""

_PACKED = ("cu_seq_lens_q", "cu_seqlens", "seq_idx")
"""Arguments that tell where several texts in one row start."""

_STATES = ("cache_params", "state", "mems")
"""Arguments of models that do not cache keys and values."""


class StackHooks:
    """Hooks on a module that reads tokens: they insert the prompt into its arguments and remove it from its outputs.

    Args:
        prompts: The live prompts.
        stack: Name of the stack that the module belongs to.
        parameters: Names of its forward's parameters.
        module: The module.
        root: The whole model.
        cuts: Whether the prompt's entries are removed from the outputs here. An encoder's are kept, because its decoder
            attends to them.
    """

    def __init__(
        self,
        prompts: LivePrompts,
        stack: str,
        parameters: tuple[str, ...],
        module: nn.Module,
        root: nn.Module,
        *,
        cuts: bool,
    ) -> None:
        self.prompts = prompts
        self.stack = stack
        self.parameters = parameters
        self.cuts = cuts
        self.labelled = module is root
        self.generates = can_generate(root) and stack != "encoder"
        self.causal = any(getattr(part, "is_causal", False) is True for part in module.modules())
        self.positions = PositionSource.of(module, parameters)
        self.sets_positions = self.positions.accepted and not self.positions.derived
        config = getattr(module, "config", None)
        self.window = window_of(config)
        self.uses_cache = bool(getattr(config, "use_cache", False))
        self.limit = learned_position_limit(module)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook: insert the prompt, or continue from a cache that holds it."""
        around = self.prompts.stack_calls.now()
        if around is not None:
            if around.owner is not self:  # the hooks of a module around this one have inserted it
                return None
            self.prompts.stack_calls.end(around)  # compiled code was interrupted, and its post-hook did not run
        given = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        cache = cache_of(given)
        live = self.prompts.of_stack(self.stack)
        if live is None:
            if cached_prompt_of(cache) is not None:
                check_cached_prompt(cache, (), self.stack)
            return None
        if not has_input(given):
            return None
        self._refuse_arguments(given, module)
        head = self.prompts.head_calls.now()
        if head is not None and head.room:
            given = remove_prompt_room(given, head.room)
        call = StackCall(self, live)
        self.prompts.stack_calls.begin(call)
        batch, length = input_size(given)
        if cache is not None and is_filled(cache):
            call.cached = check_cached_prompt(cache, live.names, self.stack)
            call.cached.layout = call.cached.layout.repeat(batch)
            self._continue(given, cache, call.cached, length)
        else:
            self._insert(given, cache, call, batch, length)
        return (), given

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Post-hook: record the prompt in a cache that came out, and remove its entries from the outputs."""
        call = self.prompts.stack_calls.now()
        if call is None or call.owner is not self:
            return None
        self.prompts.stack_calls.end(call)
        if call.cached is not None:
            call.cached.running = False
        layout = call.layout
        if layout is None or output is None:  # it continued from a cache, or failed
            return None
        for cache in caches_in(output):
            with suppress(UnsupportedError):  # a cache without a length is refused when it is passed in again
                if cached_prompt_of(cache) is None and is_filled(cache):
                    record_prompt(cache, layout, call.prompt.names)
        if not self.cuts:
            return None
        head = self.prompts.head_calls.now()
        extra_entry = head is not None and head.extra_entry
        found = remove_prompt(output, layout, keep=call.prompt.keep, extra_entry=extra_entry)
        return found if call.logits_to_keep is None else keep_logits(found, call.logits_to_keep)

    def _insert(self, given: dict[str, Any], cache: Any, call: StackCall, batch: int, length: int) -> None:
        """Insert the prompt into everything that has one entry per token."""
        live, mask = call.prompt, given.get("attention_mask")
        in_place = self._stays_in_place(given, cache)
        layout = live.layout(batch, length, text_starts(mask), rolled=not in_place)
        if in_place and not self.positions.derived:
            self._refuse_uneven(layout)
        self._check_length(layout, length, 0)
        if cache is not None:
            grow_static_cache(cache, layout.count, length, self.window)
        call.layout = layout
        to_keep = given.get("logits_to_keep")
        if isinstance(to_keep, torch.Tensor) or (to_keep and not (layout.is_plain and layout.lengths is None)):
            # It counts in the caller's text. In a model that is one module with its head (Llama 4, Mllama) the logits
            # are computed in the stack's order, where the text has other indices.
            call.logits_to_keep = given.pop("logits_to_keep")
        self._insert_tokens(given, call, layout)
        device = (given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]).device
        if mask is None and layout.lengths is not None:  # the fillers have to be masked
            mask = torch.ones(batch, length, dtype=torch.int64, device=device)
        if mask is not None:
            given["attention_mask"] = self._extend_masks(mask, layout, inserting=True)
        self._insert_positions(given, mask, layout)
        for name in _PER_TOKEN:
            part = given.get(name)
            if isinstance(part, torch.Tensor) and part.dim() >= 2 and part.shape[1] == length:
                given[name] = insert_prefix(part.new_zeros(layout.count, *part.shape[2:]), part, layout)
        labels = given.get("labels")
        if self.labelled and are_token_labels(labels, batch, length):
            given["labels"] = insert_prefix(labels.new_full((layout.count,), IGNORED), labels, layout)
        if isinstance(given.get("cache_position"), torch.Tensor):
            given["cache_position"] = torch.arange(layout.count + length, device=given["cache_position"].device)

    def _stays_in_place(self, given: dict[str, Any], cache: Any) -> bool:
        """Whether the prompt is inserted in place because this call fills a cache.

        A model that makes its cache itself may fill one without being asked. If its positions cannot follow in place,
        the call is computed rolled, and it is refused only when that cache is passed in again.
        """
        use_cache = given.get("use_cache")
        use_cache = self.uses_cache if use_cache is None else use_cache
        fills_cache = (self.generates or self.causal) and use_cache
        return cache is not None or bool(fills_cache and self.positions.allows_uneven)

    def _insert_tokens(self, given: dict[str, Any], call: StackCall, layout: PromptLayout) -> None:
        ids, _ = call.prompt.for_batch(layout.batch)
        # token types, for example, may be looked up in the same table, with ids of their own
        alone = not any(given.get(name) is not None for name in _PER_TOKEN)
        if given.get("input_ids") is not None:
            given["input_ids"] = insert_prefix(ids, given["input_ids"], layout)
            call.leading = layout.count if alone and layout.is_plain and layout.lengths is None else 0
            call.shape = given["input_ids"].shape
        if given.get("inputs_embeds") is not None:
            embeds = given["inputs_embeds"]
            own = self.prompts.vectors(ids.to(embeds.device), embeds.dtype)
            given["inputs_embeds"] = insert_prefix(own * is_virtual(ids).unsqueeze(-1), embeds, layout)

    def _insert_positions(self, given: dict[str, Any], mask: Any, layout: PromptLayout) -> None:
        positions = given.get("position_ids")
        if positions is not None:
            refuse_packed(positions, mask)
            given["position_ids"] = extend_positions(positions, layout)
        elif not layout.rolled and self.sets_positions and (layout.first is not None or layout.lengths is not None):
            # Left alone, the model would count from the batch's left edge, padding included.
            assert mask is not None
            device = next(iter(mask.values())).device if isinstance(mask, dict) else mask.device
            given["position_ids"] = count_positions(layout, 0, layout.count + layout.length, device)

    def _continue(self, given: dict[str, Any], cache: Any, cached: CachedPrompt, length: int) -> None:
        """Move masks and positions behind the prompt that the cache holds. No token is inserted."""
        layout = cached.layout
        cached.running = True
        cached_length = cache.get_seq_length()
        self._refuse_uneven(layout)
        self._check_length(layout, length, cached_length)
        mask = given.get("attention_mask")
        if mask is not None:
            given["attention_mask"] = self._extend_masks(mask, layout, inserting=False)
        positions = given.get("position_ids")
        ids = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
        if mask is None and layout.lengths is not None:
            mask = torch.ones(layout.batch, cached_length - layout.count + length, dtype=torch.int64, device=ids.device)
            given["attention_mask"] = self._extend_masks(mask, layout, inserting=False)
        if positions is not None:
            given["position_ids"] = positions + layout.prompt_lengths()
        elif self.sets_positions and (layout.first is not None or layout.lengths is not None):
            given["position_ids"] = count_positions(layout, cached_length, length, ids.device)
        if isinstance(given.get("cache_position"), torch.Tensor):
            given["cache_position"] = given["cache_position"] + layout.count
        for name in _PER_TOKEN:
            part = given.get(name)
            if isinstance(part, torch.Tensor) and part.dim() >= 2 and part.shape[1] > length:
                given[name] = insert_prefix(part.new_zeros(layout.count, *part.shape[2:]), part, layout)

    def _extend_masks(self, mask: Any, layout: PromptLayout, *, inserting: bool) -> Any:
        return extend_masks(mask, layout, self.window, inserting=inserting, causal=self.causal)

    def _refuse_arguments(self, given: dict[str, Any], module: nn.Module) -> None:
        packed = [name for name in _PACKED if given.get(name) is not None]
        if packed:
            raise UnsupportedError(
                "a soft prompt does not support several texts packed into one row",
                where=type(module).__name__,
                expected="padded texts",
                found=packed[0],
                hint="pad the texts, or bake the prompt in for continuous batching",
            )
        states = [name for name in _STATES if given.get(name) is not None]
        if states:
            raise UnsupportedError(
                "a soft prompt cannot continue from this kind of cache",
                where=type(module).__name__,
                expected="a cache of keys and values",
                found=states[0],
                hint="generate with use_cache=False",
            )

    def _refuse_uneven(self, layout: PromptLayout) -> None:
        """Refuse samples that start at different indices, if the model counts positions from the batch's left edge.

        BART does, whatever the mask. In place its positions would be wrong, and a cache does not allow rolling.
        """
        if not self.positions.allows_uneven and not torch.compiler.is_compiling() and layout.is_uneven():
            raise UnsupportedError(
                "this model counts positions from the batch's left edge, and a cache is used",
                where=self.stack,
                expected="samples that all start at index 0",
                found="left padding, or prompts of different lengths",
                hint="pad on the right, with prompts of one length, or set use_cache=False",
            )

    def _check_length(self, layout: PromptLayout, length: int, cached_length: Any) -> None:
        if self.limit is None or isinstance(cached_length, torch.Tensor):
            return
        total = length + (cached_length or layout.count)
        if total > self.limit:
            raise ConfigError(
                "input and soft prompt are longer than the model's positions",
                where=self.stack,
                expected=f"at most {self.limit}",
                found=f"{total}, {layout.count} of them virtual",
            )

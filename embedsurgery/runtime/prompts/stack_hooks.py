"""What the hooks of a soft prompt do to one call of a lookup, and of what reads the tokens.

Each is a pair of hooks, of which the second runs whatever happens, so that a call that fails leaves nothing behind.
What comes out of a call is cut in ``prompt_outputs.py``; what stands around these modules has hooks in
``prompt_around.py``.
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
    check_seat,
    is_filled,
    make_room,
    seat_of,
    take_seat,
)
from embedsurgery.runtime.prompts.inputs import IGNORED, first_of, is_by_token, refuse_packed, size_of, without_front
from embedsurgery.runtime.prompts.layout import Layout, counted_positions, extended_positions, is_virtual, spread
from embedsurgery.runtime.prompts.live import LivePrompts, StackCall
from embedsurgery.runtime.prompts.masks import extended_mask
from embedsurgery.runtime.prompts.outputs import caches_in, cut, kept
from embedsurgery.runtime.prompts.positions import Counting, learned_positions, window_of
from embedsurgery.runtime.prompts.stacks import can_generate
from embedsurgery.tensors.sharded import is_sharded

_BY_TOKEN = (
    "token_type_ids",
    "mm_token_type_ids",
    "moe_mm_token_type_ids",
    "global_attention_mask",
    "langs",
    "bbox",
    "visual_pos_masks",
)
"""What a model is given for each token beside ids, masks and positions; a virtual token's is 0."""

_PACKED = ("cu_seq_lens_q", "cu_seqlens", "seq_idx")
"""What says where several texts in one row begin."""

_STATES = ("cache_params", "state", "mems")
"""Memory of models that have no cache of keys and values."""


class PromptLookup:
    """A lookup inside a stack that runs: real ids go their way, and virtual ones become the prompt's vectors."""

    def __init__(self, prompts: LivePrompts) -> None:
        self.prompts = prompts

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook: the lookup gets some real id in the place of a virtual one."""
        call = self.prompts.stack_calls.now()
        if call is None:
            return None
        call.ids = None
        name = None if args else next(iter(kwargs), None)
        ids = args[0] if name is None and args else kwargs.get(name or "")
        if not isinstance(ids, torch.Tensor) or ids.is_floating_point():
            return None
        call.ids = ids
        real = ids.masked_fill(is_virtual(ids), 0)
        return ((real, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: real})

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Post-hook."""
        call = self.prompts.stack_calls.now()
        if call is None or call.ids is None:
            return None
        ids, call.ids = call.ids, None
        if output is None:  # it failed
            return None
        if not isinstance(output, torch.Tensor):
            raise UnsupportedError(
                "a soft prompt cannot stand before a lookup that gives more than vectors",
                where=type(module).__name__,
                found=type(output).__name__,
            )
        if is_sharded(output):
            raise UnsupportedError(
                "a soft prompt cannot stand before a lookup that computes on shards",
                where=type(module).__name__,
                hint="keep the lookup whole",
            )
        plain, call.plain = call.plain, 0  # of the first lookup: GPT-2 looks types up as well
        if plain and ids.shape == call.shape:
            own = self.prompts.vectors(ids[:1, :plain], output.dtype).expand(ids.shape[0], -1, -1)
            return torch.cat([own, output[:, plain:]], dim=1)
        own = self.prompts.vectors(ids, output.dtype)
        return torch.where(is_virtual(ids).unsqueeze(-1), own, output)


class Reading:
    """What reads the tokens.

    Args:
        prompts: What is live.
        stack: Name of the stack that it is.
        parameters: Names of its forward's parameters.
        module: Itself.
        root: The whole model.
        cuts: Whether the prompt's places are cut from its outputs here; an encoder's are what its decoder attends to.
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
        self.counting = Counting.of(module, parameters)
        self.gives_positions = self.counting.taken and not self.counting.own
        config = getattr(module, "config", None)
        self.window = window_of(config)
        self.uses_cache = bool(getattr(config, "use_cache", False))
        self.limit = learned_positions(module)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook: the prompt comes in, or is in the cache already."""
        around = self.prompts.stack_calls.now()
        if around is not None:
            if around.owner is not self:  # a module around this one has seen to it
                return None
            self.prompts.stack_calls.end(around)  # compiled code that was broken off
        given = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        cache = cache_of(given)
        live = self.prompts.of(self.stack)
        if live is None:
            if seat_of(cache) is not None:
                check_seat(cache, (), self.stack)
            return None
        if given.get("input_ids") is None and given.get("inputs_embeds") is None:
            return None
        if any(given.get(name) is not None for name in _PACKED):
            raise UnsupportedError(
                "a soft prompt cannot stand before each of several texts in one row",
                where=type(module).__name__,
                found="texts told apart by their lengths, as by continuous batching",
                hint="pad the texts, or bake the prompt in",
            )
        if any(given.get(name) is not None for name in _STATES):
            raise UnsupportedError(
                "a soft prompt cannot go on from this model's kind of memory",
                where=type(module).__name__,
                expected="a cache of keys and values",
                hint="generate with use_cache=False",
            )
        front = self.prompts.head_calls.now()
        if front is not None and front.kept:
            given = without_front(given, front.kept)
        call = StackCall(self, live)
        self.prompts.stack_calls.begin(call)
        batch, length = size_of(given)
        if cache is not None and is_filled(cache):
            call.seat = check_seat(cache, live.names, self.stack)
            call.seat.layout = call.seat.layout.repeated(batch)
            self._go_on(given, cache, call.seat, length)
        else:
            self._begin(given, cache, call, batch, length)
        return (), given

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Post-hook."""
        call = self.prompts.stack_calls.now()
        if call is None or call.owner is not self:
            return None
        self.prompts.stack_calls.end(call)
        if call.seat is not None:
            call.seat.inside = False
        layout = call.layout
        if layout is None or output is None:  # it failed
            return None
        for cache in caches_in(output):
            with suppress(UnsupportedError):  # one without a length is refused when it comes back
                if seat_of(cache) is None and is_filled(cache):
                    take_seat(cache, layout, call.prompt.names)
        if not self.cuts:
            return None
        front = self.prompts.head_calls.now()
        found = cut(output, layout, keep=call.prompt.keep, one_more=front is not None and front.one_more)
        return found if call.asked is None else kept(found, call.asked)

    def _begin(self, given: dict[str, Any], cache: Any, call: StackCall, batch: int, length: int) -> None:
        live = call.prompt
        mask = given.get("attention_mask")
        first = first_of(mask)
        wants_cache = given.get("use_cache")
        wants_cache = self.uses_cache if wants_cache is None else wants_cache
        goes_on = (self.generates or self.causal) and wants_cache
        in_place = cache is not None or (goes_on and self.counting.stands)
        layout = live.layout(batch, length, first, rolled=not in_place)
        if in_place and not self.counting.own:
            self._refuse_uneven(layout)
        self._check_length(layout, length, 0)
        if cache is not None:
            make_room(cache, layout.count, length, self.window)
        call.layout = layout
        asked = given.get("logits_to_keep")
        if isinstance(asked, torch.Tensor) or (asked and not (layout.is_plain and layout.lengths is None)):
            call.asked = given.pop("logits_to_keep")  # by places in the text, which stands elsewhere in this module
        ids, _ = live.of_batch(batch)
        alone = not any(given.get(name) is not None for name in _BY_TOKEN)  # that is looked up
        plain = alone and layout.is_plain and layout.lengths is None
        if given.get("input_ids") is not None:
            given["input_ids"] = spread(ids, given["input_ids"], layout)
            call.plain = layout.count if plain else 0
            call.shape = given["input_ids"].shape
        if given.get("inputs_embeds") is not None:
            embeds = given["inputs_embeds"]
            own = self.prompts.vectors(ids.to(embeds.device), embeds.dtype)
            given["inputs_embeds"] = spread(own * is_virtual(ids).unsqueeze(-1), embeds, layout)
        if mask is None and layout.lengths is not None:
            device = (given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]).device
            mask = torch.ones(batch, length, dtype=torch.int64, device=device)
        if mask is not None:
            given["attention_mask"] = self._mask(mask, layout, came=True)
        positions = given.get("position_ids")
        if positions is not None:
            refuse_packed(positions, mask)
            given["position_ids"] = extended_positions(positions, layout)
        elif in_place and self.gives_positions and (layout.first is not None or layout.lengths is not None):
            assert mask is not None
            device = next(iter(mask.values())).device if isinstance(mask, dict) else mask.device
            given["position_ids"] = counted_positions(layout, 0, layout.count + length, device)
        for name in _BY_TOKEN:
            part = given.get(name)
            if isinstance(part, torch.Tensor) and part.dim() >= 2 and part.shape[1] == length:
                given[name] = spread(part.new_zeros(layout.count, *part.shape[2:]), part, layout)
        labels = given.get("labels")
        if self.labelled and is_by_token(labels, batch, length):
            given["labels"] = spread(labels.new_full((layout.count,), IGNORED), labels, layout)
        if isinstance(given.get("cache_position"), torch.Tensor):
            given["cache_position"] = torch.arange(layout.count + length, device=given["cache_position"].device)

    def _go_on(self, given: dict[str, Any], cache: Any, seat: CachedPrompt, length: int) -> None:
        layout = seat.layout
        seat.inside = True
        held = cache.get_seq_length()
        self._refuse_uneven(layout)
        self._check_length(layout, length, held)
        mask = given.get("attention_mask")
        if mask is not None:
            given["attention_mask"] = self._mask(mask, layout, came=False)
        positions = given.get("position_ids")
        ids = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
        if mask is None and layout.lengths is not None:
            mask = torch.ones(layout.batch, held - layout.count + length, dtype=torch.int64, device=ids.device)
            given["attention_mask"] = self._mask(mask, layout, came=False)
        if positions is not None:
            given["position_ids"] = positions + layout.added()
        elif self.gives_positions and (layout.first is not None or layout.lengths is not None):
            given["position_ids"] = counted_positions(layout, held, length, ids.device)
        if isinstance(given.get("cache_position"), torch.Tensor):
            given["cache_position"] = given["cache_position"] + layout.count
        for name in _BY_TOKEN:
            part = given.get(name)
            if isinstance(part, torch.Tensor) and part.dim() >= 2 and part.shape[1] > length:
                given[name] = spread(part.new_zeros(layout.count, *part.shape[2:]), part, layout)

    def _mask(self, mask: Any, layout: Layout, *, came: bool) -> Any:
        if isinstance(mask, dict):
            return {
                kind: None if part is None else self._one_mask(part, layout, kind, came=came)
                for kind, part in mask.items()
            }
        return self._one_mask(mask, layout, "", came=came)

    def _one_mask(self, mask: Any, layout: Layout, kind: str, *, came: bool) -> torch.Tensor:
        if not isinstance(mask, torch.Tensor) or mask.dim() not in (2, 4) or "chunked" in kind:
            raise UnsupportedError(
                "a soft prompt cannot be put into this kind of mask",
                where="attention_mask",
                expected="a tensor of two or four axes",
                found=f"{kind} {type(mask).__name__} {list(getattr(mask, 'shape', ()))}".strip(),
                hint="give a mask of two axes",
            )
        window = self.window if "sliding" in kind else None
        return extended_mask(mask, layout, window, came=came, causal=self.causal)

    def _refuse_uneven(self, layout: Layout) -> None:
        """Refuse samples that begin at several places where the model counts places, whatever it is told of them."""
        if not self.counting.stands and not torch.compiler.is_compiling() and layout.is_uneven():
            raise UnsupportedError(
                "this model counts positions from the batch's left edge, which is wrong for samples "
                "that begin later, and it is to go on from a cache",
                where=self.stack,
                hint="pad on the right, with prompts of one length, or use_cache=False",
            )

    def _check_length(self, layout: Layout, length: int, held: Any) -> None:
        if self.limit is None or isinstance(held, torch.Tensor):
            return
        total = length + (held or layout.count)
        if total > self.limit:
            raise ConfigError(
                "the input and its soft prompt are longer than the model's positions",
                where=self.stack,
                expected=f"{self.limit} at most",
                found=f"{total}, {layout.count} of them virtual",
            )

"""What the hooks of a soft prompt do to one call: of a lookup, of what reads tokens, of a head, of a decoder.

Each is a pair of hooks, of which the second runs whatever happens, so that a call that fails leaves nothing behind.
What comes out of a call is cut in ``prompt_outputs.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn

from embedsurgery.errors import ConfigError, UnsupportedError
from embedsurgery.runtime.prompt_caches import Seat, check_seat, is_filled, make_room, seat_of, take_seat
from embedsurgery.runtime.prompt_layout import (
    Layout,
    counted_positions,
    extended_mask,
    extended_positions,
    first_real,
    is_virtual,
    spread,
)
from embedsurgery.runtime.prompt_outputs import caches_in, cut, cut_encoder, trimmed
from embedsurgery.runtime.prompt_stacks import Stack
from embedsurgery.tensors import is_sharded

if TYPE_CHECKING:
    from embedsurgery.runtime.prompts import Live, Prompts

IGNORED = -100
"""The label that no loss counts."""

_BY_TOKEN = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids", "global_attention_mask", "langs", "bbox",
             "visual_pos_masks")  # fmt: skip
"""What a model is given for each token beside ids, masks and positions; a virtual token's is 0."""

_STATES = ("cache_params", "state", "mems")
"""Memory of models that have no cache of keys and values."""


class PromptLookup:
    """A lookup inside a stack that runs: real ids go their way, and virtual ones become the prompt's vectors."""

    def __init__(self, prompts: Prompts) -> None:
        self.prompts = prompts
        self.ids: torch.Tensor | None = None

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook: the lookup gets some real id in the place of a virtual one."""
        self.ids = None
        name = None if args else next(iter(kwargs), None)
        ids = args[0] if name is None and args else kwargs.get(name or "")
        if not self.prompts.inside or not isinstance(ids, torch.Tensor) or ids.is_floating_point():
            return None
        self.ids = ids
        real = ids.masked_fill(is_virtual(ids), 0)
        return ((real, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: real})

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Post-hook."""
        ids, self.ids = self.ids, None
        if ids is None or not isinstance(output, torch.Tensor):
            return None
        if is_sharded(output):
            raise UnsupportedError("a soft prompt cannot stand before a lookup that computes on shards",
                                   where=type(module).__name__, hint="keep the lookup whole")  # fmt: skip
        plain = self.prompts.plain
        if plain and ids.shape == self.prompts.shape:
            own = self.prompts.vectors(ids[:1, :plain], output.dtype).expand(ids.shape[0], -1, -1)
            return torch.cat([own, output[:, plain:]], dim=1)
        own = self.prompts.vectors(ids, output.dtype)
        return torch.where(is_virtual(ids).unsqueeze(-1), own, output)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "ids": None}


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
        prompts: Prompts,
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
        self.generates = bool(_call(root, "can_generate")) and stack != "encoder"
        counts = any(hasattr(part, "create_position_ids_from_input_ids") for part in module.modules())
        self.takes_positions = "position_ids" in parameters
        self.positions = self.takes_positions and not counts  # else the model makes its own of ids or mask
        config = getattr(module, "config", None)
        self.window = _window(config)
        self.uses_cache = bool(getattr(config, "use_cache", False))
        self.limit = _learned_positions(module)
        self._forget()

    def _forget(self) -> None:
        self.layout: Layout | None = None
        self.live: Live | None = None
        self.seat: Seat | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "layout": None, "live": None, "seat": None}

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook: the prompt comes in, or is in the cache already."""
        self._forget()
        if self.prompts.inside:  # a module around this one has seen to it
            return None
        given = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        cache = given.get("past_key_values")
        live = self.prompts.of(self.stack)
        if live is None:
            if seat_of(cache) is not None:
                check_seat(cache, (), self.stack)
            return None
        if given.get("input_ids") is None and given.get("inputs_embeds") is None:
            return None
        if any(given.get(name) is not None for name in _STATES):
            raise UnsupportedError("a soft prompt cannot go on from this model's kind of memory",
                                   where=type(module).__name__, expected="past_key_values",
                                   hint="generate with use_cache=False")  # fmt: skip
        if self.prompts.kept:
            given = _without_front(given, self.prompts.kept)
        self.live = live
        batch, length = _size(given)
        if cache is not None and is_filled(cache):
            self.seat = check_seat(cache, live.names, self.stack)
            self.seat.layout = self.seat.layout.repeated(batch)
            self._go_on(given, cache, self.seat, length)
        else:
            self._begin(given, cache, live, batch, length)
        self.prompts.inside = True
        return (), given

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Post-hook."""
        layout, live, seat = self.layout, self.live, self.seat
        self._forget()
        if live is None:
            return None
        self.prompts.inside, self.prompts.plain = False, 0
        if seat is not None:
            seat.inside = False
        if layout is None:
            return None
        if output is None:  # it failed
            return None
        for cache in caches_in(output):
            with suppress(UnsupportedError):  # one without a length is refused when it comes back
                if seat_of(cache) is None and is_filled(cache):
                    take_seat(cache, layout, live.names)
        if not self.cuts:
            return None
        return cut(output, layout, keep=live.keep, one_more=self.prompts.one_more)

    def _begin(self, given: dict[str, Any], cache: Any, live: Live, batch: int, length: int) -> None:
        mask = given.get("attention_mask")
        first = _first(mask)
        wants_cache = given.get("use_cache")
        wants_cache = self.uses_cache if wants_cache is None else wants_cache
        in_place = cache is not None or (self.generates and wants_cache and self.takes_positions)
        layout = live.layout(batch, length, first, rolled=not in_place)
        self._check_length(layout, length, 0)
        if cache is not None:
            make_room(cache, layout.count, length, self.window)
        self.layout = layout
        ids, _ = live.of_batch(batch)
        plain = layout.is_plain and layout.lengths is None
        if given.get("input_ids") is not None:
            given["input_ids"] = spread(ids, given["input_ids"], layout)
            self.prompts.plain = layout.count if plain else 0
            self.prompts.shape = given["input_ids"].shape
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
            _refuse_packed(positions, mask)
            given["position_ids"] = extended_positions(positions, layout)
        elif in_place and self.positions and (layout.first is not None or layout.lengths is not None):
            assert mask is not None
            device = next(iter(mask.values())).device if isinstance(mask, dict) else mask.device
            given["position_ids"] = counted_positions(layout, 0, layout.count + length, device)
        for name in _BY_TOKEN:
            part = given.get(name)
            if isinstance(part, torch.Tensor) and part.dim() >= 2 and part.shape[1] == length:
                given[name] = spread(part.new_zeros(layout.count, *part.shape[2:]), part, layout)
        labels = given.get("labels")
        if self.labelled and _is_by_token(labels, batch, length):
            given["labels"] = spread(labels.new_full((layout.count,), IGNORED), labels, layout)
        if isinstance(given.get("cache_position"), torch.Tensor):
            given["cache_position"] = torch.arange(layout.count + length, device=given["cache_position"].device)

    def _go_on(self, given: dict[str, Any], cache: Any, seat: Seat, length: int) -> None:
        layout = seat.layout
        seat.inside = True
        held = cache.get_seq_length()
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
        elif self.positions and not layout.rolled and (layout.first is not None or layout.lengths is not None):
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
            raise UnsupportedError("a soft prompt cannot be put into this kind of mask", where="attention_mask",
                                   expected="a tensor of two or four axes",
                                   found=f"{kind} {type(mask).__name__} {list(getattr(mask, 'shape', ()))}".strip(),
                                   hint="give a mask of two axes")  # fmt: skip
        return extended_mask(mask, layout, self.window if "sliding" in kind else None, came=came)

    def _check_length(self, layout: Layout, length: int, held: Any) -> None:
        if self.limit is None or isinstance(held, torch.Tensor):
            return
        total = length + (held or layout.count)
        if total > self.limit:
            raise ConfigError("the input and its soft prompt are longer than the model's positions",
                              where=self.stack, expected=f"{self.limit} at most",
                              found=f"{total}, {layout.count} of them virtual")  # fmt: skip


class Decoding:
    """A decoder whose encoder has a prompt: the mask of what it attends to there has to know it."""

    def __init__(self, prompts: Prompts, parameters: tuple[str, ...]) -> None:
        self.prompts = prompts
        self.parameters = parameters

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook."""
        live = None if self.prompts.inside else self.prompts.of("encoder")
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
        layout = live.layout(batch, length, _first(mask), rolled=True)
        given["encoder_attention_mask"] = extended_mask(mask, layout, came=False)
        return (), given


class Parent:
    """What holds encoder and decoder: its outputs tell of the encoder's, which are cut here."""

    def __init__(self, prompts: Prompts, module: nn.Module) -> None:
        self.prompts = prompts
        self.module = (module,)
        self.parameters = tuple(inspect.signature(module.forward).parameters)

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Post-hook."""
        live = self.prompts.of("encoder")
        if live is None or live.keep:
            return None
        given = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        mask = given.get("attention_mask")
        return cut_encoder(output, lambda batch, size: live.layout(batch, size - live.count, _first(mask), rolled=True))


class Heads:
    """The root, where it is more than what reads the tokens: its labels, and outputs that keep the prompt.

    A model of language learns to say the first token after the prompt as well, so its head gets one entry more.
    """

    def __init__(self, prompts: Prompts, stack: Stack, root: nn.Module) -> None:
        self.prompts = prompts
        self.stack = stack
        self.parameters = tuple(inspect.signature(root.forward).parameters)
        self.shifts = bool(_call(root, "can_generate"))

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook."""
        prompts = self.prompts
        prompts.one_more, prompts.kept = False, 0
        live = prompts.of(self.stack.name)
        if live is None:
            return None
        given = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        cache = given.get("past_key_values")
        if (cache is not None and is_filled(cache)) or not _has_input(given):
            return None
        batch, length = _size(given)
        labels = given.get("labels")
        if live.keep:
            prompts.kept = live.count
            prompts.one_more = self.shifts and _is_by_token(labels, batch, length)
            return (), _with_front(given, live.count, prompts.filler(), batch, length)
        if not self.shifts or not _is_by_token(labels, batch, length):
            return None
        prompts.one_more = True
        front = labels.new_full((batch, 1), IGNORED)
        _, lengths = live.of_batch(batch)
        if lengths is not None:  # what has no prompt has nothing that says its first token
            first = _first(given.get("attention_mask"))
            begin = torch.zeros_like(lengths) if first is None else first
            bare = (lengths == 0)[:, None] & (torch.arange(length, device=labels.device) == begin[:, None])
            labels = labels.masked_fill(bare, IGNORED)
        given["labels"] = torch.cat([front, labels], dim=1)
        if isinstance(given.get("logits_to_keep"), torch.Tensor) or given.get("logits_to_keep"):
            given["logits_to_keep"] = given["logits_to_keep"] + 1
        return (), given

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Post-hook."""
        prompts = self.prompts
        trims = prompts.one_more and not prompts.kept
        prompts.one_more, prompts.kept = False, 0
        if not trims or output is None:
            return None
        labels = kwargs["labels"]
        return trimmed(output, labels.shape[1])


def later_masks(prompts: Prompts) -> Callable[..., Any]:
    """What makes the masks of a generation before its model runs, which is too early for a prompt."""
    return _LaterMasks(prompts)


class _LaterMasks:
    def __init__(self, prompts: Prompts) -> None:
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


def _has_input(given: dict[str, Any]) -> bool:
    return given.get("input_ids") is not None or given.get("inputs_embeds") is not None


def _size(given: dict[str, Any]) -> tuple[int, int]:
    """B and L of what is given."""
    tokens = given.get("input_ids")
    tokens = given["inputs_embeds"] if tokens is None else tokens
    return tokens.shape[0], tokens.shape[1]


def _first(mask: Any) -> torch.Tensor | None:
    """Where the text of each sample begins; None where a glance says that all begin at once."""
    if isinstance(mask, dict):
        mask = next((part for part in mask.values() if isinstance(part, torch.Tensor)), None)
    if not isinstance(mask, torch.Tensor) or mask.dim() not in (2, 4):
        return None
    first = first_real(mask)
    if first.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(first.any()):
        return None
    return first


def _is_by_token(labels: Any, batch: int, length: int) -> TypeGuard[torch.Tensor]:
    return isinstance(labels, torch.Tensor) and labels.shape == (batch, length) and not labels.is_floating_point()


def _refuse_packed(positions: torch.Tensor, mask: Any) -> None:
    """Refuse several texts in one row, told apart by their positions: the prompt would stand before the first alone."""
    if mask is not None or positions.dim() != 2 or torch.compiler.is_compiling():
        return
    if bool((positions.diff(dim=1) != 1).any()):
        raise UnsupportedError("a soft prompt cannot stand before each of several texts in one row",
                               where="position_ids", expected="positions that count up",
                               hint="pad the texts instead of packing them")  # fmt: skip


def _with_front(given: dict[str, Any], count: int, filler: int, batch: int, length: int) -> dict[str, Any]:
    """A head's inputs with places for the prompt, whose outputs it is going to get."""
    out = dict(given)
    for name, value in (("input_ids", filler + 1), ("attention_mask", 1), ("labels", IGNORED)):
        part = given.get(name)
        if not isinstance(part, torch.Tensor) or part.shape != (batch, length):
            continue
        if name != "labels" or not part.is_floating_point():
            out[name] = torch.cat([part.new_full((batch, count), value), part], dim=1)
    embeds = given.get("inputs_embeds")
    if embeds is not None:
        out["inputs_embeds"] = torch.cat([embeds.new_zeros(batch, count, embeds.shape[2]), embeds], dim=1)
    for name in ("start_positions", "end_positions"):
        if isinstance(given.get(name), torch.Tensor):
            out[name] = given[name] + count
    return out


def _without_front(given: dict[str, Any], count: int) -> dict[str, Any]:
    """What `_with_front` put in is taken out again where the tokens are read."""
    out = dict(given)
    for name in ("input_ids", "attention_mask", "inputs_embeds"):
        part = given.get(name)
        if isinstance(part, torch.Tensor) and part.dim() in (2, 3):
            out[name] = part[:, count:]
    return out


def _learned_positions(module: nn.Module) -> int | None:
    """How many positions a model has learned; None where it computes them for any length."""
    from embedsurgery.runtime.prompts import position_limit

    limit = position_limit(module)
    if limit is None:
        return None
    near = range(limit, limit + 4)
    learned = [part for name, part in module.named_modules() if "position" in name.lower() or name.endswith("wpe")]
    if not any(getattr(part, "num_embeddings", -1) in near for part in learned):
        return None
    padded = any(getattr(part, "padding_idx", None) is not None and part.num_embeddings == limit for part in learned)
    return (
        limit - 2
        if padded and any(hasattr(p, "create_position_ids_from_input_ids") for p in module.modules())
        else limit
    )


def _window(config: Any) -> int | None:
    """How far the model's tokens see back, where that is one number."""
    for name in ("sliding_window", "attention_chunk_size"):
        with suppress(Exception):  # where it differs from layer to layer, asking raises an error of transformers' own
            value = getattr(config, name, None)
            if isinstance(value, int):
                return value
    return None


def _call(model: Any, method: str) -> Any:
    function = getattr(model, method, None)
    return function() if callable(function) else None

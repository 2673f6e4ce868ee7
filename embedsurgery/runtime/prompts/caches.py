"""Caches with a prompt in them, which to everybody but the model are as long as the text.

Whoever calls a model counts the tokens that he gave it: ``generate`` cuts its input by a cache's length, and so does a
loop by hand. So a cache that a prompt has gone into says that length, and the whole one only while the model runs. It
becomes an object of a subclass of its own class, and remembers where the prompt stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from embedsurgery.errors import AttachmentError, UnsupportedError
from embedsurgery.runtime.prompts.layout import Layout

ROOM = "_embedsurgery_room"

_NAMES = ("cache", "past_key_values")
"""What forwards call their cache: transformers since 5.24, and before."""


@dataclass
class CachedPrompt:
    """What a cache knows of the prompt in it.

    Attributes:
        layout: Where it stands.
        names: The adapter of each sample, or the one of all.
        inside: Whether the model runs just now.
    """

    layout: Layout
    names: tuple[str | None, ...]
    inside: bool = False


class Prompted:
    """Mixed into the class of a cache."""

    prompt_seat: CachedPrompt | None

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """How many tokens of text the cache holds; the prompt's with them while the model runs."""
        length = super().get_seq_length(layer_idx)  # type: ignore[misc]
        if self.prompt_seat is None or self.prompt_seat.inside:
            return length
        count = self.prompt_seat.layout.count
        return (length - count).clamp(min=0) if isinstance(length, torch.Tensor) else max(length - count, 0)

    def reset(self) -> None:
        """As the cache does; the prompt goes as well."""
        super().reset()  # type: ignore[misc]
        self.prompt_seat = None

    def crop(self, size: int) -> None:
        """As the cache does: to a length of text, as transformers 4 has it, or without the last ``-size`` tokens."""
        if self.prompt_seat is not None and not self.prompt_seat.inside and size > 0:
            size += self.prompt_seat.layout.count
        super().crop(size)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """As the cache does."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._choose(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """As the cache does."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._choose(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As the cache does."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if self.prompt_seat is not None:
            layout = self.prompt_seat.layout
            self.prompt_seat.layout = layout.repeated(layout.batch * repeats)

    def _choose(self, indices: torch.Tensor) -> None:
        if self.prompt_seat is not None:
            self.prompt_seat.layout = self.prompt_seat.layout.chosen(indices)

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain = type(self).__mro__[2]  # behind the class made here and the mix-in
        return _again, (plain,), self.__dict__


_classes: dict[type, type] = {}


def _class_of(plain: type) -> type:
    if plain not in _classes:
        _classes[plain] = type(plain.__name__, (Prompted, plain), {"__module__": plain.__module__})
    return _classes[plain]


def _again(plain: type) -> Any:
    return object.__new__(_class_of(plain))


def cache_of(given: Mapping[str, Any]) -> Any:
    """The cache among what a forward is given, by name; None where there is none."""
    return next((given[name] for name in _NAMES if given.get(name) is not None), None)


def seat_of(cache: Any) -> CachedPrompt | None:
    """What a cache knows of a prompt in it; None for an empty one, or one that was filled without."""
    return cache.prompt_seat if isinstance(cache, Prompted) else None


def take_seat(cache: Any, layout: Layout, names: tuple[str | None, ...]) -> None:
    """Let a cache know that a prompt has gone into it."""
    if not isinstance(cache, Prompted):
        cache.__class__ = _class_of(type(cache))
    cache.prompt_seat = CachedPrompt(layout, names)


def is_filled(cache: Any) -> bool:
    """Whether a cache holds anything, also one that a prompt alone is in.

    Raises:
        UnsupportedError: It is no cache of transformers.
    """
    if seat_of(cache) is not None:
        return True
    if not hasattr(cache, "get_seq_length"):
        raise UnsupportedError(
            "a soft prompt needs a cache that says its length",
            where="the cache",
            expected="a Cache of transformers",
            found=type(cache).__name__,
        )
    try:
        return bool((cache.get_seq_length() or 0) > 0)  # some say None as long as they are empty
    except ValueError as error:  # what keeps states alone has no length
        raise UnsupportedError(
            "a soft prompt cannot go on from this model's kind of memory",
            where="the cache",
            found=type(cache).__name__,
            hint="generate with use_cache=False",
        ) from error


def check_seat(cache: Any, names: tuple[str | None, ...], where: str) -> CachedPrompt:
    """The seat of a filled cache.

    Raises:
        AttachmentError: What is in the cache was not computed with what is live now.
    """
    seat = seat_of(cache)
    if seat is not None and seat.names == names:
        return seat
    raise AttachmentError(
        "the cache was filled under another soft prompt",
        where=where,
        expected=_named(names),
        found="none" if seat is None else _named(seat.names),
        hint="begin with a new cache",
    )


def _named(names: tuple[str | None, ...]) -> str:
    return ", ".join("none" if name is None else name for name in dict.fromkeys(names)) or "none"


def make_room(cache: Any, count: int, length: int, window: int | None) -> None:
    """Give an empty cache of fixed size room for a prompt beside what it was made for.

    Args:
        cache: Any cache.
        count: N.
        length: Tokens of text that come with it.
        window: The model's sliding window, above which a layer never grows.

    Raises:
        UnsupportedError: Its memory is there already, and too small.
    """
    held = getattr(cache, "self_attention_cache", cache)
    for layer in getattr(held, "layers", ()):
        size = getattr(layer, "max_cache_len", None)
        if not isinstance(size, int) or getattr(layer, ROOM, 0) >= count:
            continue
        if not layer.is_initialized:
            grown = size + count - getattr(layer, ROOM, 0)
            layer.max_cache_len = min(grown, max(window, size)) if layer.is_sliding and window else grown
            setattr(layer, ROOM, count)
        elif size < count + length and not layer.is_sliding:
            raise UnsupportedError(
                "a static cache without room for the soft prompt",
                where="the cache",
                expected=f"max_cache_len of {count + length} or more",
                found=size,
                hint="make it longer, or give it before its memory is allocated",
            )

"""Caches that hold a prompt. To everyone but the model they have the length of the text.

The caller of a model counts the tokens that it passed: ``generate`` slices its input by the cache's length, and so does
a loop written by hand. So a cache that holds a prompt reports the text's length, and the whole length only while the
model runs. For that the cache object gets a subclass of its own class, which records the prompt's layout; checks with
``isinstance`` still hold.

When prompts are inserted and when a cache is continued is decided in ``stack_hooks.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from embedsurgery.errors import AttachmentError, UnsupportedError
from embedsurgery.runtime.prompts.layout import PromptLayout

ROOM = "_embedsurgery_room"
"""Attribute of a cache layer: by how many entries `grow_static_cache` enlarged it."""

_CACHE_ARGUMENTS = ("cache", "past_key_values")
"""The cache's names among a forward's arguments: since transformers 5.24, and before. 5.24 accepts both."""


@dataclass
class CachedPrompt:
    """What a cache records of the prompt that it holds.

    Attributes:
        layout: The prompt's layout.
        names: The adapter of each sample, or one for all.
        running: Whether the model runs, so that the cache reports its whole length.
    """

    layout: PromptLayout
    names: tuple[str | None, ...]
    running: bool = False


class PromptedCache:
    """Mixed into the class of a cache, before that class."""

    cached_prompt: CachedPrompt | None

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Number of text tokens in the cache; while the model runs, the prompt's entries are included."""
        length = super().get_seq_length(layer_idx)  # type: ignore[misc]
        if self.cached_prompt is None or self.cached_prompt.running:
            return length
        count = self.cached_prompt.layout.count
        return (length - count).clamp(min=0) if isinstance(length, torch.Tensor) else max(length - count, 0)

    def reset(self) -> None:
        """Reset the cache and forget its prompt."""
        super().reset()  # type: ignore[misc]
        self.cached_prompt = None

    def crop(self, size: int) -> None:
        """Crop the cache to a length of text, as transformers 4 calls it, or by ``-size`` tokens, as 5 does."""
        # A positive size is a length of text, so the prompt's is added. A count from the end needs no change.
        if self.cached_prompt is not None and not self.cached_prompt.running and size > 0:
            size += self.cached_prompt.layout.count
        super().crop(size)  # type: ignore[misc]

    # Beam search and other ways to generate reorder, repeat and select the cache's samples. The layout has to follow,
    # because the samples of a padded batch start at different indices.

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the cache's samples, and the layout with them."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._select_samples(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Select some of the cache's samples, and their layout."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._select_samples(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each of the cache's samples, and the layout with them."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if self.cached_prompt is not None:
            layout = self.cached_prompt.layout
            self.cached_prompt.layout = layout.repeat(layout.batch * repeats)

    def _select_samples(self, indices: torch.Tensor) -> None:
        if self.cached_prompt is not None:
            self.cached_prompt.layout = self.cached_prompt.layout.select(indices)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle and deepcopy find a class by its module and name, and a class made at run time has neither.
        plain = type(self).__mro__[2]  # after the generated class and this one
        return _rebuild_cache, (plain,), self.__dict__


_classes: dict[type, type] = {}


def _prompted_class(plain: type) -> type:
    if plain not in _classes:
        _classes[plain] = type(plain.__name__, (PromptedCache, plain), {"__module__": plain.__module__})
    return _classes[plain]


def _rebuild_cache(plain: type) -> Any:
    return object.__new__(_prompted_class(plain))


def cache_of(given: Mapping[str, Any]) -> Any:
    """Return the cache among the arguments of a call, or None."""
    return next((given[name] for name in _CACHE_ARGUMENTS if given.get(name) is not None), None)


def cached_prompt_of(cache: Any) -> CachedPrompt | None:
    """Return the record of the prompt that a cache holds; None for an empty cache, or one filled without a prompt."""
    return cache.cached_prompt if isinstance(cache, PromptedCache) else None


def record_prompt(cache: Any, layout: PromptLayout, names: tuple[str | None, ...]) -> None:
    """Record in a cache that it holds a prompt. This changes the cache's class."""
    if not isinstance(cache, PromptedCache):
        cache.__class__ = _prompted_class(type(cache))
    cache.cached_prompt = CachedPrompt(layout, names)


def is_filled(cache: Any) -> bool:
    """Whether a cache holds anything, a prompt alone included.

    Raises:
        UnsupportedError: The cache is not one of transformers', or has no length.
    """
    if cached_prompt_of(cache) is not None:
        return True
    if not hasattr(cache, "get_seq_length"):
        raise UnsupportedError(
            "a soft prompt needs a cache with a length",
            where="the cache",
            expected="a Cache of transformers",
            found=type(cache).__name__,
        )
    try:
        return bool((cache.get_seq_length() or 0) > 0)  # some return None while they are empty
    except ValueError as error:  # a cache that has only recurrent states has no length
        raise UnsupportedError(
            "a soft prompt cannot continue from this kind of cache",
            where="the cache",
            found=type(cache).__name__,
            hint="generate with use_cache=False",
        ) from error


def check_cached_prompt(cache: Any, names: tuple[str | None, ...], where: str) -> CachedPrompt:
    """Return the record of the prompt in a filled cache.

    Args:
        cache: The cache.
        names: The live adapter of each sample, or one for all; empty if none is live.
        where: The stack's name, for the error.

    Raises:
        AttachmentError: The cache was filled with other prompts than the live ones.
    """
    cached = cached_prompt_of(cache)
    if cached is not None and cached.names == names:
        return cached
    raise AttachmentError(
        "the cache was filled under another soft prompt",
        where=where,
        expected=_join_names(names),
        found="none" if cached is None else _join_names(cached.names),
        hint="start with a new cache",
    )


def _join_names(names: tuple[str | None, ...]) -> str:
    return ", ".join("none" if name is None else name for name in dict.fromkeys(names)) or "none"


def grow_static_cache(cache: Any, count: int, length: int, window: int | None) -> None:
    """Enlarge an empty cache of fixed size by the prompt's length; leave other caches as they are.

    A static cache is made for the length of the text, by ``generate`` or by the caller, who cannot see the prompt. Its
    layers allocate their memory at the first update, so until then they can be enlarged.

    Args:
        cache: Any cache.
        count: N.
        length: Number of text tokens in this call.
        window: The model's sliding window. A sliding layer never needs more than that.

    Raises:
        UnsupportedError: The memory is allocated already, and too small.
    """
    owner = getattr(cache, "self_attention_cache", cache)  # that of an EncoderDecoderCache
    for layer in getattr(owner, "layers", ()):
        size = getattr(layer, "max_cache_len", None)
        if not isinstance(size, int) or getattr(layer, ROOM, 0) >= count:
            continue
        if not layer.is_initialized:
            grown = size + count - getattr(layer, ROOM, 0)
            layer.max_cache_len = min(grown, max(window, size)) if layer.is_sliding and window else grown
            setattr(layer, ROOM, count)
        elif size < count + length and not layer.is_sliding:
            raise UnsupportedError(
                "the static cache has no room for the soft prompt",
                where="the cache",
                expected=f"max_cache_len of at least {count + length}",
                found=size,
                hint="make the cache longer, or pass it before its memory is allocated",
            )

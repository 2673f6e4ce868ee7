"""Finds how a model gets the positions of its tokens, how many it has, and how far its tokens attend back.

The position ids of a call with a prompt are computed in ``layout.py``.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import nn

from embedsurgery.graph.config import position_limit

_POSITION_METHODS = ("create_position_ids_from_input_ids", "get_rope_index")
"""Methods of modules that compute a batch's positions from its ids or images, whatever its padding."""

_MASK_COUNTERS = frozenset({"opt"})
"""``model_type`` of models whose positions count the mask's real tokens, so hidden ones inside a text move them."""


@dataclass(frozen=True)
class PositionSource:
    """How a model gets the positions of its tokens.

    Attributes:
        accepted: ``position_ids`` is an argument of its forward.
        derived: Without that argument it computes positions from more than indices: from the ids that are not padding,
            from the mask, or from where images are.
        relative: It has no absolute positions, only distances between tokens.
    """

    accepted: bool
    derived: bool
    relative: bool

    @classmethod
    def of(cls, module: nn.Module, parameters: tuple[str, ...]) -> PositionSource:
        """Inspect a module that reads tokens.

        Args:
            module: The module.
            parameters: Names of its forward's parameters.
        """
        parts = list(module.modules())
        derived = any(hasattr(part, method) for part in parts for method in _POSITION_METHODS)
        relative = any("relative" in name.rpartition(".")[2] for name, _ in module.named_modules())
        return cls(
            accepted="position_ids" in parameters,
            derived=derived or getattr(getattr(module, "config", None), "model_type", None) in _MASK_COUNTERS,
            relative=relative or any("alibi" in name for name in dir(type(module))),
        )

    @property
    def allows_uneven(self) -> bool:
        """Whether the samples of a batch that fills a cache may start at different indices."""
        return self.accepted or self.relative


def learned_position_limit(module: nn.Module) -> int | None:
    """Return the number of positions that a model has learned; None if it computes them for any length."""
    limit = position_limit(getattr(module, "config", None))
    if limit is None:
        return None
    near = range(limit, limit + 4)  # some tables have rows more: OPT's and BART's begin with an offset of 2
    learned = [part for name, part in module.named_modules() if _is_position_name(name)]
    if not any(getattr(part, "num_embeddings", -1) in near for part in learned):
        return None
    padded = any(getattr(part, "padding_idx", None) is not None and part.num_embeddings == limit for part in learned)
    # RoBERTa's positions start behind its padding_idx, and its config counts these rows as positions.
    skips_padding = any(hasattr(part, "create_position_ids_from_input_ids") for part in module.modules())
    return limit - 2 if padded and skips_padding else limit


def _is_position_name(name: str) -> bool:
    last = name.rpartition(".")[2].lower()
    return "position" in last or last == "wpe"


def window_of(config: Any) -> int | None:
    """Return how many tokens back a model's tokens attend to, if that is one number."""
    for name in ("sliding_window", "attention_chunk_size"):
        with suppress(Exception):  # transformers raises an error of its own if the value differs between layers
            value = getattr(config, name, None)
            if isinstance(value, int):
                return value
    return None

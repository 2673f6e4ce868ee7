"""How a model comes by the positions of its tokens, how many it has, and how far they see: asked of it once.

What positions a prompt's tokens get is ``prompt_layout.py``'s.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import nn

from embedsurgery.graph.config import position_limit

_FINDS = ("create_position_ids_from_input_ids", "get_rope_index")
"""Methods of modules that find positions for a batch, whatever its padding."""

_COUNT_MASKS = frozenset({"opt"})
"""``model_type`` of models whose positions count the tokens that the mask shows, also behind some that it hides."""


@dataclass(frozen=True)
class Counting:
    """How a model comes by the positions of its tokens.

    Attributes:
        taken: They are among what it is given.
        own: Where they are not given, it finds them by more than places: by the ids that are no padding, by the mask,
            or by where pictures stand.
        measured: It has none, and measures how far tokens lie apart.
    """

    taken: bool
    own: bool
    measured: bool

    @classmethod
    def of(cls, module: nn.Module, parameters: tuple[str, ...]) -> Counting:
        """That of what reads tokens, by the parameters of its forward, and the names in it."""
        parts = list(module.modules())
        own = any(hasattr(part, method) for part in parts for method in _FINDS)
        relative = any("relative" in name.rpartition(".")[2] for name, _ in module.named_modules())
        return cls(
            taken="position_ids" in parameters,
            own=own or getattr(getattr(module, "config", None), "model_type", None) in _COUNT_MASKS,
            measured=relative or any("alibi" in name for name in dir(type(module))),
        )

    @property
    def stands(self) -> bool:
        """Whether texts may begin at several places of one batch and still go on from a cache."""
        return self.taken or self.measured


def learned_positions(module: nn.Module) -> int | None:
    """How many positions a model has learned; None where it computes them for any length."""
    limit = position_limit(getattr(module, "config", None))
    if limit is None:
        return None
    near = range(limit, limit + 4)
    learned = [part for name, part in module.named_modules() if _is_positions(name)]
    if not any(getattr(part, "num_embeddings", -1) in near for part in learned):
        return None
    padded = any(getattr(part, "padding_idx", None) is not None and part.num_embeddings == limit for part in learned)
    return (
        limit - 2
        if padded and any(hasattr(p, "create_position_ids_from_input_ids") for p in module.modules())
        else limit
    )


def _is_positions(name: str) -> bool:
    last = name.rpartition(".")[2].lower()
    return "position" in last or last == "wpe"


def window_of(config: Any) -> int | None:
    """How far the model's tokens see back, where that is one number."""
    for name in ("sliding_window", "attention_chunk_size"):
        with suppress(Exception):  # where it differs from layer to layer, asking raises an error of transformers' own
            value = getattr(config, name, None)
            if isinstance(value, int):
                return value
    return None

"""The factor by which a model's lookup multiplies its rows: from the lookup's site in memory, from the config on disk.

Only a factor in the lookup's own module counts. One that the model applies after embedding (Gemma's before transformers
4.57, Marian's) applies to a baked row and to a vector in its place alike. The model types are those whose lookup is a
``*ScaledWordEmbedding`` class in transformers 5.23; they were found by measuring.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedsurgery.graph import Table
from embedsurgery.graph.config import TEXT_SECTIONS, as_mapping
from embedsurgery.tensors.raw import RawArray

_BY_WIDTH = frozenset(
    {
        "diffusion_gemma",
        "diffusion_gemma_text",
        "embedding_gemma2",
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "gemma3n",
        "gemma3n_text",
        "gemma4",
        "gemma4_text",
        "gemma4_unified",
        "gemma4_unified_text",
        "t5gemma2",
        "t5gemma2_text",
        "t5gemma2_encoder",
        "t5gemma2_decoder",
        "vaultgemma",
    }
)
"""Model types whose lookup multiplies by the square root of its width."""

_BY_FLAG = {
    **dict.fromkeys(("bart", "blenderbot", "mbart", "pp_formulanet", "trocr"), False),
    **dict.fromkeys(
        (
            "bigbird_pegasus",
            "biogpt",
            "m2m_100",
            "nllb-moe",
            "pegasus_x",
            "plbart",
            "seamless_m4t",
            "seamless_m4t_v2",
            "xglm",
        ),
        True,
    ),
}
"""Model types whose lookup multiplies by the square root of its width if ``scale_embedding`` is set -> its default."""

_BY_KEY = {"minicpm3": "scale_emb"}
"""Model types -> the key of the factor in their config."""


@dataclass(frozen=True)
class LookupScale:
    """A lookup's factor.

    Attributes:
        value: The factor.
        rounded: Whether the lookup rounds it to its table's dtype first.
    """

    value: float = 1.0
    rounded: bool = False

    def in_dtype(self, dtype: str) -> float:
        """Return the factor that multiplies rows of a dtype."""
        if not self.rounded:
            return self.value
        return float(RawArray.of(np.array([self.value], dtype=np.float32), dtype).float32()[0])


def scale_of(table: Table, config: Any) -> LookupScale | None:
    """Return the factor of a table's lookup; None if neither a module nor a config tells it.

    Args:
        table: A table of a model or a checkpoint.
        config: The model's config, an object or a mapping, or None.
    """
    configured = None if config is None else _scale_from_config(as_mapping(config), table.shape[1])
    measured = [site.scale for site in table.sites if site.role == "input" and site.scale is not None]
    if measured:
        # A site has the factor alone; whether the lookup rounds it depends on the model type.
        return LookupScale(measured[0], configured is not None and configured.rounded)
    return configured


def _scale_from_config(config: Mapping[str, Any], width: int) -> LookupScale:
    """Return the factor by the innermost section of a config that has a known model type."""
    for section in reversed(list(_config_sections(config))):
        kind = section.get("model_type")
        if kind in _BY_WIDTH:
            return LookupScale(width**0.5, rounded=True)
        if kind in _BY_FLAG:
            flag = section.get("scale_embedding", _BY_FLAG[str(kind)])
            return LookupScale(math.sqrt(width)) if flag is True else LookupScale()
        if kind in _BY_KEY and isinstance(section.get(_BY_KEY[str(kind)]), (int, float)):
            return LookupScale(float(section[_BY_KEY[str(kind)]]), rounded=True)
    return LookupScale()


def _config_sections(config: Mapping[str, Any], depth: int = 3) -> Iterator[Mapping[str, Any]]:
    yield config
    for key in TEXT_SECTIONS:
        if isinstance(config.get(key), Mapping) and depth:
            yield from _config_sections(config[key], depth - 1)

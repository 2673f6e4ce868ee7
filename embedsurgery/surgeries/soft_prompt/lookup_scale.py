"""By what a model's lookup multiplies its rows: from its site in memory, from the config for files.

Only what the lookup's own module does counts. A factor that the model applies to whatever is embedded (Gemma's before
transformers 4.57, Marian's) meets a row and a vector in its place alike. Measured on transformers 5.23, whose
``*ScaledWordEmbedding`` classes these are.
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
"""Model types whose lookup does where ``scale_embedding`` says so, and what a config means that does not say it."""

_BY_KEY = {"minicpm3": "scale_emb"}
"""Model types whose config has the factor under this key."""


@dataclass(frozen=True)
class Scale:
    """A lookup's factor.

    Attributes:
        value: It.
        rounded: The lookup rounds it to its table's dtype first.
    """

    value: float = 1.0
    rounded: bool = False

    def in_dtype(self, dtype: str) -> float:
        """The factor as it meets rows of a dtype."""
        if not self.rounded:
            return self.value
        return float(RawArray.of(np.array([self.value], dtype=np.float32), dtype).float32()[0])


def scale_of(table: Table, config: Any) -> Scale | None:
    """The factor of a table's lookup; None where neither a module nor a config tells.

    Args:
        table: Of a model or of a checkpoint.
        config: The model's config, an object or a mapping; None where there is none.
    """
    said = None if config is None else _said(as_mapping(config), table.shape[1])
    found = [site.scale for site in table.sites if site.role == "input" and site.scale is not None]
    if found:
        return Scale(found[0], said is not None and said.rounded)
    return said


def _said(config: Mapping[str, Any], width: int) -> Scale:
    """What a config says, the innermost section first."""
    for section in reversed(list(_sections(config))):
        kind = section.get("model_type")
        if kind in _BY_WIDTH:
            return Scale(width**0.5, rounded=True)
        if kind in _BY_FLAG:
            flag = section.get("scale_embedding", _BY_FLAG[str(kind)])
            return Scale(math.sqrt(width)) if flag is True else Scale()
        if kind in _BY_KEY and isinstance(section.get(_BY_KEY[str(kind)]), (int, float)):
            return Scale(float(section[_BY_KEY[str(kind)]]), rounded=True)
    return Scale()


def _sections(config: Mapping[str, Any], depth: int = 3) -> Iterator[Mapping[str, Any]]:
    yield config
    for key in TEXT_SECTIONS:
        if isinstance(config.get(key), Mapping) and depth:
            yield from _sections(config[key], depth - 1)

"""What a user asks of LoRA on tables, and how strong a pair of matrices is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from embedsurgery.errors import ConfigError


@dataclass(frozen=True)
class LoraTablesConfig:
    """Asks for a low-rank update of whole tables. PEFT's names and semantics.

    Attributes:
        r: The rank.
        lora_alpha: The update is scaled by ``lora_alpha / r``.
        target_modules: A list of module names, or a regular expression; None is the model's input embedding.
        use_rslora: Scale by ``lora_alpha / sqrt(r)`` (https://arxiv.org/abs/2312.03732).
        seed: Of the matrix that starts at random; the other one starts at zero.

    Raises:
        ConfigError: A rank, alpha or target that is none.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | Sequence[str] | None = None
    use_rslora: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if type(self.r) is not int or self.r < 1:
            raise ConfigError("r is no rank", expected="a positive integer", found=repr(self.r))
        if isinstance(self.lora_alpha, bool) or not isinstance(self.lora_alpha, (int, float)):
            raise ConfigError("lora_alpha is no number", found=repr(self.lora_alpha))
        if self.target_modules is not None and not isinstance(self.target_modules, str):
            names = tuple(self.target_modules)
            if not names or not all(isinstance(name, str) for name in names):
                raise ConfigError("target_modules has no module names", found=repr(self.target_modules))
            object.__setattr__(self, "target_modules", names)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def scaling(alpha: float, r: int, *, rslora: bool) -> float:
    """The factor of ``B @ A``."""
    return alpha / (math.sqrt(r) if rslora else r)

"""The config of LoRA on tables, and the scaling of its update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from embedsurgery.errors import ConfigError


@dataclass(frozen=True)
class LoraTablesConfig:
    """A low-rank update of whole tables. The names and their meaning are PEFT's.

    Attributes:
        r: The rank.
        lora_alpha: The update is scaled by ``lora_alpha / r``.
        target_modules: A list of module names, or a regular expression; None for the model's input embedding.
        use_rslora: Scale by ``lora_alpha / sqrt(r)`` (https://arxiv.org/abs/2312.03732).
        seed: Seed of the random matrix; the other matrix starts at zero.

    Raises:
        ConfigError: ``r``, ``lora_alpha`` or ``target_modules`` is invalid.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | Sequence[str] | None = None
    use_rslora: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if type(self.r) is not int or self.r < 1:
            raise ConfigError("invalid rank", where="r", expected="a positive integer", found=repr(self.r))
        if isinstance(self.lora_alpha, bool) or not isinstance(self.lora_alpha, (int, float)):
            raise ConfigError("invalid alpha", where="lora_alpha", expected="a number", found=repr(self.lora_alpha))
        if self.target_modules is not None and not isinstance(self.target_modules, str):
            names = tuple(self.target_modules)
            if not names or not all(isinstance(name, str) for name in names):
                found = repr(self.target_modules)
                raise ConfigError("no modules", where="target_modules", expected="module names", found=found)
            object.__setattr__(self, "target_modules", names)

    def to_json(self) -> dict[str, Any]:
        """Return the config as JSON values."""
        return asdict(self)


def scaling(alpha: float, r: int, *, rslora: bool) -> float:
    """Return the factor of ``B @ A``."""
    return alpha / (math.sqrt(r) if rslora else r)

"""The config of a soft prompt, checked when it is made, and how an adapter stores it.

``surgery.py`` makes an adapter from it; ``bake_config.py`` has the options for baking.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from embedsurgery.adapters.adapter import Adapter
from embedsurgery.errors import ConfigError
from embedsurgery.tensors.raw import RawArray

NAME = "soft_prompt"
TENSOR = "prompt_embeddings"
"""The virtual tokens' vectors among an adapter's tensors: F32 (n x submodules, D), the first submodule's first."""

UNUSED = f"{TENSOR}.unused"
"""Rows of a PEFT file that no forward of PEFT reads, kept so that the file is written as it was."""

Submodule = Literal["model", "encoder", "decoder"]
SUBMODULES: tuple[Submodule, ...] = ("model", "encoder", "decoder")
"""The parts of a model that can have a prompt: the whole transformer, or one of two."""

INITS = ("random", "sample_vocab", "text")


@dataclass(frozen=True)
class SoftPromptConfig:
    """Asks for a soft prompt: virtual tokens before each input, which are trained while the model stays frozen.

    Lester et al. 2021, https://arxiv.org/abs/2104.08691.

    Attributes:
        num_virtual_tokens: Number of virtual tokens, n.
        init: How they start: "random", with the standard deviation of the embedding table; "sample_vocab", as the
            vectors of n tokens drawn from the vocabulary, without repeats while there are enough; "text", as the
            vectors of ``init_text``.
        init_text: For "text": repeated or cut to n tokens.
        tokenizer: For "text", and for "sample_vocab" to skip unused rows: a tokenizer, or the name or directory of one.
            The default is the one given to `attach`. Code that comes with a tokenizer is never run.
        special_tokens: Whether ``init_text`` is tokenised with the special tokens around it, as PEFT does.
        random_std: For "random": the standard deviation. None is the table's; 1.0 is PEFT's, which starts 48 times too
            long on a table initialised with 0.02.
        submodules: For a model with encoder and decoder: which of them get a prompt of their own, "encoder", "decoder",
            or both in a sequence. None is the encoder, or the decoder if the encoder reads no tokens.
        keep_prompt: Whether the model's outputs keep the prompt's positions, before those of the input.
        task_type: PEFT's name of the task, such as "CAUSAL_LM"; None takes it from the model's class.

    Raises:
        ConfigError: An invalid value, or one that its ``init`` does not use.
    """

    num_virtual_tokens: int
    init: str = "random"
    init_text: str | None = None
    tokenizer: Any = field(default=None, repr=False)
    special_tokens: bool = False
    random_std: float | None = None
    submodules: Any = None
    keep_prompt: bool = False
    task_type: str | None = None

    def __post_init__(self) -> None:
        count = self.num_virtual_tokens
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigError("num_virtual_tokens must be a positive integer", expected="1 or more", found=repr(count))
        if self.init not in INITS:
            raise ConfigError("unknown init of a soft prompt", expected=", ".join(INITS), found=repr(self.init))
        if self.init == "text" and not (isinstance(self.init_text, str) and self.init_text.strip()):
            raise ConfigError("init='text' needs a text", expected="init_text", found=repr(self.init_text))
        _refuse_unused(self.init == "text", "init_text", self.init_text, None, "init='text'")
        _refuse_unused(self.init == "text", "special_tokens", self.special_tokens, False, "init='text'")
        _refuse_unused(self.init == "random", "random_std", self.random_std, None, "init='random'")
        std = self.random_std
        if std is not None and (isinstance(std, bool) or not isinstance(std, (int, float)) or not 0 <= std < 1e6):
            raise ConfigError(
                "random_std must be a standard deviation", expected="a number from 0 to 1e6", found=repr(std)
            )
        for name in ("special_tokens", "keep_prompt"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ConfigError(f"{name} must be a bool", expected="True or False", found=repr(value))
        if self.submodules is not None:
            object.__setattr__(self, "submodules", _parse_submodules(self.submodules))

    def to_json(self) -> dict[str, Any]:
        """Return the config as JSON values, with the tokenizer's name in place of a tokenizer."""
        tokenizer = self.tokenizer
        name = tokenizer if isinstance(tokenizer, str) else getattr(tokenizer, "name_or_path", None)
        return {
            "num_virtual_tokens": self.num_virtual_tokens,
            "init": self.init,
            "init_text": self.init_text,
            "tokenizer_name_or_path": str(name) if name else None,
            "special_tokens": self.special_tokens,
            "random_std": self.random_std,
            "submodules": None if self.submodules is None else list(self.submodules),
            "keep_prompt": self.keep_prompt,
            "task_type": self.task_type,
        }


def _refuse_unused(used: bool, name: str, value: object, default: object, expected: str) -> None:
    if not used and value != default:
        raise ConfigError(f"this init does not use {name}", expected=expected, found=f"{name}={value!r}"[:80])


def _parse_submodules(value: Any) -> tuple[Submodule, ...]:
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else ()
    found = tuple(name for name in SUBMODULES if name in names)
    if not found or len(found) != len(names) or ("model" in found and len(found) > 1):
        raise ConfigError(
            "invalid submodules of a soft prompt",
            found=repr(value)[:80],
            expected='"encoder", "decoder" or both in a sequence',
        )
    return found


def submodules_of(config: Mapping[str, Any]) -> tuple[Submodule, ...]:
    """Return the submodules that an adapter has prompts for, in the order of their rows.

    Args:
        config: The ``config`` of its manifest.

    Raises:
        ConfigError: The manifest has other names.
    """
    return _parse_submodules(tuple(config.get("submodules") or ("model",)))


def prompts_of(adapter: Adapter) -> dict[Submodule, RawArray]:
    """Return the prompt of each submodule, F32 (n, D): vectors as the lookup returns them, its scale included."""
    count = int(adapter.manifest.config["num_virtual_tokens"])
    rows = adapter.raw[TENSOR]
    names = submodules_of(adapter.manifest.config)
    return {name: rows.take(range(number * count, (number + 1) * count)) for number, name in enumerate(names)}

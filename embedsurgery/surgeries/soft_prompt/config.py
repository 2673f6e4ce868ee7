"""What a user asks of a soft prompt, checked at once, and what an adapter's manifest keeps of it."""

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
"""Rows of a file of PEFT's that no forward of PEFT's reads, kept so that the file is written as it was."""

Submodule = Literal["model", "encoder", "decoder"]
SUBMODULES: tuple[Submodule, ...] = ("model", "encoder", "decoder")
"""What a prompt can stand in front of: the one transformer there is, or one of two."""

INITS = ("random", "sample_vocab", "text")


@dataclass(frozen=True)
class SoftPromptConfig:
    """Asks for a soft prompt: virtual tokens that are put before each input and trained, the model staying as it is.

    Lester et al. 2021, https://arxiv.org/abs/2104.08691.

    Attributes:
        num_virtual_tokens: How many, n.
        init: How they start: "random", at the scale of the embedding table; "sample_vocab", as the vectors of n
            tokens drawn from the vocabulary, each at most once while there are enough; "text", as those of
            ``init_text``.
        init_text: For "text": repeated or cut to n tokens.
        tokenizer: For "text", and for "sample_vocab" to tell tokens from unused rows: a tokenizer, or the name or
            directory of one. By default that which is given to `attach`. Code that comes with one is never run.
        special_tokens: Whether ``init_text`` is tokenised with the special tokens around it, as PEFT does.
        random_std: For "random": the standard deviation. None is the table's own; 1.0 is PEFT's, which starts 48
            times too long on a table initialised with 0.02.
        submodules: In a model of encoder and decoder, which of them get a prompt of their own: "encoder", "decoder", or
            both in a sequence. None is the encoder, or the decoder where the encoder reads no tokens.
        keep_prompt: Whether the model's outputs keep the prompt's positions, in front of those of the input.
        task_type: What PEFT is told, such as "CAUSAL_LM"; None is found from the model's class.

    Raises:
        ConfigError: A value that is none of these, or one that its ``init`` has no use for.
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
            raise ConfigError("num_virtual_tokens is no count", expected="1 or more", found=repr(count))
        if self.init not in INITS:
            raise ConfigError("no such init of a soft prompt", expected=", ".join(INITS), found=repr(self.init))
        if self.init == "text" and not (isinstance(self.init_text, str) and self.init_text.strip()):
            raise ConfigError("init='text' starts from a text", expected="init_text", found=repr(self.init_text))
        _unless(self.init == "text", "init_text", self.init_text, None, "init='text'")
        _unless(self.init == "text", "special_tokens", self.special_tokens, False, "init='text'")
        _unless(self.init == "random", "random_std", self.random_std, None, "init='random'")
        std = self.random_std
        if std is not None and (isinstance(std, bool) or not isinstance(std, (int, float)) or not 0 <= std < 1e6):
            raise ConfigError("random_std is no standard deviation", expected="a number from 0", found=repr(std))
        for name in ("special_tokens", "keep_prompt"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is no bool", expected="True or False", found=repr(getattr(self, name)))
        if self.submodules is not None:
            object.__setattr__(self, "submodules", _submodules(self.submodules))

    def to_json(self) -> dict[str, Any]:
        """What was asked, as JSON values; of a tokenizer its name."""
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


def _unless(used: bool, name: str, value: object, default: object, expected: str) -> None:
    if not used and value != default:
        raise ConfigError(f"{name} is not used by this init", expected=expected, found=f"{name}={value!r}"[:80])


def _submodules(asked: Any) -> tuple[Submodule, ...]:
    names = (asked,) if isinstance(asked, str) else tuple(asked) if isinstance(asked, Sequence) else ()
    found = tuple(name for name in SUBMODULES if name in names)
    if not found or len(found) != len(names) or ("model" in found and len(found) > 1):
        raise ConfigError(
            "not the submodules of a model",
            found=repr(asked)[:80],
            expected='"encoder", "decoder" or both in a sequence',
        )
    return found


def submodules_of(config: Mapping[str, Any]) -> tuple[Submodule, ...]:
    """What the prompts of an adapter stand in front of, in the order of their rows.

    Args:
        config: The ``config`` of its manifest.
    """
    return _submodules(tuple(config.get("submodules") or ("model",)))


def prompts_of(adapter: Adapter) -> dict[Submodule, RawArray]:
    """The prompt of each submodule, F32 (n, D): vectors as they leave the lookup, its scale included."""
    count = int(adapter.manifest.config["num_virtual_tokens"])
    rows = adapter.raw[TENSOR]
    names = submodules_of(adapter.manifest.config)
    return {name: rows.take(range(number * count, (number + 1) * count)) for number, name in enumerate(names)}

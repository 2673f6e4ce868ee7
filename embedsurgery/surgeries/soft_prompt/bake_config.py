"""The options for baking a soft prompt into a model, checked when they are made.

``baking.py`` follows them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from embedsurgery.errors import ConfigError

PREFIX_PLACES = ("all", "text", "chat", "none")


@dataclass(frozen=True)
class BakeConfig:
    """How a soft prompt becomes tokens of a model.

    Attributes:
        name: Names the tokens: ``<|soft:NAME:0|>`` and so on. None takes the name of the adapter's directory.
        prefix: Where the tokenizer inserts them automatically: before every "text" (its post-processor does, so any
            engine serves the prompted model from plain text), into the "chat" templates, "all" for both, or "none":
            then a request selects the prompt by writing the tokens' texts. None is "all" if one prompt is baked into a
            model without prompts, else "none".
        after_bos: Insert them after the tokens that begin a text ("<s>", "[CLS]"), not before. The prompt was trained
            before these, so only the default computes what the attached model does.
        tied: For a head without a bias that is tied to the input table: "untie" gives the head a table of its own,
            whose rows for the virtual tokens are inert; "keep" keeps the tie, and then only the generation config
            keeps the model from generating virtual tokens.
        reserved: Use the ids of reserved tokens ("[unused7]") first.
        pad_to_multiple_of: If the table grows, grow it to a multiple of this.

    Raises:
        ConfigError: An invalid value.
    """

    name: str | None = None
    prefix: Literal["all", "text", "chat", "none"] | None = None
    after_bos: bool = False
    tied: Literal["untie", "keep"] = "untie"
    reserved: bool = False
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if self.name is not None and (not isinstance(self.name, str) or sanitize_name(self.name) != self.name):
            raise ConfigError(
                "invalid name for virtual tokens",
                expected="letters, digits, '.', '_' and '-'",
                found=repr(self.name)[:80],
            )
        if self.prefix not in (None, *PREFIX_PLACES):
            raise ConfigError("unknown prefix", expected=", ".join(PREFIX_PLACES), found=repr(self.prefix)[:80])
        if self.tied not in ("untie", "keep"):
            raise ConfigError("unknown value of tied", expected="untie or keep", found=repr(self.tied)[:80])
        for key in ("after_bos", "reserved"):
            value = getattr(self, key)
            if not isinstance(value, bool):
                raise ConfigError(f"{key} must be a bool", expected="True or False", found=repr(value)[:80])
        multiple = self.pad_to_multiple_of
        if multiple is not None and (type(multiple) is not int or multiple < 1):
            raise ConfigError("invalid pad_to_multiple_of", expected="a positive integer", found=repr(multiple))


def sanitize_name(name: str) -> str:
    """Return a name in which every character is allowed in a token's text."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-") or "prompt"

"""What a user asks of baking a soft prompt into a model, checked at once."""

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
        name: Names the tokens: ``<|soft:NAME:0|>`` and so on. None takes the adapter's directory's name.
        prefix: Where the tokenizer puts them by itself: before every "text" (its post-processor does, so that any
            engine serves the prompted model from plain text), into the "chat" templates, "all" for both, or "none":
            a request then chooses the prompt by writing the tokens' texts. None is "all" where one prompt is baked
            into a model that has none, else "none".
        after_bos: Put them behind the tokens that begin a text ("<s>", "[CLS]"), not before those. The prompt was
            trained before them, so only the default gives what the attached model gives.
        tied: For a head without a bias that is tied to the input table: "untie" writes a head of its own, whose rows
            for the virtual tokens are inert; "keep" keeps the tie, and nothing but the generation config then keeps
            the model from generating virtual tokens.
        reserved: Take the ids of reserved tokens ("[unused7]") first.
        pad_to_multiple_of: Where the table must grow, grow it to a multiple.

    Raises:
        ConfigError: A value that is none of these.
    """

    name: str | None = None
    prefix: Literal["all", "text", "chat", "none"] | None = None
    after_bos: bool = False
    tied: Literal["untie", "keep"] = "untie"
    reserved: bool = False
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if self.name is not None and (not isinstance(self.name, str) or plain(self.name) != self.name):
            raise ConfigError(
                "not a name for virtual tokens",
                expected="letters, digits, '.', '_' and '-'",
                found=repr(self.name)[:80],
            )
        if self.prefix not in (None, *PREFIX_PLACES):
            raise ConfigError("no such prefix", expected=", ".join(PREFIX_PLACES), found=repr(self.prefix)[:80])
        if self.tied not in ("untie", "keep"):
            raise ConfigError("no such way with a tied head", expected="untie or keep", found=repr(self.tied)[:80])
        for key in ("after_bos", "reserved"):
            if not isinstance(getattr(self, key), bool):
                raise ConfigError(f"{key} is no bool", expected="True or False", found=repr(getattr(self, key))[:80])
        multiple = self.pad_to_multiple_of
        if multiple is not None and (type(multiple) is not int or multiple < 1):
            raise ConfigError("pad_to_multiple_of is no multiple", expected="a positive integer", found=repr(multiple))


def plain(name: str) -> str:
    """A name with nothing in it but what may stand in a token's text."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-") or "prompt"

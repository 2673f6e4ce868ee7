"""Tokens as edits name them, and the prefix that a tokenizer puts before every text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Token:
    """A token of a tokenizer.

    Attributes:
        content: Its text.
        id: Its id.
        special: Whether it is a special token.
        replaces: Text of the reserved token that had the id before and gives it up; None where the id was free.
    """

    content: str
    id: int
    special: bool = False
    replaces: str | None = None


@dataclass(frozen=True)
class Prefix:
    """Tokens that a tokenizer puts before every text automatically.

    Attributes:
        label: Name of the prefix in the tokenizer's post-processor.
        contents: Texts of the tokens, in order.
        ids: Their ids.
        texts: Whether the post-processor puts them before plain texts.
        chats: Whether the chat templates put them before chats.
        after_bos: Whether they follow the tokens that begin a text, "<s>" or "[CLS]"; otherwise they precede those.
    """

    label: str
    contents: tuple[str, ...]
    ids: tuple[int, ...]
    texts: bool = True
    chats: bool = True
    after_bos: bool = False

    @property
    def text(self) -> str:
        """The texts of all tokens as one string."""
        return "".join(self.contents)


def listed_tokens(tokens: Sequence[tuple[str, int]], most: int = 8) -> str:
    """Texts and ids of tokens for a person: the first few, and how many more."""
    shown = ", ".join(f"{text!r} as {index}" for text, index in tokens[:most])
    return shown if len(tokens) <= most else f"{shown} and {len(tokens) - most} more"

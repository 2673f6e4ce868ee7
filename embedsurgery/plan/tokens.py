"""Tokens as edits describe them, and the prefix that a tokenizer prepends to every text."""

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
        replaces: Text of the reserved token whose id it takes over; None if the id was free.
    """

    content: str
    id: int
    special: bool = False
    replaces: str | None = None


@dataclass(frozen=True)
class Prefix:
    """Tokens that a tokenizer prepends to every text automatically.

    Attributes:
        label: Name of the prefix in the tokenizer's post-processor.
        contents: Texts of the tokens, in order.
        ids: Ids of the tokens, in order.
        texts: Whether the post-processor prepends them to plain texts.
        chats: Whether the chat templates prepend them to chats.
        after_bos: Whether they come after the tokens that begin a text, such as "<s>" or "[CLS]", or before them.
    """

    label: str
    contents: tuple[str, ...]
    ids: tuple[int, ...]
    texts: bool = True
    chats: bool = True
    after_bos: bool = False

    @property
    def text(self) -> str:
        """The texts of all tokens, concatenated."""
        return "".join(self.contents)


def format_tokens(tokens: Sequence[tuple[str, int]], most: int = 8) -> str:
    """Format texts and ids of tokens for a report: the first few, and how many more there are."""
    shown = ", ".join(f"{text!r} as {index}" for text, index in tokens[:most])
    return shown if len(tokens) <= most else f"{shown} and {len(tokens) - most} more"

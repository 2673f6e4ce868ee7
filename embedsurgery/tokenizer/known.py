"""The tokens that a tokenizer has, wherever it lies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class KnownTokens:
    """What planning needs of a tokenizer.

    Attributes:
        texts: Id -> text of every token.
        next_id: The id that it gives to the next token that is added.
        encode: Ids of a text, without special tokens.
        unknown: Id of the unknown token, None where there is none.
        source: What it is, for messages.
        replaceable: Gives the ids of reserved tokens ("[unused7]") that a new one may replace, ascending.
        specials: Gives the ids of the added tokens that are special.
    """

    texts: Mapping[int, str]
    next_id: int
    encode: Callable[[str], Sequence[int]] = field(repr=False)
    unknown: int | None = None
    source: str = "tokenizer"
    replaceable: Callable[[], Sequence[int]] = field(default=tuple, repr=False)
    specials: Callable[[], Collection[int]] = field(default=tuple, repr=False)

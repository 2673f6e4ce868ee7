"""What planning new tokens must know of a tokenizer, for one in memory and one on disk.

``live.py`` and ``patching.py`` create it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class KnownTokens:
    """The tokens of a tokenizer, and functions that ask it for more.

    Attributes:
        texts: Id -> text of every token.
        next_id: The id of the next added token.
        encode: Returns the ids of a text, without special tokens around it.
        unknown: Id of the unknown token, None without one.
        source: Name or path of the tokenizer, for messages.
        replaceable: Returns the ids of reserved tokens ("[unused7]") that a new token may replace, ascending.
        specials: Returns the ids of the added tokens that are special.
    """

    texts: Mapping[int, str]
    next_id: int
    encode: Callable[[str], Sequence[int]] = field(repr=False)
    unknown: int | None = None
    source: str = "tokenizer"
    replaceable: Callable[[], Sequence[int]] = field(default=tuple, repr=False)
    specials: Callable[[], Collection[int]] = field(default=tuple, repr=False)

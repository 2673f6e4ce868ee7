"""What a text really becomes: the tokenizers library on the content of a ``tokenizer.json``, and checks with it.

The library is imported only when something is encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from embedsurgery.errors import CheckpointError, ConfigError, UnsupportedError
from embedsurgery.plan import Token
from embedsurgery.tokenizer.content import TokenizerJson, is_reserved

_BLANK = " \t\r\n\u2581\u0120\u010a"
"""White space, also as SentencePiece and byte-level vocabularies spell it."""

Encode = Callable[[str], list[int]]
"""Text -> ids, without special tokens around it."""


def backend(text: str, where: object) -> Any:
    """The library's tokenizer of a ``tokenizer.json``'s text, without truncation and padding.

    Raises:
        CheckpointError: The library refuses the content.
        UnsupportedError: It is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UnsupportedError(
            "encoding a text needs the tokenizers library", where=where, hint="pip install tokenizers"
        ) from error
    with _refusals("load the tokenizer", where):
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return tokenizer


@contextmanager
def _refusals(what: str, where: object) -> Iterator[None]:
    """The library raises nothing narrower than Exception, and where its Rust panics not even that."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"the tokenizers library cannot {what}", where=where, found=str(error)[:200]) from error


def encoder(tokenizer: Any) -> Encode:
    """Encoding by a tokenizer of the library."""

    def encode(text: str) -> list[int]:
        with _refusals("encode with this tokenizer", repr(text)[:80]):
            return list(tokenizer.encode(text, add_special_tokens=False).ids)

    return encode


def check_encodings(
    tokens: Collection[Token], content: TokenizerJson, before: Callable[[], Encode], after: Callable[[], Encode]
) -> None:
    """Refuse tokens that text does not reach, by really encoding.

    Args:
        tokens: What was added.
        content: The tokenizer's content from before.
        before: Gives how it encoded then: asked for the texts of these tokens, and of those that are there, and let go.
        after: Gives how it encodes now. Only one of the two is in memory at a time.

    Raises:
        ConfigError: A text that was one token already, under another id, or that is not its one id now; an added
            token that is there, and that its text would not become any more.
    """
    tried = [token for token in tokens if not is_reserved(token.content)]  # the others' names are given back
    texts = [entry["content"] for entry in content.added if entry["content"]]
    encode = before()
    was = {text: encode(text) for text in dict.fromkeys((*(token.content for token in tried), *texts))}
    del encode  # and with it a tokenizer, which takes more memory than all else here
    encode = after()
    for token in tried:
        found = was[token.content]
        if len(found) == 1 and found[0] not in (content.unknown, token.id) and not _says_less(found[0], token, content):
            raise ConfigError(
                "the tokenizer makes one token of this text already",
                where=repr(token.content),
                found=f"{found[0]} {content.texts.get(found[0])!r}",
                hint=f"train that one, token_indices=[{found[0]}], or add another text",
            )
        check_found(token, encode)
    for text in texts:
        index = content.ids.get(text)
        if was[text] == [index] and (found := encode(text)) != [index] and not _replaced(index, tokens):
            raise ConfigError(
                "a new token would break one that is there",
                where=repr(text),
                expected=f"its text to stay the one id {index}",
                found=found,
                hint="choose a text that is no part of it, or make both special, or neither",
            )


def _says_less(index: int, token: Token, content: TokenizerJson) -> bool:
    """Whether a tokenizer drops what it does not know: all that is left of this text is white space."""
    return bool(token.content.strip(_BLANK)) and not content.texts.get(index, "?").strip(_BLANK)


def _replaced(index: int | None, tokens: Iterable[Token]) -> bool:
    return any(token.id == index and token.replaces is not None for token in tokens)


def check_found(token: Token, encode: Encode) -> None:
    """Refuse a token whose text, alone and between words, does not become its id.

    Raises:
        ConfigError: With what it became.
    """
    alone, between = encode(token.content), encode(f"a {token.content} b")
    if alone != [token.id] or between.count(token.id) != 1:
        raise ConfigError(
            "the tokenizer makes something else of this token's text",
            where=repr(token.content),
            expected=f"the one id {token.id}",
            found=alone if alone != [token.id] else between,
            hint="write it as the tokenizer normalises it, or make it special",
        )

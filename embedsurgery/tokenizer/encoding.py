"""Encodes texts with the tokenizers library, and checks by really encoding that new tokens are found in texts.

``patching.py`` and ``live.py`` call the checks before a new tokenizer replaces the old one. The library is imported by
the first encoding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from embedsurgery.errors import CheckpointError, ConfigError, UnsupportedError
from embedsurgery.plan import Token
from embedsurgery.tokenizer.content import TokenizerJson, is_reserved

_BLANK = " \t\r\n\u2581\u0120\u010a"
"""Whitespace, also as SentencePiece and byte-level vocabularies write it."""

Encode = Callable[[str], list[int]]
"""Text -> ids, without special tokens around it."""


def load_backend(text: str, where: object) -> Any:
    """Load the text of a ``tokenizer.json`` with the tokenizers library, without truncation and padding.

    Raises:
        CheckpointError: The library refuses the content.
        UnsupportedError: The library is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UnsupportedError(
            "encoding needs the tokenizers library", where=where, hint="pip install tokenizers"
        ) from error
    with _translate_library_errors("load the tokenizer", where):
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return tokenizer


@contextmanager
def _translate_library_errors(what: str, where: object) -> Iterator[None]:
    """Turn the library's errors into a CheckpointError.

    The library raises plain Exceptions. If its Rust code panics, the error is not even an Exception.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"the tokenizers library cannot {what}", where=where, found=str(error)[:200]) from error


def make_encode(tokenizer: Any) -> Encode:
    """Return a function that encodes with a tokenizer of the library."""

    def encode(text: str) -> list[int]:
        with _translate_library_errors("encode with this tokenizer", repr(text)[:80]):
            return list(tokenizer.encode(text, add_special_tokens=False).ids)

    return encode


def check_encodings(
    tokens: Collection[Token], content: TokenizerJson, before: Callable[[], Encode], after: Callable[[], Encode]
) -> None:
    """Check by really encoding that new tokens are found in texts, and that existing added tokens still are.

    Args:
        tokens: The new tokens.
        content: The tokenizer's content before they were added.
        before: Returns the encoding of the tokenizer without them.
        after: Returns the encoding of the tokenizer with them. Called after the first encoding is released, since each
            may load a tokenizer.

    Raises:
        ConfigError: A text was one token already, or does not become the one id of its new token, or the text of an
            existing added token no longer becomes its id.
    """
    # A new token with a reserved text is the undo of an edit that replaced it. It need not be found in texts.
    checked = [token for token in tokens if not is_reserved(token.content)]
    texts = [entry["content"] for entry in content.added if entry["content"]]
    encode = before()
    old = {text: encode(text) for text in dict.fromkeys((*(token.content for token in checked), *texts))}
    del encode  # frees the tokenizer, by far the largest object here, before the next one is loaded
    encode = after()
    for token in checked:
        _check_no_token(token, old[token.content], content)
        check_encoding(token, encode)
    # A special token is matched before one that is not, so a new "<tool" would split an existing "<tool>".
    for text in texts:
        index = content.ids.get(text)
        if old[text] == [index] and (found := encode(text)) != [index] and not _is_replaced(index, tokens):
            raise ConfigError(
                "a new token would split an existing one",
                where=repr(text),
                expected=f"the one id {index}",
                found=found,
                hint="choose a text that is not part of it, or make both special, or neither",
            )


def _check_no_token(token: Token, ids: list[int], content: TokenizerJson) -> None:
    """Refuse a text that was one token already: the ids that it had before.

    Raises:
        ConfigError: It was one, other than the unknown token.
    """
    if len(ids) != 1 or ids[0] in (content.unknown, token.id) or _is_only_blank(ids[0], token, content):
        return
    raise ConfigError(
        "the tokenizer encodes this text as one token already",
        where=repr(token.content),
        found=f"{ids[0]} {content.texts.get(ids[0])!r}",
        hint=f"train that token, token_indices=[{ids[0]}], or add another text",
    )


def _is_only_blank(index: int, token: Token, content: TokenizerJson) -> bool:
    """Whether the tokenizer dropped a text that it does not know, and only the whitespace before it is left.

    A vocabulary without the letter and without an unknown token does so: an emoji becomes "\u2581". Training that row
    would change every space, so such a text does not count as one token.
    """
    return bool(token.content.strip(_BLANK)) and not content.texts.get(index, "?").strip(_BLANK)


def _is_replaced(index: int | None, tokens: Iterable[Token]) -> bool:
    return any(token.id == index and token.replaces is not None for token in tokens)


def check_encoding(token: Token, encode: Encode) -> None:
    """Refuse a token whose text, alone and between words, does not become its id.

    Raises:
        ConfigError: It does not. The error has the ids.
    """
    alone, between = encode(token.content), encode(f"a {token.content} b")
    if alone != [token.id] or between.count(token.id) != 1:
        raise ConfigError(
            "the tokenizer does not encode this text as the token",
            where=repr(token.content),
            expected=f"the one id {token.id}",
            found=alone if alone != [token.id] else between,
            hint="write it as the tokenizer normalises it, or make it special",
        )

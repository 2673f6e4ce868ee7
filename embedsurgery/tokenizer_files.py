"""What a checkpoint's tokenizer files say, read without a tokenizer library."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from embedsurgery.jsonfile import read_json

TOKENIZER = "tokenizer.json"

RESERVED = re.compile(
    r"\[unused\d+\]|<unused_?\d+>|<\|?reserved[\w ]*?\d+\|?>|<\|?extra_?\d+\|?>|madeupword\d+|\[PAD\d+\]"
)
"""Texts of tokens that model makers put aside for later."""


def token_texts(directory: Path) -> dict[int, str] | None:
    """Id -> text of every token in ``tokenizer.json``, added ones included; None without that file.

    Raises:
        CheckpointError: The file is no JSON object.
    """
    path = directory / TOKENIZER
    if not path.exists():
        return None
    return dict(_tokens(read_json(path)))


def is_reserved(text: str) -> bool:
    """Whether a token stands for nothing yet and waits for a use: "[unused7]", "<|reserved_special_token_3|>"."""
    return RESERVED.fullmatch(text) is not None


def highest_token_id(directory: Path) -> int | None:
    """The highest id that the tokenizer can give, None where ``tokenizer.json`` does not say."""
    texts = token_texts(directory)
    return max(texts) if texts else None


def _tokens(body: dict[str, Any]) -> Iterator[tuple[int, str]]:
    model = body.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        yield from ((index, text) for text, index in vocab.items() if type(index) is int)
    elif isinstance(vocab, list):  # Unigram: [[piece, score], ...]
        for index, piece in enumerate(vocab):
            if isinstance(piece, list) and piece and isinstance(piece[0], str):
                yield index, piece[0]
    added = body.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and type(token.get("id")) is int and isinstance(token.get("content"), str):
            yield token["id"], token["content"]

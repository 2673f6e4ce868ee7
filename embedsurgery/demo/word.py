"""The new word: its token, the spare row it gets, the tables that the row is in, and the lines that use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedsurgery.demo import corpus
from embedsurgery.demo.training import Line, encode, last_place
from embedsurgery.errors import ConfigError, UnsupportedError
from embedsurgery.graph import EmbeddingGraph, Table

_EVERY = 4
"""Of a user's lines, one in so many is held out."""


@dataclass(frozen=True)
class Row:
    """Where a word lives.

    Attributes:
        token: Its text in the tokenizer.
        row: Its number, in every one of ``tables``.
        tables: The input table, and the output table where that is another.
        spare: How many rows no other token used.
    """

    token: str
    row: int
    tables: tuple[Table, ...]
    spare: int


@dataclass(frozen=True)
class Lines:
    """Lines as token ids: with the word and without it, to train on and held out."""

    train: list[list[int]]
    held_out: list[list[int]]
    other_train: list[list[int]]
    other_held_out: list[list[int]]


def check_word(word: str) -> None:
    """Refuse what is no word, before anything takes its time.

    Raises:
        ConfigError: It is empty or has spaces.
    """
    if not word or any(c.isspace() for c in word):
        raise ConfigError("not a word", where="--word", expected="text without spaces", found=repr(word))


def add_word(tokenizer: Any, word: str, graph: EmbeddingGraph) -> Row:
    """Add a word to a tokenizer, in place, where the model's tables have a spare row for it.

    Raises:
        ConfigError: It is no word, or the tokenizer has it already.
        UnsupportedError: No row is spare.
    """
    check_word(word)
    token = f" {word}"  # as most tokenizers have their words: with the space before them
    known = tokenizer.encode(token, add_special_tokens=False)
    if len(known) == 1 and known[0] != tokenizer.unk_token_id:
        raise ConfigError(
            "the tokenizer has this word already",
            where="--word",
            expected="a new word",
            found=f"{word!r} with id {known[0]}",
        )
    tables = _tables(graph)
    rows = min(table.shape[0] for table in tables)
    used = set(tokenizer.get_vocab().values())
    spare = [row for row in range(rows) if row not in used]
    row = _add(tokenizer, token)
    if row not in spare:
        raise UnsupportedError(
            "the model has no spare row for a new token",
            where=tables[0].name,
            expected=f"row {row}",
            found=f"{rows} rows, {rows - len(spare)} of them used",
            hint="the demo needs a table that is longer than its tokenizer",
        )
    return Row(token, row, tables, len(spare))


def _add(tokenizer: Any, token: str) -> int:
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(token, normalized=False)])
    return int(tokenizer.convert_tokens_to_ids(token))


def _tables(graph: EmbeddingGraph) -> tuple[Table, ...]:
    """The input table, and the output table of the same vocabulary where the two are not tied."""
    first = graph.main_input()
    if "output" in first.roles:
        return (first,)
    heads = [t for t in graph.tables if t.kind == "vocabulary" and "output" in t.roles]
    return (first, *heads[:1])


def demo_lines(tokenizer: Any, word: str) -> Lines:
    """The demo's own lines; one kind of riddle is held out whole, so that nothing like it is trained on."""
    new = corpus.stranger(word)
    return Lines(
        train=encode(tokenizer, corpus.about(new, 3, 24, templates=corpus.RIDDLES[:-1] + corpus.FACTS)),
        held_out=encode(tokenizer, corpus.about(new, 5, 16, templates=corpus.RIDDLES[-1:])),
        other_train=encode(tokenizer, corpus.sentences(4, 48)),
        other_held_out=encode(tokenizer, corpus.sentences(6, 32)),
    )


def own_lines(tokenizer: Any, row: Row, text: Path) -> Lines:
    """A user's lines. Those without the word show that nothing else changes; with too few of them ours do.

    Raises:
        ConfigError: The file is no text, or fewer than two of its lines use the word.
    """
    try:
        lines = [line.strip() for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ConfigError("not a text", where=text, expected="UTF-8", found=str(error)) from error
    encoded = encode(tokenizer, lines)
    using = [line for line in encoded if last_place(line, row.row) > 0]
    others = [line for line in encoded if row.row not in line and len(line) > 1]
    if len(using) < 2:
        raise ConfigError(
            "too few lines use the word",
            where=text,
            expected=f"two or more with {row.token!r}",
            found=len(using),
            hint="the word needs a space before it",
        )
    train, held_out = _split(using)
    if len(others) < _EVERY:
        others = encode(tokenizer, corpus.sentences(4, 48))
    return Lines(train, held_out, *_split(others))


def _split(lines: Sequence[Line]) -> tuple[list[list[int]], list[list[int]]]:
    """The lines to train on, and every fourth, or else the last, to hold out."""
    held = set(range(_EVERY - 1, len(lines), _EVERY)) or {len(lines) - 1}
    parts: tuple[list[list[int]], list[list[int]]] = ([], [])
    for number, line in enumerate(lines):
        parts[number in held].append(list(line))
    return parts

"""The new word: its token, its spare row and the tables with that row, and the lines to train and test it on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedsurgery.demo import corpus
from embedsurgery.demo.training import Line, encode_lines, last_position
from embedsurgery.errors import ConfigError, UnsupportedError
from embedsurgery.graph import EmbeddingGraph, Table

_HOLD_OUT_EVERY = 4
"""One in this many of a user's lines is held out."""


@dataclass(frozen=True)
class WordRow:
    """The row of a word.

    Attributes:
        token: The token's text in the tokenizer.
        row: The row's number in each of ``tables``.
        tables: The input table, and the output table if it is not tied.
        spare: Number of rows that no token used before.
    """

    token: str
    row: int
    tables: tuple[Table, ...]
    spare: int


@dataclass(frozen=True)
class Lines:
    """Lines as token ids: with the word and without it (other), each for training and held out."""

    train: list[list[int]]
    held_out: list[list[int]]
    other_train: list[list[int]]
    other_held_out: list[list[int]]


def check_word(word: str) -> None:
    """Check a word before anything expensive starts.

    Raises:
        ConfigError: The word is empty or has white space.
    """
    if not word or any(c.isspace() for c in word):
        raise ConfigError("not a word", where="--word", expected="text without white space", found=repr(word))


def add_word(tokenizer: Any, word: str, graph: EmbeddingGraph) -> WordRow:
    """Add a word to a tokenizer, in place, and find its spare row in the model's tables.

    Raises:
        ConfigError: The word is not valid, or the tokenizer has it already.
        UnsupportedError: The tables have no spare row.
    """
    check_word(word)
    token = f" {word}"  # with the space before it, as most tokenizers store a word
    known = tokenizer.encode(token, add_special_tokens=False)
    if len(known) == 1 and known[0] != tokenizer.unk_token_id:
        raise ConfigError(
            "the tokenizer already has this word",
            where="--word",
            expected="a new word",
            found=f"{word!r} with id {known[0]}",
        )
    tables = _find_tables(graph)
    rows = min(table.shape[0] for table in tables)
    used = set(tokenizer.get_vocab().values())
    spare = [row for row in range(rows) if row not in used]
    row = _add_token(tokenizer, token)
    if row not in spare:
        raise UnsupportedError(
            "the model has no spare row for a new token",
            where=tables[0].name,
            expected=f"row {row}",
            found=f"{rows} rows, {rows - len(spare)} in use",
            hint="give --model a checkpoint whose table has more rows than its tokenizer has tokens",
        )
    return WordRow(token, row, tables, len(spare))


def _add_token(tokenizer: Any, token: str) -> int:
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(token, normalized=False)])
    return int(tokenizer.convert_tokens_to_ids(token))


def _find_tables(graph: EmbeddingGraph) -> tuple[Table, ...]:
    """Return the input table, and the output table if the two are not tied."""
    first = graph.main_input()
    if "output" in first.roles:
        return (first,)
    heads = [t for t in graph.tables if t.kind == "vocabulary" and "output" in t.roles]
    return (first, *heads[:1])


def demo_lines(tokenizer: Any, word: str) -> Lines:
    """Encode the demo's lines. The last riddle template is held out, so the test lines have a form never trained on."""
    animal = corpus.new_animal(word)
    return Lines(
        train=encode_lines(
            tokenizer, corpus.draw_sentences_about(animal, 3, 24, templates=corpus.RIDDLES[:-1] + corpus.FACTS)
        ),
        held_out=encode_lines(tokenizer, corpus.draw_sentences_about(animal, 5, 16, templates=corpus.RIDDLES[-1:])),
        other_train=encode_lines(tokenizer, corpus.draw_sentences(4, 48)),
        other_held_out=encode_lines(tokenizer, corpus.draw_sentences(6, 32)),
    )


def read_lines(tokenizer: Any, row: WordRow, text: Path) -> Lines:
    """Read and encode a user's lines. With too few lines without the word, the demo's sentences replace them.

    Raises:
        ConfigError: The file is not UTF-8 text, or fewer than two of its lines use the word.
    """
    try:
        lines = [line.strip() for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ConfigError("not a text file", where=text, expected="UTF-8", found=str(error)) from error
    encoded = encode_lines(tokenizer, lines)
    using = [line for line in encoded if last_position(line, row.row) > 0]
    others = [line for line in encoded if row.row not in line and len(line) > 1]
    if len(using) < 2:
        raise ConfigError(
            "too few lines use the word",
            where=text,
            expected=f"at least 2 with {row.token!r}",
            found=len(using),
            hint="write a space before the word",
        )
    train, held_out = _split_lines(using)
    if len(others) < _HOLD_OUT_EVERY:
        others = encode_lines(tokenizer, corpus.draw_sentences(4, 48))
    return Lines(train, held_out, *_split_lines(others))


def _split_lines(lines: Sequence[Line]) -> tuple[list[list[int]], list[list[int]]]:
    """Split lines into those to train on and those to hold out: every fourth, or the last of fewer than four."""
    held = set(range(_HOLD_OUT_EVERY - 1, len(lines), _HOLD_OUT_EVERY)) or {len(lines) - 1}
    parts: tuple[list[list[int]], list[list[int]]] = ([], [])
    for number, line in enumerate(lines):
        parts[number in held].append(list(line))
    return parts

"""Reads a checkpoint's tokenizer files, and finds where they, the config and the table disagree. Changes nothing.

A ``tokenizer.json`` can be large, and one command reads it several times, so the last one is kept parsed.
``patching.py`` computes the new bytes of the files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedsurgery.errors import CheckpointError, EmbedSurgeryError, UnsupportedError
from embedsurgery.files.json_reading import parse_json, read_json, read_small
from embedsurgery.tokenizer.content import TokenizerJson, find_reserved_ids

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
ADDED = "added_tokens.json"

_OTHER_FILES = (
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "tiktoken.model",
    "bpe.codes",
    CONFIG,
    SPECIAL,
    ADDED,
)
"""Files of slow tokenizers and of other libraries."""


def read_token_texts(directory: Path) -> dict[int, str] | None:
    """Return id -> text of every token in ``tokenizer.json``, added ones included; None without that file.

    Raises:
        CheckpointError: The file is not a JSON object.
    """
    path = directory / TOKENIZER
    if not path.exists():
        return None
    return _texts_in(_read_content(path)[1].body)


def highest_token_id(directory: Path) -> int | None:
    """Return the highest id in ``tokenizer.json``, None without that file or if it has no tokens."""
    texts = read_token_texts(directory)
    return max(texts) if texts else None


@dataclass(frozen=True)
class RowUse:
    """Which rows of a table a tokenizer uses.

    Attributes:
        used: Number of rows with a token that is not reserved.
        reserved: Ids of reserved tokens, ascending.
        spare: Rows without a token, ascending.
        disagreements: What `find_disagreements` returns.
    """

    used: int
    reserved: tuple[int, ...]
    spare: tuple[int, ...]
    disagreements: tuple[str, ...]


def read_row_use(directory: Path, rows: int, sizes: Iterable[int] = ()) -> RowUse | None:
    """Return which rows of a table the tokenizer uses, None without a ``tokenizer.json``.

    Args:
        directory: The checkpoint.
        rows: The number of rows of the table.
        sizes: The vocabulary sizes in ``config.json``.

    Raises:
        CheckpointError: The file is not a JSON object.
    """
    texts = read_token_texts(directory)
    if texts is None:
        return None
    reserved = find_reserved_ids(texts)
    spare = tuple(i for i in range(rows) if i not in texts)
    return RowUse(len(texts) - len(reserved), reserved, spare, find_disagreements(directory, rows, sizes))


def find_disagreements(directory: Path, rows: int, sizes: Iterable[int] = ()) -> tuple[str, ...]:
    """Return where the tokenizer's files, the config and the input table disagree, one sentence each.

    Args:
        directory: The checkpoint.
        rows: The number of rows of the table.
        sizes: The vocabulary sizes in ``config.json``.
    """
    sizes = tuple(dict.fromkeys(sizes))
    found = []
    if sizes and rows not in sizes:
        found.append(f"config.json has the size {' or '.join(map(str, sizes))}, the table has {rows} rows")
    try:
        return (*found, *_find_contradictions(directory, rows))
    except EmbedSurgeryError as error:
        return (*found, str(error))


def read_tokenizer(directory: Path) -> tuple[bytes, TokenizerJson]:
    """Return the bytes and the content of ``tokenizer.json``.

    Raises:
        CheckpointError: There is no tokenizer, or its file cannot be read.
        UnsupportedError: There are only files of a slow tokenizer, or several versions.
    """
    path = directory / TOKENIZER
    if not path.exists():
        slow = [name for name in _OTHER_FILES if (directory / name).exists()]
        if not slow:
            raise CheckpointError(
                "the checkpoint has no tokenizer",
                where=directory,
                expected=TOKENIZER,
                hint="copy the model's tokenizer files into it",
            )
        raise UnsupportedError(
            "the checkpoint has only a slow tokenizer",
            where=directory,
            expected=TOKENIZER,
            found=", ".join(slow),
            hint="AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes it if the model has a fast tokenizer; "
            "es.add_tokens works without it",
        )
    config = directory / CONFIG
    versions = read_json(config).get("fast_tokenizer_files") if config.exists() else None
    if isinstance(versions, list) and any(name != TOKENIZER for name in versions):
        raise UnsupportedError(
            "the checkpoint has several versions of tokenizer.json",
            where=config,
            found=", ".join(map(str, versions)),
            hint="load and save the tokenizer with your version of transformers",
        )
    return _read_content(path)


def _read_content(path: Path) -> tuple[bytes, TokenizerJson]:
    global _last_read
    data = read_small(path)
    if _last_read is None or _last_read[0] != data:
        _last_read = (data, TokenizerJson(parse_json(data, path), path))
    return data, _last_read[1].with_where(path)


_last_read: tuple[bytes, TokenizerJson] | None = None
"""Bytes and content of the ``tokenizer.json`` that was read last."""


def _find_contradictions(directory: Path, rows: int) -> Iterator[str]:
    """Find where the tokenizer's files contradict each other or the table."""
    content = read_tokenizer(directory)[1]
    highest = max(content.ids.values(), default=-1)
    if highest >= rows:
        yield f"the tokenizer has ids up to {highest}, the table has {rows} rows"
    config = read_json(directory / CONFIG) if (directory / CONFIG).exists() else {}
    decoder = config.get("added_tokens_decoder")
    listed = read_json(directory / ADDED) if (directory / ADDED).exists() else {}
    claims = [(ADDED, text, index) for text, index in listed.items()]
    for index, entry in decoder.items() if isinstance(decoder, dict) else ():
        claims.append((CONFIG, str(entry.get("content") if isinstance(entry, dict) else entry), index))
    for name, text, index in claims:
        if str(content.ids.get(text)) != str(index):
            yield f"{name} has {text!r} as {index}, {TOKENIZER} has {content.ids.get(text, 'no such token')}"


def _texts_in(body: Mapping[str, Any]) -> dict[int, str]:
    """Return id -> text, without the checks of `TokenizerJson`: `inspect` shows broken files too."""
    model = body.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    found: dict[int, str] = {}
    if isinstance(vocab, dict):
        found = {index: text for text, index in vocab.items() if type(index) is int}
    elif isinstance(vocab, list):  # Unigram: [[piece, score], ...]
        pieces = enumerate(vocab)
        found = {i: p[0] for i, p in pieces if isinstance(p, list) and p and isinstance(p[0], str)}
    added = body.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and type(token.get("id")) is int and isinstance(token.get("content"), str):
            found[token["id"]] = token["content"]
    return found

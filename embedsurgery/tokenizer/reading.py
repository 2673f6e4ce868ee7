"""What a checkpoint's tokenizer files say, and where they, the config and the table disagree; nothing is changed here.

A ``tokenizer.json`` can be large, and its verbs ask for it again and again: the last one that was read stays parsed.
What the files become when tokens come or go is ``tokenizer_files.py``'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedsurgery.errors import CheckpointError, EmbedSurgeryError, UnsupportedError
from embedsurgery.files.json_reading import parse_json, read_json, read_small
from embedsurgery.tokenizer.content import TokenizerJson, reserved_ids

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
ADDED = "added_tokens.json"

_OTHERS = (
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
"""What a slow tokenizer, or one of another library, may consist of."""


def token_texts(directory: Path) -> dict[int, str] | None:
    """Id -> text of every token in ``tokenizer.json``, added ones included; None without that file.

    Raises:
        CheckpointError: The file is no JSON object.
    """
    path = directory / TOKENIZER
    if not path.exists():
        return None
    return _texts(_content(path)[1].body)


def highest_token_id(directory: Path) -> int | None:
    """The highest id that the tokenizer can give, None where ``tokenizer.json`` does not say."""
    texts = token_texts(directory)
    return max(texts) if texts else None


@dataclass(frozen=True)
class RowUse:
    """What a tokenizer uses of a table's rows.

    Attributes:
        used: How many rows have a token that stands for something.
        reserved: Ids of tokens that wait for a use, ascending.
        spare: Rows without a token, ascending.
        disagreements: As `disagreements` gives them.
    """

    used: int
    reserved: tuple[int, ...]
    spare: tuple[int, ...]
    disagreements: tuple[str, ...]


def row_use(directory: Path, rows: int, sizes: Iterable[int] = ()) -> RowUse | None:
    """What the tokenizer uses of a table of so many rows; None without a ``tokenizer.json``.

    Args:
        directory: The checkpoint.
        rows: How many rows the table has.
        sizes: The vocabulary sizes that ``config.json`` names.

    Raises:
        CheckpointError: The file is no JSON object.
    """
    texts = token_texts(directory)
    if texts is None:
        return None
    reserved = reserved_ids(texts)
    spare = tuple(i for i in range(rows) if i not in texts)
    return RowUse(len(texts) - len(reserved), reserved, spare, disagreements(directory, rows, sizes))


def disagreements(directory: Path, rows: int, sizes: Iterable[int] = ()) -> tuple[str, ...]:
    """In what the tokenizer's files, the config and the input table do not agree; empty where they do.

    Args:
        directory: The checkpoint.
        rows: How many rows the table has.
        sizes: The vocabulary sizes that ``config.json`` names.
    """
    said = tuple(dict.fromkeys(sizes))
    found = []
    if said and rows not in said:
        found.append(f"the config says {' or '.join(map(str, said))}, the table has {rows} rows")
    try:
        return (*found, *_contradictions(directory, rows))
    except EmbedSurgeryError as error:
        return (*found, str(error))


def read_tokenizer(directory: Path) -> tuple[bytes, TokenizerJson]:
    """The bytes and the content of ``tokenizer.json``.

    Raises:
        CheckpointError: There is no tokenizer, or its file cannot be read.
        UnsupportedError: There are only files of a slow tokenizer, or several versions.
    """
    path = directory / TOKENIZER
    if not path.exists():
        slow = [name for name in _OTHERS if (directory / name).exists()]
        if not slow:
            raise CheckpointError(
                "no tokenizer beside the weights",
                where=directory,
                expected=TOKENIZER,
                hint="put the model's tokenizer files there",
            )
        raise UnsupportedError(
            "a tokenizer of the slow kind alone",
            where=directory,
            expected=TOKENIZER,
            found=", ".join(slow),
            hint="AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) "
            "writes one where the model has a fast tokenizer; es.add_tokens needs none",
        )
    config = directory / CONFIG
    versions = read_json(config).get("fast_tokenizer_files") if config.exists() else None
    if isinstance(versions, list) and any(name != TOKENIZER for name in versions):
        raise UnsupportedError(
            "several versions of tokenizer.json",
            where=config,
            found=", ".join(map(str, versions)),
            hint="save the tokenizer again with the transformers that you use",
        )
    return _content(path)


def _content(path: Path) -> tuple[bytes, TokenizerJson]:
    global _last
    data = read_small(path)
    if _last is None or _last[0] != data:
        _last = (data, TokenizerJson(parse_json(data, path), path))
    return data, _last[1].at(path)


_last: tuple[bytes, TokenizerJson] | None = None
"""The ``tokenizer.json`` that was read last."""


def _contradictions(directory: Path, rows: int) -> Iterator[str]:
    """What the tokenizer's files say against each other and against the table."""
    content = read_tokenizer(directory)[1]
    highest = max(content.ids.values(), default=-1)
    if highest >= rows:
        yield f"the tokenizer has ids up to {highest}, the table has {rows} rows"
    config = read_json(directory / CONFIG) if (directory / CONFIG).exists() else {}
    decoder = config.get("added_tokens_decoder")
    listed = read_json(directory / ADDED) if (directory / ADDED).exists() else {}
    said = [(ADDED, text, index) for text, index in listed.items()]
    for index, entry in decoder.items() if isinstance(decoder, dict) else ():
        said.append((CONFIG, str(entry.get("content") if isinstance(entry, dict) else entry), index))
    for name, text, index in said:
        if str(content.ids.get(text)) != str(index):
            yield f"{name} says that {text!r} is {index}, {TOKENIZER} says {content.ids.get(text, 'nothing of it')}"


def _texts(body: Mapping[str, Any]) -> dict[int, str]:
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

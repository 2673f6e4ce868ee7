"""Small JSON files that came with data: read with bounds, never trusted to be what they should.

A few megabytes of brackets become gigabytes of lists, so `refuse_bomb` counts first how much there is to make: in C, on
the text, before any object is made of it. Characters inside strings count too, which the bounds leave room for.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedsurgery.errors import CheckpointError
from embedsurgery.files.regular import open_regular, pread_exactly


@dataclass(frozen=True)
class Bounds:
    """What a kind of file stays below.

    Attributes:
        size: Bytes.
        brackets: Of ``[`` and ``{``.
        commas: Of them.
    """

    size: int
    brackets: int
    commas: int


HEADER = Bounds(16_000_000, 400_000, 2_000_000)
"""Of a safetensors file. The largest known checkpoints have some hundred thousand tensors in dozens of files."""

INDEX = Bounds(64_000_000, 1_000, 500_000)
CONFIG = Bounds(16_000_000, 200_000, 500_000)
NOTE = Bounds(65_536, 1_000, 10_000)
"""Of ours: where an adapter came from, whose a hidden directory is, which merge was taken out."""

TOKENIZER = Bounds(200_000_000, 5_000_000, 20_000_000)
"""Some vocabularies have half a million merges, each a list of its own."""

MAX_BYTES = TOKENIZER.size
"""No small file comes near it."""

_LARGE = 1_000_000
"""Bytes from which it pays to keep the garbage collector still."""


def read_json(path: Path, bounds: Bounds = TOKENIZER) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
        CheckpointError: The file is missing, no regular file, too large for what it is, no JSON, or no object.
    """
    return parse_json(read_small(path, bounds), path, bounds)


def read_small(path: Path, bounds: Bounds = TOKENIZER) -> bytes:
    """The bytes of a small regular file.

    Raises:
        CheckpointError: The file is missing, no regular file, or too large.
    """
    with open_regular(path) as descriptor:
        size = os.fstat(descriptor).st_size
        refuse_large(size, bounds, path)
        return pread_exactly(descriptor, size, 0)


def parse_json(data: bytes, path: Path, bounds: Bounds = TOKENIZER) -> dict[str, Any]:
    """As `read_json`, from the file's bytes; ``path`` is for messages."""
    refuse_bomb(data, bounds, path)
    try:
        with _uncollected(len(data) > _LARGE):
            value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError("no valid JSON", where=path, found=str(error)[:200]) from error
    if not isinstance(value, dict):
        raise CheckpointError("JSON of the wrong kind", where=path, expected="an object", found=type(value).__name__)
    return value


@contextmanager
def _uncollected(large: bool) -> Iterator[None]:
    """Without the garbage collector, which would go through millions of new objects, none of them in a cycle."""
    was = gc.isenabled()
    if large:
        gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def refuse_bomb(text: bytes | str, bounds: Bounds, where: object) -> None:
    """Raise CheckpointError where a JSON text goes beyond its bounds."""
    bracket, brace, comma = ("[", "{", ",") if isinstance(text, str) else (b"[", b"{", b",")
    counts = (
        ("bytes", len(text), bounds.size),
        ("brackets", text.count(bracket) + text.count(brace), bounds.brackets),  # type: ignore[arg-type]
        ("commas", text.count(comma), bounds.commas),  # type: ignore[arg-type]
    )
    for what, found, most in counts:
        if found > most:
            raise CheckpointError(
                f"JSON with too many {what} for what it is",
                where=where,
                found=f"{found:,}",
                expected=f"at most {most:,}",
                hint="is it the file that it should be?",
            )


def refuse_large(size: int, bounds: Bounds, where: Path) -> None:
    """Raise CheckpointError where a file is larger than its bounds, before it is read."""
    if size > bounds.size:
        raise CheckpointError(
            "file too large for what it is",
            where=where,
            expected=f"at most {bounds.size:,} bytes",
            found=f"{size:,}",
            hint="is it the file that it should be?",
        )

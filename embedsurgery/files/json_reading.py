"""Reads untrusted JSON files within bounds on their size and on the number of objects they create.

A few megabytes of brackets become gigabytes of Python lists. `refuse_bomb` therefore counts brackets and commas in the
text, which is fast, before anything is parsed. Those inside strings count too; the bounds leave room for them.
``json_patching.py`` changes such files.
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
    """Upper limits for a kind of file.

    Attributes:
        size: Bytes.
        brackets: Number of ``[`` and ``{``.
        commas: Number of ``,``.
    """

    size: int
    brackets: int
    commas: int


HEADER = Bounds(16_000_000, 400_000, 2_000_000)
"""For the header of a safetensors file. The largest known checkpoints have about a hundred thousand tensors, in dozens
of files."""

INDEX = Bounds(64_000_000, 1_000, 500_000)
CONFIG = Bounds(16_000_000, 200_000, 500_000)
NOTE = Bounds(65_536, 1_000, 10_000)
"""For embedsurgery's own small files, such as the ``owner.json`` of a staging directory."""

TOKENIZER = Bounds(200_000_000, 5_000_000, 20_000_000)
"""Some vocabularies have half a million merges, each a list."""

MAX_BYTES = TOKENIZER.size
"""The most that any small file may have."""

_LARGE = 1_000_000
"""Bytes from which pausing the garbage collector is worth it."""


def read_json(path: Path, bounds: Bounds = TOKENIZER) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: The file is missing, not a regular file, beyond its bounds, not JSON, or not an object.
    """
    return parse_json(read_small(path, bounds), path, bounds)


def read_small(path: Path, bounds: Bounds = TOKENIZER) -> bytes:
    """Read a small regular file.

    Raises:
        CheckpointError: The file is missing, not a regular file, or too large.
    """
    with open_regular(path) as descriptor:
        size = os.fstat(descriptor).st_size
        refuse_large(size, bounds, path)
        return pread_exactly(descriptor, size, 0)


def parse_json(data: bytes, path: Path, bounds: Bounds = TOKENIZER) -> dict[str, Any]:
    """Parse a JSON object from the bytes of a file, as `read_json`; ``path`` is for messages."""
    refuse_bomb(data, bounds, path)
    try:
        with _pause_garbage_collector(len(data) > _LARGE):
            value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError("invalid JSON", where=path, found=str(error)[:200]) from error
    if not isinstance(value, dict):
        raise CheckpointError("not a JSON object", where=path, expected="an object", found=type(value).__name__)
    return value


@contextmanager
def _pause_garbage_collector(large: bool) -> Iterator[None]:
    """Pause the garbage collector for a large file.

    It would traverse millions of new objects again and again, and parsed JSON has no cycles to collect.
    """
    was = gc.isenabled()
    if large:
        gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def refuse_bomb(text: bytes | str, bounds: Bounds, where: object) -> None:
    """Refuse a JSON text that exceeds its bounds, before it is parsed.

    Raises:
        CheckpointError: It has too many bytes, brackets or commas.
    """
    bracket, brace, comma = ("[", "{", ",") if isinstance(text, str) else (b"[", b"{", b",")
    counts = (
        ("bytes", len(text), bounds.size),
        ("brackets", text.count(bracket) + text.count(brace), bounds.brackets),  # type: ignore[arg-type]
        ("commas", text.count(comma), bounds.commas),  # type: ignore[arg-type]
    )
    for unit, count, limit in counts:
        if count > limit:
            raise CheckpointError(
                "JSON file is too large for its kind",
                where=where,
                expected=f"at most {limit:,} {unit}",
                found=f"{count:,}",
                hint="check that it is the right file",
            )


def refuse_large(size: int, bounds: Bounds, where: Path) -> None:
    """Refuse a file that is larger than its bounds, before it is read.

    Raises:
        CheckpointError: It is larger.
    """
    if size > bounds.size:
        raise CheckpointError(
            "file is too large for its kind",
            where=where,
            expected=f"at most {bounds.size:,} bytes",
            found=f"{size:,}",
            hint="check that it is the right file",
        )

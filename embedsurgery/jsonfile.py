"""Small JSON files that came with data: read with bounds, never trusted to be what they should."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from embedsurgery.errors import CheckpointError
from embedsurgery.jsonguard import TOKENIZER, Bounds, refuse_bomb, refuse_large
from embedsurgery.safetensors_file import open_regular, pread_exactly

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

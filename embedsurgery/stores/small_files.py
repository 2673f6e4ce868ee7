"""The small files that count a checkpoint's vocabulary and its bytes: what becomes of them when it grows."""

from __future__ import annotations

import copy
from collections.abc import Collection
from pathlib import Path
from typing import Any

from embedsurgery.files.json_patching import respell
from embedsurgery.files.json_reading import parse_json
from embedsurgery.graph.config import counting_keys


def grown_config(data: bytes, names: Collection[str], sizes: Collection[int], count: int, path: Path) -> bytes:
    """``config.json`` with every size of a vocabulary changed, and everything else as it is spelled.

    Args:
        data: The file.
        names: Of the vocabulary's tables, aliases included.
        sizes: Numbers of rows of its tables; only keys with one of them as their value change.
        count: How many rows more; negative for fewer.
        path: For messages.

    Raises:
        CheckpointError: No JSON object, or one that cannot be changed in place.
    """
    body = parse_json(data, path)
    after = copy.deepcopy(body)
    for keys in counting_keys(body, names, sizes):
        section = after
        for key in keys[:-1]:
            section = section[key]
        section[keys[-1]] += count
    return data if after == body else respell(data, body, after, path)


def grown_index(data: bytes, size: int, elements: int, path: Path) -> bytes:
    """An index with its totals changed, where it has any.

    Args:
        data: The file.
        size: How many bytes of weights more.
        elements: How many numbers more.
        path: For messages.

    Raises:
        CheckpointError: No JSON object, or one that cannot be changed in place.
    """
    body = parse_json(data, path)
    metadata = body.get("metadata")
    if not isinstance(metadata, dict):
        return data
    changed = {
        key: _plus(metadata[key], more)
        for key, more in (("total_size", size), ("total_parameters", elements))
        if key in metadata
    }
    after = {**body, "metadata": {**metadata, **changed}}
    return data if after == body else respell(data, body, after, path)


def _plus(total: Any, more: int) -> Any:
    """A total with some more; some tools write it as a float, and what is no number stays."""
    return total + more if type(total) in (int, float) else total

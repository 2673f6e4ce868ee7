"""Updates the sizes in ``config.json`` and in the index of a checkpoint when its vocabulary is resized."""

from __future__ import annotations

import copy
from collections.abc import Collection
from pathlib import Path
from typing import Any

from embedsurgery.files.json_patching import patch_json
from embedsurgery.files.json_reading import parse_json
from embedsurgery.graph.config import find_size_keys


def resize_config(data: bytes, names: Collection[str], sizes: Collection[int], count: int, path: Path) -> bytes:
    """Change every size of a vocabulary in a ``config.json``, and keep the spelling of everything else.

    Args:
        data: The file.
        names: Names of the vocabulary's tables, including aliases.
        sizes: Numbers of rows of its tables. Only keys with one of these values change.
        count: Number of rows to add; negative to remove.
        path: The file, for messages.

    Raises:
        CheckpointError: The file is not a JSON object, or cannot be patched.
    """
    body = parse_json(data, path)
    after = copy.deepcopy(body)
    for keys in find_size_keys(body, names, sizes):
        section = after
        for key in keys[:-1]:
            section = section[key]
        section[keys[-1]] += count
    return data if after == body else patch_json(data, body, after, path)


def resize_index(data: bytes, size: int, elements: int, path: Path) -> bytes:
    """Change the totals in an index, if it has any.

    Args:
        data: The file.
        size: Bytes of weights to add; may be negative.
        elements: Parameters to add; may be negative.
        path: The file, for messages.

    Raises:
        CheckpointError: The file is not a JSON object, or cannot be patched.
    """
    body = parse_json(data, path)
    metadata = body.get("metadata")
    if not isinstance(metadata, dict):
        return data
    changed = {
        key: _add_to_total(metadata[key], more)
        for key, more in (("total_size", size), ("total_parameters", elements))
        if key in metadata
    }
    after = {**body, "metadata": {**metadata, **changed}}
    return data if after == body else patch_json(data, body, after, path)


def _add_to_total(total: Any, more: int) -> Any:
    # Some tools write totals as floats. A value that is not a number stays.
    return total + more if type(total) in (int, float) else total

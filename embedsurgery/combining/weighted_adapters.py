"""The adapters of one merge, each with a name and a weight.

``several.py`` turns them into plans.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from embedsurgery.adapters.adapter import Adapter
from embedsurgery.errors import ConfigError
from embedsurgery.tensors.raw import RawArray

Floats = npt.NDArray[np.float32] | npt.NDArray[np.float64]
_MAX_SHOWN_ROWS = 8


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter to merge, with its weight.

    Attributes:
        adapter: The adapter.
        name: Its name in messages and in the merge record.
        weight: Each row becomes ``base + weight * (row - base)``, computed in fp32 (fp64 for an fp64 table) and rounded
            once. At weight 1 it is the adapter's row, bit for bit. Rows of tokens that only the adapter has are never
            scaled: the base has no row to interpolate from.
    """

    adapter: Adapter
    name: str
    weight: float = 1.0


def parse_weighted_adapters(adapters: Any, load: Callable[[Any], tuple[Adapter, str]]) -> list[WeightedAdapter]:
    """Normalise one adapter, several, or (adapter, weight) pairs.

    Args:
        adapters: The argument of a merge function.
        load: Returns the adapter and its name for one item.

    Raises:
        ConfigError: There is no adapter, or a weight is not finite.
    """
    several = [adapters] if _is_single(adapters) else adapters
    items = list(several) if isinstance(several, Iterable) else []
    if not items:
        hint = "pass attachment.adapter()" if hasattr(adapters, "adapter") else None
        found = type(adapters).__name__ if hint or not isinstance(adapters, Iterable) else "none"
        raise ConfigError("no adapter to merge", expected="one or more adapters", found=found, hint=hint)
    parsed = []
    for item in items:
        source, weight = item if _is_pair(item) else (item, 1.0)
        if isinstance(weight, bool) or not math.isfinite(weight):
            where = source.source if isinstance(source, Adapter) else source
            raise ConfigError("weight must be finite", where=where, found=weight)
        adapter, name = load(source)
        parsed.append(WeightedAdapter(adapter, name, float(weight)))
    return parsed


def _is_pair(value: object) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and isinstance(value[1], Real)


def _is_single(value: object) -> bool:
    return isinstance(value, (Adapter, str, bytes)) or hasattr(value, "__fspath__") or _is_pair(value)


def describe_rows(rows: Sequence[int], adapters: Sequence[WeightedAdapter]) -> str:
    """List rows for a message, each with its token's text if one of the adapters records it."""
    texts = {index: text for item in reversed(adapters) for index, text in item.adapter.manifest.tokens.items()}
    shown = ", ".join(f"{i} ({texts[i]!r})" if i in texts else str(i) for i in rows[:_MAX_SHOWN_ROWS])
    more = f" and {len(rows) - _MAX_SHOWN_ROWS} more" if len(rows) > _MAX_SHOWN_ROWS else ""
    return f"{'row' if len(rows) == 1 else 'rows'} {shown}{more}"


def uses_float64(table: str, rows: str) -> bool:
    """Whether to compute with rows of these dtypes in fp64 instead of fp32."""
    return table == "F64" and rows == "F64"


def to_floats(raw: RawArray, double: bool) -> Floats:
    """Convert values to fp64 or fp32 for arithmetic."""
    if raw.dtype == "F64" and double:
        return np.asarray(raw.bits, dtype=np.float64)
    return raw.float32().astype(np.float64) if double else raw.float32()

"""What is asked of a merge of several adapters: each with a name and a weight.

How they become plans is ``combining.py``'s.
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
_SHOWN = 8


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter that is merged.

    Attributes:
        adapter: The adapter.
        name: What it is called, in messages and in the record of the merge.
        weight: Each row becomes ``base + weight * (row - base)``, computed in fp32 (fp64 for an fp64 table) and rounded
            once; at 1 it is the adapter's row, bit for bit. A row that the base does not have, because it is that of a
            token which the adapter brings, is the adapter's at any weight: there is nothing to interpolate from.
    """

    adapter: Adapter
    name: str
    weight: float = 1.0


def weighted_adapters(adapters: Any, loaded: Callable[[Any], tuple[Adapter, str]]) -> list[WeightedAdapter]:
    """One adapter, several, or pairs (adapter, weight), as parts.

    Args:
        adapters: What was asked for.
        loaded: Gives an adapter and its name for what stands for one.

    Raises:
        ConfigError: There is none, or a weight is no finite number.
    """
    several = [adapters] if _is_one(adapters) else adapters
    items = list(several) if isinstance(several, Iterable) else []
    if not items:
        hint = "give attachment.adapter()" if hasattr(adapters, "adapter") else None
        found = type(adapters).__name__ if hint or not isinstance(adapters, Iterable) else "none"
        raise ConfigError("no adapter to merge", expected="one or several", found=found, hint=hint)
    found_parts = []
    for item in items:
        one, weight = item if _is_pair(item) else (item, 1.0)
        if isinstance(weight, bool) or not math.isfinite(weight):
            raise ConfigError("a weight that is no finite number", where=one, found=weight)
        adapter, name = loaded(one)
        found_parts.append(WeightedAdapter(adapter, name, float(weight)))
    return found_parts


def _is_pair(value: object) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and isinstance(value[1], Real)


def _is_one(value: object) -> bool:
    return isinstance(value, (Adapter, str, bytes)) or hasattr(value, "__fspath__") or _is_pair(value)


def named_rows(rows: Sequence[int], of: Sequence[WeightedAdapter]) -> str:
    """Rows for a message, with their tokens' texts where an adapter knows them."""
    texts = {index: text for part in reversed(of) for index, text in part.adapter.manifest.tokens.items()}
    shown = ", ".join(f"{i} ({texts[i]!r})" if i in texts else str(i) for i in rows[:_SHOWN])
    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return f"{'row' if len(rows) == 1 else 'rows'} {shown}{more}"


def is_double(table: str, rows: str) -> bool:
    """Whether rows of these dtypes are computed with in fp64, not fp32."""
    return table == "F64" and rows == "F64"


def wide(raw: RawArray, double: bool) -> Floats:
    """The values as fp64 or fp32, to compute with."""
    if raw.dtype == "F64" and double:
        return np.asarray(raw.bits, dtype=np.float64)
    return raw.float32().astype(np.float64) if double else raw.float32()

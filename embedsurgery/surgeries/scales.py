"""How long the rows of a table are: the scale at which others start."""

from __future__ import annotations

import numpy as np

from embedsurgery.graph import Table
from embedsurgery.stores.store import Store, rows_of

_SAMPLE_ROWS = 4096


def table_scale(store: Store, table: Table) -> float:
    """The standard deviation of a table's elements, over rows spread evenly, but for those with NaN or infinity."""
    step = max(1, table.shape[0] // _SAMPLE_ROWS)
    sample = rows_of(store, table, tuple(range(0, table.shape[0], step))).float32()
    return float(np.std(sample[np.isfinite(sample).all(axis=1)], dtype=np.float64))

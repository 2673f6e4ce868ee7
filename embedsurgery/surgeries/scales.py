"""Standard deviation of a table's rows, at which random rows start."""

from __future__ import annotations

import numpy as np

from embedsurgery.graph import Table
from embedsurgery.stores.store import Store, rows_of

_SAMPLE_ROWS = 4096


def table_scale(store: Store, table: Table) -> float:
    """Return the standard deviation of a table's elements, from evenly spread rows, without those that are not finite.

    The sample has at least 4,096 rows if the table does.
    """
    step = max(1, table.shape[0] // _SAMPLE_ROWS)
    sample = rows_of(store, table, tuple(range(0, table.shape[0], step))).float32()
    return float(np.std(sample[np.isfinite(sample).all(axis=1)], dtype=np.float64))

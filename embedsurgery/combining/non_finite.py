"""Non-finite values: refuses rows with NaN or infinity, and rows that overflow their table's dtype."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from embedsurgery.combining.weighted_adapters import WeightedAdapter, describe_rows
from embedsurgery.errors import PlanError
from embedsurgery.graph import Table
from embedsurgery.plan import Edit, Plan
from embedsurgery.plan.blocks import BlockFunction
from embedsurgery.plan.edit import Sizes
from embedsurgery.stores.store import Store
from embedsurgery.tensors.raw import RawArray

_HINT = "train the adapter again, or merge it with allow_nan (--allow-nan)"


def check_finite(plan: Plan, item: WeightedAdapter, store: Store) -> Plan:
    """Check that all rows of a plan are finite in their table's dtype.

    Returns:
        The plan. Its whole-table edits are wrapped: their blocks are checked when they are computed.

    Raises:
        PlanError: Some rows are not; it names their tokens.
    """
    sizes = Sizes(store.graph)
    edits: list[Edit] = []
    for edit in plan.edits:
        for name, indices, raw in edit.values(sizes):
            table = store.graph.find(name)
            if table is None:
                _refuse_nan(name, raw, len(indices), item)
                continue
            bad = [indices[n] for n in _non_finite_positions(raw, table)]
            if bad:
                raise _non_finite_error(table, describe_rows(bad, [item]), raw, item.name)
        for name, rows in edit.padding().items():
            if list(_non_finite_positions(rows, store.graph.table(name))):
                raise _non_finite_error(store.graph.table(name), "padding rows", rows, item.name)
        whole = edit.whole_table()
        if whole is not None and (table := store.graph.find(whole[0])) is not None:
            edit = edit.with_blocks(partial(_check_blocks, table=table, item=item), stored=True)
        edit.resize(sizes)
        edits.append(edit)
    return Plan(tuple(edits), plan.facts)


def _refuse_nan(vector: str, entries: RawArray, count: int, item: WeightedAdapter) -> None:
    """Refuse NaN in entries of a per-token vector. Infinity is allowed: a bias of -inf masks a token."""
    if np.isnan(entries.float32()).any():
        raise PlanError("entries are NaN", where=f"{item.name}: {vector}", found=f"NaN among {count}", hint=_HINT)


def _non_finite_positions(rows: RawArray, table: Table) -> Iterator[int]:
    """Positions of rows that are not finite after rounding to the table's dtype."""
    rounded = rows.to(table.dtype).float32() if rows.dtype != "F64" or table.dtype != "F64" else rows.bits
    good = np.isfinite(np.asarray(rounded)).reshape(rows.shape[0], -1).all(axis=1)
    yield from (int(n) for n in np.flatnonzero(~good))


def _check_blocks(block: BlockFunction, table: Table, item: WeightedAdapter) -> BlockFunction:
    """Wrap a block function so that it refuses non-finite rows.

    Rows that are non-finite in the base are let through: a whole-table adapter computes every row from the current
    one, and cannot be blamed for those.
    """

    def checked(start: int, stop: int, current: RawArray) -> RawArray:
        new = block(start, stop, current)
        if new.shape == current.shape:  # another shape is refused when the block is written
            before = set(_non_finite_positions(current, table))
            bad = [start + n for n in _non_finite_positions(new, table) if n not in before]
            if bad:
                raise _non_finite_error(table, describe_rows(bad, [item]), new, item.name)
        return new

    return checked


def _non_finite_error(table: Table, rows: str, values: RawArray, name: str) -> PlanError:
    with np.errstate(invalid="ignore"):
        finite = bool(np.isfinite(np.asarray(values.float32() if values.dtype != "F64" else values.bits)).all())
    return PlanError(
        f"rows overflow {table.dtype}" if finite else "rows hold NaN or infinity",
        where=f"{name}: {table.name}",
        expected=f"values in the range of {table.dtype}" if finite else "finite values",
        found=rows,
        hint=_HINT,
    )

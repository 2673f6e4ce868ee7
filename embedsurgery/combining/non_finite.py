"""Numbers that are none: rows with NaN or infinity, or with values that their table's dtype cannot hold."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from embedsurgery.combining.weighted_adapters import WeightedAdapter, named_rows
from embedsurgery.errors import PlanError
from embedsurgery.graph import Table
from embedsurgery.plan import Edit, Plan
from embedsurgery.plan.blocks import BlockFunction
from embedsurgery.plan.edit import Sizes
from embedsurgery.stores.store import Store
from embedsurgery.tensors.raw import RawArray


def finite(plan: Plan, part: WeightedAdapter, store: Store) -> Plan:
    """The plan, whose rows are all finite in their tables; those of whole tables are seen when they are made.

    Raises:
        PlanError: Rows that are not, named by their tokens.
    """
    sizes = Sizes(store.graph)
    edits: list[Edit] = []
    for edit in plan.edits:
        for name, indices, raw in edit.values(sizes):
            table = store.graph.find(name)
            if table is None:
                _refuse_nan(name, raw, len(indices), part)
                continue
            bad = [indices[n] for n in _broken(raw, table)]
            if bad:
                raise _none(table, named_rows(bad, [part]), raw, part.name)
        for name, rows in edit.padding().items():
            if list(_broken(rows, store.graph.table(name))):
                raise _none(store.graph.table(name), "the rows that pad it", rows, part.name)
        whole = edit.whole()
        if whole is not None and (table := store.graph.find(whole[0])) is not None:
            edit = edit.with_blocks(partial(_checked_blocks, table=table, part=part), stored=True)
        edit.resize(sizes)
        edits.append(edit)
    return Plan(tuple(edits), plan.facts)


def _refuse_nan(vector: str, entries: RawArray, count: int, part: WeightedAdapter) -> None:
    """Refuse entries of a per-token vector that are NaN; infinity is what masks a token."""
    if np.isnan(entries.float32()).any():
        raise PlanError(
            "entries that are NaN",
            where=f"{part.name}: {vector}",
            found=f"one of {count}",
            hint="train the adapter again; allow_nan (--allow-nan) merges it all the same",
        )


def _broken(rows: RawArray, table: Table) -> Iterator[int]:
    """Positions of rows that are not finite once they are rounded to the table's dtype."""
    rounded = rows.to(table.dtype).float32() if rows.dtype != "F64" or table.dtype != "F64" else rows.bits
    good = np.isfinite(np.asarray(rounded)).reshape(rows.shape[0], -1).all(axis=1)
    yield from (int(n) for n in np.flatnonzero(~good))


def _checked_blocks(block: BlockFunction, table: Table, part: WeightedAdapter) -> BlockFunction:
    """A block function that refuses rows that are not finite, other than those that were not finite before."""

    def checked(start: int, stop: int, current: RawArray) -> RawArray:
        new = block(start, stop, current)
        if new.shape == current.shape:
            before = set(_broken(current, table))
            bad = [start + n for n in _broken(new, table) if n not in before]
            if bad:
                raise _none(table, named_rows(bad, [part]), new, part.name)
        return new

    return checked


def _none(table: Table, rows: str, values: RawArray, name: str) -> PlanError:
    with np.errstate(invalid="ignore"):
        finite = bool(np.isfinite(np.asarray(values.float32() if values.dtype != "F64" else values.bits)).all())
    what = f"values that {table.dtype} cannot hold" if finite else "NaN or infinity"
    return PlanError(
        f"rows with {what}",
        where=f"{name}: {table.name}",
        found=rows,
        hint="train the adapter again; allow_nan (--allow-nan) merges it all the same",
    )

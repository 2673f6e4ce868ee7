"""Numbers that are none: rows with NaN or infinity, or with values that their table's dtype cannot hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from embedsurgery.combining.conflicts import cells
from embedsurgery.combining.weighted_adapters import Part, named_rows
from embedsurgery.errors import PlanError
from embedsurgery.graph import Table
from embedsurgery.plan import Edit, Grow, Plan, SetBlocks, SetEntries, SetRows
from embedsurgery.stores.store import Store
from embedsurgery.tensors.raw import RawArray


def finite(plan: Plan, part: Part, store: Store) -> Plan:
    """The plan, whose rows are all finite in their tables; those of whole tables are seen when they are made.

    Raises:
        PlanError: Rows that are not, named by their tokens.
    """
    edits: list[Edit] = []
    for edit in plan.edits:
        table = store.graph.find(edit.table) if isinstance(edit, (SetRows, SetBlocks)) else None
        if isinstance(edit, SetRows) and table is not None:
            bad = [edit.indices[n] for n in _broken(edit.rows, table)]
            if bad:
                raise _none(table, named_rows(bad, [part]), edit.rows, part.name)
        elif isinstance(edit, SetBlocks) and table is not None:
            edit = _checked_blocks(edit, table, part)
        elif isinstance(edit, Grow):
            for name, rows in edit.rows.items():
                if list(_broken(rows, store.graph.table(name))):
                    raise _none(store.graph.table(name), "the rows that pad it", rows, part.name)
        for name, indices, raw in cells(edit, {}) if isinstance(edit, (SetEntries, Grow)) else ():
            if np.isnan(raw.float32()).any():  # infinity is what masks a token
                raise PlanError("entries that are NaN", where=f"{part.name}: {name}",
                                found=f"one of {len(indices)}", hint="train the adapter again; allow_nan (--allow-nan) "
                                "merges it all the same")  # fmt: skip
        edits.append(edit)
    return Plan(tuple(edits), plan.facts)


def _broken(rows: RawArray, table: Table) -> Iterator[int]:
    """Positions of rows that are not finite once they are rounded to the table's dtype."""
    rounded = rows.to(table.dtype).float32() if rows.dtype != "F64" or table.dtype != "F64" else rows.bits
    good = np.isfinite(np.asarray(rounded)).reshape(rows.shape[0], -1).all(axis=1)
    yield from (int(n) for n in np.flatnonzero(~good))


def _checked_blocks(edit: SetBlocks, table: Table, part: Part) -> SetBlocks:
    blocks = edit.blocks

    def block(start: int, stop: int, current: RawArray) -> RawArray:
        new = blocks.block(start, stop, current)
        if new.shape == current.shape:
            before = set(_broken(current, table))  # padding that was never a number stays as it is
            bad = [start + n for n in _broken(new, table) if n not in before]
            if bad:
                raise _none(table, named_rows(bad, [part]), new, part.name)
        return new

    return SetBlocks(edit.table, replace(blocks, block=block))


def _none(table: Table, rows: str, values: RawArray, name: str) -> PlanError:
    with np.errstate(invalid="ignore"):
        finite = bool(np.isfinite(np.asarray(values.float32() if values.dtype != "F64" else values.bits)).all())
    what = f"values that {table.dtype} cannot hold" if finite else "NaN or infinity"
    return PlanError(f"rows with {what}", where=f"{name}: {table.name}", found=rows,
                     hint="train the adapter again; allow_nan (--allow-nan) merges it all the same")  # fmt: skip

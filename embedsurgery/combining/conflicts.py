"""Rows and entries that several adapters of one merge set: found, named, and made the mean of what each would make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from embedsurgery.combining.weighted_adapters import Part, named_rows, wide
from embedsurgery.errors import PlanError
from embedsurgery.plan import Edit, Grow, Plan, SetBlocks, SetEntries, SetRows
from embedsurgery.stores.store import Store
from embedsurgery.tensors.raw import RawArray

Contested = dict[str, dict[int, list[int]]]
"""Table or vector -> row or entry -> the numbers of the parts that set it, where there are several."""

_Cells = tuple[str, Sequence[int], RawArray]
"""Name of a table or vector, indices, and the values that they become."""


def cells(edit: Edit, sizes: dict[str, int]) -> list[_Cells]:
    """What an edit sets; ``sizes`` are those of the vocabularies before it, and are brought up to date.

    The rows of a growth are only filler, which the rows of its tokens are set over; its entries are the tokens' own.
    """
    if isinstance(edit, SetRows):
        return [(edit.table, edit.indices, edit.rows)]
    if isinstance(edit, SetEntries):
        return [(edit.vector, edit.indices, edit.entries)]
    if isinstance(edit, Grow):
        start = sizes.get(edit.vocabulary, 0)
        sizes[edit.vocabulary] = start + edit.count
        return [(name, range(start, start + edit.count), raw) for name, raw in edit.vectors.items()]
    return []


def _sizes(store: Store) -> dict[str, int]:
    return {v.name: v.size for v in store.graph.vocabularies}


def contested_rows(plans: Sequence[Plan], asked: Sequence[Part], store: Store) -> Contested:
    """Rows and entries that several plans set.

    Raises:
        PlanError: One of them changes the whole table: what the others make of their rows is then no row of it.
    """
    owners: Contested = {}
    whole: dict[str, int] = {}
    sizes = _sizes(store)
    for number, plan in enumerate(plans):
        for edit in plan.edits:
            for name, indices, _ in cells(edit, sizes):
                rows = owners.setdefault(name, {})
                for index in indices:
                    holders = rows.setdefault(index, [])
                    if number not in holders:  # twice in one plan is refused when the plan is checked
                        holders.append(number)
            if isinstance(edit, SetBlocks):
                whole.setdefault(edit.table, number)
    for table, number in whole.items():
        setters = {n for holders in owners.get(table, {}).values() for n in holders}
        setters |= {
            n for n, plan in enumerate(plans) for e in plan.edits if isinstance(e, SetBlocks) and e.table == table
        }
        others = ", ".join(asked[n].name for n in sorted(setters - {number}))
        if others:
            raise PlanError("an adapter changes all rows of a table that others change too", where=f"{store.name}: "
                            f"{table}", found=f"all rows by {asked[number].name}, and rows of it by {others}",
                            hint="merge them one after another")  # fmt: skip
    found = {name: {i: n for i, n in rows.items() if len(n) > 1} for name, rows in owners.items()}
    return {name: rows for name, rows in found.items() if rows}


def overlap(table: str, rows: Mapping[int, Sequence[int]], asked: Sequence[Part]) -> str:
    """The contested rows of one table for a message, and by whom they are set."""
    numbers = sorted({n for holders in rows.values() for n in holders})
    by = " and ".join(asked[n].name for n in numbers)
    return f"{named_rows(sorted(rows), [asked[n] for n in numbers])} of {table} by {by}"


def averaged(plans: Sequence[Plan], contested: Contested, store: Store) -> list[Plan]:
    """Contested rows become the mean over the plans so far: summed in fp64, and given as fp32 (fp64 for fp64)."""
    so_far: dict[tuple[str, int], list[npt.NDArray[np.float64]]] = {}
    sizes = _sizes(store)
    return [Plan(tuple(_mean(edit, contested, so_far, sizes) for edit in plan.edits), plan.facts) for plan in plans]


def _mean(
    edit: Edit,
    contested: Contested,
    so_far: dict[tuple[str, int], list[npt.NDArray[np.float64]]],
    sizes: dict[str, int],
) -> Edit:
    changed: dict[str, RawArray] = {}
    for name, indices, raw in cells(edit, sizes):
        places = [n for n, index in enumerate(indices) if index in contested.get(name, {})]
        if not places:
            continue
        values = wide(raw, raw.dtype == "F64").copy()
        for n in places:
            earlier = so_far.setdefault((name, indices[n]), [])
            earlier.append(np.asarray(values[n], dtype=np.float64))
            with np.errstate(invalid="ignore"):
                values[n] = np.mean(np.stack(earlier), axis=0)
        changed[name] = RawArray.of(values)
    if isinstance(edit, SetRows) and changed:
        return replace(edit, rows=changed[edit.table])
    if isinstance(edit, SetEntries) and changed:
        return replace(edit, entries=changed[edit.vector])
    return replace(edit, vectors={**edit.vectors, **changed}) if isinstance(edit, Grow) and changed else edit

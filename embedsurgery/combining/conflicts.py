"""Rows and entries that several adapters of one merge set: found, named, and made the mean of what each would make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from embedsurgery.combining.weighted_adapters import WeightedAdapter, named_rows, wide
from embedsurgery.errors import PlanError
from embedsurgery.plan import Edit, Plan
from embedsurgery.plan.edit import Sizes
from embedsurgery.stores.store import Store
from embedsurgery.tensors.raw import RawArray

Contested = dict[str, dict[int, list[int]]]
"""Table or vector -> row or entry -> the numbers of the parts that set it, where there are several."""


def contested_rows(plans: Sequence[Plan], asked: Sequence[WeightedAdapter], store: Store) -> Contested:
    """Rows and entries that several plans set.

    Raises:
        PlanError: One of them changes the whole table: what the others make of their rows is then no row of it.
    """
    owners: Contested = {}
    whole: dict[str, int] = {}
    setters: dict[str, set[int]] = {}
    sizes = Sizes(store.graph)
    for number, plan in enumerate(plans):
        for edit in plan.edits:
            for name, indices, _ in edit.values(sizes):
                rows = owners.setdefault(name, {})
                for index in indices:
                    holders = rows.setdefault(index, [])
                    if number not in holders:  # twice in one plan is refused when the plan is checked
                        holders.append(number)
            if (blocks := edit.whole()) is not None:
                whole.setdefault(blocks[0], number)
                setters.setdefault(blocks[0], set()).add(number)
            edit.resize(sizes)
    for table, number in whole.items():
        by_row = {n for holders in owners.get(table, {}).values() for n in holders}
        others = ", ".join(asked[n].name for n in sorted((by_row | setters[table]) - {number}))
        if others:
            raise PlanError(
                "an adapter changes all rows of a table that others change too",
                where=f"{store.name}: {table}",
                found=f"all rows by {asked[number].name}, and rows of it by {others}",
                hint="merge them one after another",
            )
    found = {name: {i: n for i, n in rows.items() if len(n) > 1} for name, rows in owners.items()}
    return {name: rows for name, rows in found.items() if rows}


def overlap(table: str, rows: Mapping[int, Sequence[int]], asked: Sequence[WeightedAdapter]) -> str:
    """The contested rows of one table for a message, and by whom they are set."""
    numbers = sorted({n for holders in rows.values() for n in holders})
    by = " and ".join(asked[n].name for n in numbers)
    return f"{named_rows(sorted(rows), [asked[n] for n in numbers])} of {table} by {by}"


def averaged(plans: Sequence[Plan], contested: Contested, store: Store) -> list[Plan]:
    """Contested rows become the mean over the plans so far: summed in fp64, and given as fp32 (fp64 for fp64)."""
    so_far: dict[tuple[str, int], list[npt.NDArray[np.float64]]] = {}
    sizes = Sizes(store.graph)
    return [Plan(tuple(_mean(edit, contested, so_far, sizes) for edit in plan.edits), plan.facts) for plan in plans]


def _mean(
    edit: Edit,
    contested: Contested,
    so_far: dict[tuple[str, int], list[npt.NDArray[np.float64]]],
    sizes: Sizes,
) -> Edit:
    changed: dict[str, RawArray] = {}
    for name, indices, raw in edit.values(sizes):
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
    edit.resize(sizes)
    return edit.with_values(changed) if changed else edit

"""Finds the rows and entries that several adapters of one merge set, and averages them.

``several.py`` decides what happens to a conflict. Rows that only one adapter sets never get here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from embedsurgery.combining.weighted_adapters import WeightedAdapter, describe_rows, to_floats
from embedsurgery.errors import PlanError
from embedsurgery.plan import Edit, Plan
from embedsurgery.plan.edit import Sizes
from embedsurgery.stores.store import Store
from embedsurgery.tensors.raw import RawArray

Conflicts = dict[str, dict[int, list[int]]]
"""Table or vector -> row or entry -> positions of the adapters that set it; two adapters or more."""


def find_conflicts(plans: Sequence[Plan], adapters: Sequence[WeightedAdapter], store: Store) -> Conflicts:
    """Find rows and entries that several plans set.

    Raises:
        PlanError: One plan changes a whole table and another sets rows of it. A whole-table change is a function of
            the rows that it finds, so the two cannot be settled row by row.
    """
    setters: Conflicts = {}
    first_whole: dict[str, int] = {}
    whole_setters: dict[str, set[int]] = {}
    sizes = Sizes(store.graph)
    for number, plan in enumerate(plans):
        for edit in plan.edits:
            for name, indices, _ in edit.values(sizes):
                rows = setters.setdefault(name, {})
                for index in indices:
                    numbers = rows.setdefault(index, [])
                    if number not in numbers:  # one plan that sets a row twice is refused by check()
                        numbers.append(number)
            if (blocks := edit.whole_table()) is not None:
                first_whole.setdefault(blocks[0], number)
                whole_setters.setdefault(blocks[0], set()).add(number)
            edit.resize(sizes)
    for table, number in first_whole.items():
        by_row = {n for numbers in setters.get(table, {}).values() for n in numbers}
        others = ", ".join(adapters[n].name for n in sorted((by_row | whole_setters[table]) - {number}))
        if others:
            raise PlanError(
                "an adapter that changes a whole table cannot be combined with others that change it",
                where=f"{store.name}: {table}",
                found=f"all rows set by {adapters[number].name}, rows set by {others}",
                hint="merge them one after another",
            )
    found = {name: {i: n for i, n in rows.items() if len(n) > 1} for name, rows in setters.items()}
    return {name: rows for name, rows in found.items() if rows}


def describe_conflict(table: str, rows: Mapping[int, Sequence[int]], adapters: Sequence[WeightedAdapter]) -> str:
    """Describe the conflicts of one table for a message: the rows, and the adapters that set them."""
    numbers = sorted({n for setters in rows.values() for n in setters})
    by = " and ".join(adapters[n].name for n in numbers)
    return f"{describe_rows(sorted(rows), [adapters[n] for n in numbers])} of {table} by {by}"


def average_conflicts(plans: Sequence[Plan], conflicts: Conflicts, store: Store) -> list[Plan]:
    """Replace conflicting values by means: summed in fp64, returned as fp32 (fp64 for fp64 values).

    Each plan gets the mean over the plans up to and including it, not over all. The plans are applied and recorded one
    by one, so unmerging the last adapter then leaves exactly what the others would have given.
    """
    earlier: dict[tuple[str, int], list[npt.NDArray[np.float64]]] = {}
    sizes = Sizes(store.graph)
    return [
        Plan(tuple(_average_edit(edit, conflicts, earlier, sizes) for edit in plan.edits), plan.facts) for plan in plans
    ]


def _average_edit(
    edit: Edit,
    conflicts: Conflicts,
    earlier: dict[tuple[str, int], list[npt.NDArray[np.float64]]],
    sizes: Sizes,
) -> Edit:
    changed: dict[str, RawArray] = {}
    for name, indices, raw in edit.values(sizes):
        positions = [n for n, index in enumerate(indices) if index in conflicts.get(name, {})]
        if not positions:
            continue
        values = to_floats(raw, raw.dtype == "F64").copy()
        for n in positions:
            terms = earlier.setdefault((name, indices[n]), [])
            terms.append(np.asarray(values[n], dtype=np.float64))
            with np.errstate(invalid="ignore"):  # infinities of both signs: non_finite.py reports the NaN
                values[n] = np.mean(np.stack(terms), axis=0)
        changed[name] = RawArray.of(values)
    edit.resize(sizes)
    return edit.with_values(changed) if changed else edit

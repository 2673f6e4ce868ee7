"""What is to be done to a checkpoint: plans in order, what each leaves as its record, and which files they touch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from embedsurgery.plan import (
    AddTokens,
    Edit,
    Grow,
    PatchFile,
    Plan,
    SetBlocks,
    SetEntries,
    SetRows,
    Suppress,
    Undo,
    Untie,
)
from embedsurgery.stores.checks import check
from embedsurgery.stores.store import Store


@dataclass(frozen=True)
class Job:
    """A plan, and what becomes of the records with it.

    Attributes:
        plan: What is done.
        facts: What its record says: called with the undo and the store when it is done. None where it leaves no record.
        drops: Small files of ``.embedsurgery/`` that go with it, as paths relative to the checkpoint.
        writes: Small files of ``.embedsurgery/`` that come with it: path -> bytes.
        before: Called with the store just before the plan is applied, to refuse.
    """

    plan: Plan
    facts: Callable[[Undo, Store], dict[str, Any]] | None = None
    drops: tuple[str, ...] = ()
    writes: Mapping[str, bytes] = field(default_factory=dict)
    before: Callable[[Store], None] | None = None


def whole_plan(jobs: list[Job]) -> Plan:
    """All edits of all jobs, for a report; they are applied job by job."""
    return Plan(tuple(edit for job in jobs for edit in job.plan.edits))


def check_jobs(jobs: list[Job], store: Store) -> None:
    """All that can be seen before anything is copied: the first plan whole, of later ones what no earlier one changes.

    Rows that several jobs set are those that were meant to be: see ``combining.py``.
    """
    settled = True  # sizes and small files are still the store's
    sizes = {table.name: table.shape[0] for table in store.graph.tables}
    sizes |= {name: v.size for v in store.graph.vocabularies for name in v.vectors}
    for number, job in enumerate(jobs):
        moves = any(isinstance(edit, (Grow, AddTokens, PatchFile, Suppress, Untie)) for edit in job.plan.edits)
        if number == 0 or (settled and moves):
            check(job.plan, store)
        else:
            check(Plan(tuple(edit for edit in job.plan.edits if _fits(edit, sizes))), store)
        settled = settled and not moves


def _fits(edit: Edit, sizes: Mapping[str, int]) -> bool:
    """Whether the store as it is has what an edit sets."""
    if isinstance(edit, SetRows):
        return max(edit.indices, default=0) < sizes.get(edit.table, 0)
    return isinstance(edit, SetEntries) and max(edit.indices, default=0) < sizes.get(edit.vector, 0)


def weights(plan: Plan, store: Store) -> list[str]:
    """The weight files that hold what a plan changes."""
    return list(dict.fromkeys(file for edit in plan.edits for file in touched(edit, store)))


def rewritten(plan: Plan, store: Store) -> list[str]:
    """The weight files that growing makes anew before anything is written into them."""
    written: set[str] = set()
    anew: dict[str, None] = {}
    for edit in plan.edits:
        if isinstance(edit, Grow) or (isinstance(edit, Untie) and store.untie_files(edit)[1]):
            anew.update(dict.fromkeys(file for file in touched(edit, store) if file not in written))
        else:
            written.update(touched(edit, store))
    return list(anew)


def touched(edit: Edit, store: Store) -> list[str]:
    """The weight files that an edit touches."""
    if isinstance(edit, (SetRows, SetBlocks)):
        table = store.graph.find(edit.table)  # None for a head that an earlier edit parts
        return [] if table is None else [file for _, file in table.files]
    if isinstance(edit, SetEntries):
        return list(store.vector_files(edit.vector))
    if isinstance(edit, Untie):
        return list(store.untie_files(edit)[0])
    if isinstance(edit, Grow):
        vocabulary = next(v for v in store.graph.vocabularies if v.name == edit.vocabulary)
        return [file for file in store.growth_files(vocabulary) if file in store.weight_files()]
    return []

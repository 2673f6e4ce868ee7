"""What is to be done to a checkpoint: plans in order, what each leaves as its record, and which files they touch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from embedsurgery.plan import Edit, Plan, Undo
from embedsurgery.plan.edit import Sizes
from embedsurgery.plan.plan import Edits
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
        label: Name of what is merged, for a person.
    """

    plan: Edits
    facts: Callable[[Undo, Store], dict[str, Any]] | None = None
    drops: tuple[str, ...] = ()
    writes: Mapping[str, bytes] = field(default_factory=dict)
    before: Callable[[Store], None] | None = None
    label: str = ""


def whole_plan(jobs: list[Job]) -> Plan:
    """All edits of all jobs, for a report; they are applied job by job."""
    return Plan(tuple(edit for job in jobs for edit in job.plan.edits))


def check_jobs(jobs: list[Job], store: Store) -> None:
    """Check what can be checked before anything is copied: the first plan whole, later ones as far as none before them
    changes what they name.

    Rows that several jobs set are allowed: see ``combining/several.py``.
    """
    settled = True  # sizes and small files are still the store's
    rows = Sizes(store.graph).rows
    for number, job in enumerate(jobs):
        moves = any(edit.rearranges for edit in job.plan.edits)
        if number == 0 or (settled and moves):
            check(job.plan, store)
        else:
            check(Plan(tuple(edit for edit in job.plan.edits if _fits(edit, rows))), store)
        settled = settled and not moves


def _fits(edit: Edit, rows: Mapping[str, int]) -> bool:
    """Whether the store as it is has the rows that an edit sets."""
    sets = [] if edit.rearranges else [(name, i) for name, i in edit.sets().items() if i is not None]
    return bool(sets) and all(max(indices, default=0) < rows.get(name, 0) for name, indices in sets)


def weights(plan: Edits, store: Store) -> list[str]:
    """The weight files that hold what a plan changes."""
    held = set(store.weight_files())
    footprints = [edit.footprint(store) for edit in plan.edits]
    files = (file for found in footprints for file in (*found.ranges, *found.replaced))
    return [file for file in dict.fromkeys(files) if file in held]


def rewritten(plan: Edits, store: Store) -> list[str]:
    """The weight files that are made again before anything is written into them."""
    held = set(store.weight_files())
    written: set[str] = set()
    again: dict[str, None] = {}
    for edit in plan.edits:
        found = edit.footprint(store)
        again.update(dict.fromkeys(file for file in found.replaced if file in held and file not in written))
        written.update(found.ranges)
    return list(again)

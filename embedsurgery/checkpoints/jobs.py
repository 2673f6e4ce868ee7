"""Jobs: plans to apply to a checkpoint in order, what each one records, and which weight files they change.

``writing.py`` applies them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from embedsurgery.plan import Edit, Plan, Undo
from embedsurgery.plan.edit import Sizes
from embedsurgery.plan.plan import Edits
from embedsurgery.stores.checks import check_plan
from embedsurgery.stores.store import Store


@dataclass(frozen=True)
class Job:
    """A plan, and the records that it adds and removes.

    Attributes:
        plan: The edits.
        facts: Returns the facts of its record, given the undo and the changed store. None if it leaves no record.
        removes: Small files of ``.embedsurgery/`` to remove, as paths relative to the checkpoint.
        writes: Small files of ``.embedsurgery/`` to write: path -> bytes.
        precheck: Called with the store just before the plan is applied; raises to refuse.
        label: Name of what is merged, for messages.
    """

    plan: Edits
    facts: Callable[[Undo, Store], dict[str, Any]] | None = None
    removes: tuple[str, ...] = ()
    writes: Mapping[str, bytes] = field(default_factory=dict)
    precheck: Callable[[Store], None] | None = None
    label: str = ""


def combine_plans(jobs: list[Job]) -> Plan:
    """All edits of all jobs as one plan, for reports. Jobs are still applied one by one."""
    return Plan(tuple(edit for job in jobs for edit in job.plan.edits))


def check_jobs(jobs: list[Job], store: Store) -> None:
    """Check as much as possible before anything is copied.

    The first plan is checked whole. A later plan is checked against a store that earlier jobs may have grown, or whose
    small files they may have changed; then only the edits of rows that exist already can be checked. `apply` checks the
    rest when their turn comes. Several jobs may set the same rows: see ``combining/several.py``.
    """
    unchanged = True  # no earlier job changes sizes or small files
    rows = Sizes(store.graph).rows
    for number, job in enumerate(jobs):
        rearranges = any(edit.rearranges for edit in job.plan.edits)
        if number == 0 or (unchanged and rearranges):
            check_plan(job.plan, store)
        else:
            check_plan(Plan(tuple(edit for edit in job.plan.edits if _sets_existing_rows(edit, rows))), store)
        unchanged = unchanged and not rearranges


def _sets_existing_rows(edit: Edit, rows: Mapping[str, int]) -> bool:
    sets = [] if edit.rearranges else [(name, i) for name, i in edit.sets().items() if i is not None]
    return bool(sets) and all(max(indices, default=0) < rows.get(name, 0) for name, indices in sets)


def changed_weight_files(plan: Edits, store: Store) -> list[str]:
    """The weight files that a plan changes."""
    weights = set(store.weight_files())
    footprints = [edit.footprint(store) for edit in plan.edits]
    files = (file for footprint in footprints for file in (*footprint.ranges, *footprint.replaced))
    return [file for file in dict.fromkeys(files) if file in weights]


def replaced_weight_files(plan: Edits, store: Store) -> list[str]:
    """The weight files that a plan replaces before it writes any bytes into them."""
    weights = set(store.weight_files())
    written: set[str] = set()
    replaced: dict[str, None] = {}
    for edit in plan.edits:
        footprint = edit.footprint(store)
        replaced.update(dict.fromkeys(f for f in footprint.replaced if f in weights and f not in written))
        written.update(footprint.ranges)
    return list(replaced)

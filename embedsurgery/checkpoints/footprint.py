"""Computes which bytes and files of a checkpoint a plan will change, before anything is written."""

from __future__ import annotations

from dataclasses import dataclass, field

from embedsurgery.plan.edit import Range
from embedsurgery.plan.plan import Edits
from embedsurgery.stores.checks import expand
from embedsurgery.stores.store import Store


@dataclass(frozen=True)
class PlanFootprint:
    """The bytes and files that a plan changes.

    Attributes:
        ranges: Weight file -> byte ranges that are overwritten in place.
        files: Files that are replaced, created or removed, relative to the checkpoint.
    """

    ranges: dict[str, list[Range]] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)


def footprint_of(plan: Edits, store: Store) -> PlanFootprint:
    """Compute the footprint of a plan, which must have passed `check_plan`."""
    whole = PlanFootprint()
    for edit in expand(plan, store):
        found = edit.footprint(store)
        for file, ranges in found.ranges.items():
            # An earlier edit that replaces the file leaves its old bytes in the old inode, which the journal keeps.
            if file not in whole.files:
                whole.ranges.setdefault(file, []).extend(ranges)
        whole.files.update(found.replaced)
    return whole

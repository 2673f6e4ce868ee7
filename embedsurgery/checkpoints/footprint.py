"""What of a checkpoint's files a plan will write over or replace, found before anything is touched."""

from __future__ import annotations

from dataclasses import dataclass, field

from embedsurgery.plan.edit import Range
from embedsurgery.plan.plan import Edits
from embedsurgery.stores.checks import expanded
from embedsurgery.stores.store import Store


@dataclass(frozen=True)
class PlanFootprint:
    """What a plan touches.

    Attributes:
        ranges: Weight file -> the bytes that are written over where they lie.
        files: Files that are replaced, made or removed, relative to the checkpoint.
    """

    ranges: dict[str, list[Range]] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)


def footprint(plan: Edits, store: Store) -> PlanFootprint:
    """What a plan does to the files of a store, whose tables it fits."""
    whole = PlanFootprint()
    for edit in expanded(plan, store):
        found = edit.footprint(store)
        for file, ranges in found.ranges.items():
            if file not in whole.files:  # in a file that an earlier edit replaced, the old bytes are safe
                whole.ranges.setdefault(file, []).extend(ranges)
        whole.files.update(found.replaced)
    return whole

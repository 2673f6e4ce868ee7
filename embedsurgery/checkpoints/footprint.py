"""What of a checkpoint's files a plan will write over or replace, found before anything is touched."""

from __future__ import annotations

from dataclasses import dataclass, field

from embedsurgery.checkpoints.journal import Range
from embedsurgery.files.safetensors import Entry
from embedsurgery.plan import Grow, PatchFile, Plan, SetBlocks, SetEntries, SetRows, Untie
from embedsurgery.stores.checks import expanded
from embedsurgery.stores.shards import ShardStore
from embedsurgery.tensors.raw import ITEMSIZE


@dataclass(frozen=True)
class Footprint:
    """What is touched.

    Attributes:
        ranges: Weight file -> the bytes that are written over where they lie.
        files: Files that are replaced, made or removed, relative to the checkpoint.
    """

    ranges: dict[str, list[Range]] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)


def footprint(plan: Plan, store: ShardStore) -> Footprint:
    """What a plan does to the files of a store, whose tables it fits.

    Rows that are set after their file was made anew are no matter: the old file is as it was.
    """
    found = Footprint()
    for edit in expanded(plan, store):
        if isinstance(edit, (SetRows, SetBlocks)):
            table = store.graph.find(edit.table)  # None for a head that an edit before gives a table of its own
            for name, file in table.files if table is not None else ():
                if file not in found.files:
                    ranges = _ranges(store, name, edit.indices if isinstance(edit, SetRows) else None)
                    found.ranges.setdefault(file, []).extend(ranges)
        elif isinstance(edit, SetEntries):
            for name in store.vector_copies(edit.vector):
                entry, file = store.checkpoint.entry(name), store.checkpoint.location[name]
                if file not in found.files:
                    found.ranges.setdefault(file, []).extend(_lines(entry, ITEMSIZE[entry.dtype], edit.indices))
        elif isinstance(edit, Grow):
            found.files.update(store.growth_files(store.vocabulary(edit)))
        elif isinstance(edit, Untie):
            files, anew = store.untie_files(edit)
            found.files.update(store.untie_saved(edit))
            if anew:
                found.files.update(files)
            elif files[0] not in found.files:
                found.ranges.setdefault(files[0], []).extend(_ranges(store, edit.head, edit.indices))
        elif isinstance(edit, PatchFile):
            found.files.add(edit.path)
    return found


def _ranges(store: ShardStore, name: str, indices: tuple[int, ...] | None) -> list[Range]:
    """Where rows of a tensor lie: all of it for a whole table, or one that is stored with a line for each dimension."""
    entry = store.checkpoint.entry(name)
    if indices is None or store.is_transposed(name):
        return [(entry.begin, entry.end)]
    return _lines(entry, entry.shape[1] * ITEMSIZE[entry.dtype], indices)


def _lines(entry: Entry, pitch: int, indices: tuple[int, ...]) -> list[Range]:
    return [(entry.begin + i * pitch, entry.begin + (i + 1) * pitch) for i in indices]

"""The stack of merges in a checkpoint: what lies over what, which may be taken out, and what that leaves behind.

Reads records and changes nothing; ``offline/unmerging.py`` does what is decided here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from embedsurgery.checkpoints.records import MERGES, MergeRecord, facts_of, merge_record, record_paths
from embedsurgery.errors import CheckpointError, PlanError
from embedsurgery.files.json_reading import NOTE, read_json
from embedsurgery.graph import EmbeddingGraph
from embedsurgery.plan import Undo
from embedsurgery.plan.edit import Sizes, Touched
from embedsurgery.stores.store import shorten

_TOMBSTONE = re.compile(r"(\d{4,12})\.removed\.json")
_LEAST_HASH = 6


@dataclass(frozen=True)
class Entry:
    """A merge of the stack, with its undo.

    Attributes:
        path: Of the record.
        undo: What it holds.
        said: What it says.
        under: Number of an edit of the undo -> the later merge that lies over it.
        overlaps: What lies over it, for a message; None where nothing does.
    """

    path: Path
    undo: Undo
    said: MergeRecord
    under: Mapping[int, MergeRecord] = field(default_factory=dict)
    overlaps: str | None = None

    @property
    def number(self) -> int:
        """Its place in the stack."""
        return self.said.number


def merges_in(directory: Path) -> tuple[MergeRecord, ...]:
    """What the records of a checkpoint say, the oldest first; reads their headers alone.

    Raises:
        CheckpointError: It is no directory, or a record is broken.
        PlanError: A record is none.
    """
    if not os.path.isdir(directory):
        raise CheckpointError("no such checkpoint directory", where=directory)
    return tuple(merge_record(path, facts_of(path)) for path in record_paths(directory))


def entry(path: Path) -> Entry:
    """One record, as if it lay on top.

    Raises:
        CheckpointError, PlanError: It cannot be read.
    """
    undo = Undo.load(path, sealed=True)
    return Entry(path, undo, merge_record(path, undo.facts))


def stack(directory: Path, graph: EmbeddingGraph) -> list[Entry]:
    """Every merge, the oldest first, each with what lies over it.

    Args:
        directory: The checkpoint.
        graph: Of the checkpoint as it is now.

    Raises:
        CheckpointError, PlanError: A record cannot be read.
    """
    return arranged([entry(path) for path in record_paths(directory)], graph)


def arranged(entries: Sequence[Entry], graph: EmbeddingGraph) -> list[Entry]:
    """The entries, given the oldest first, each with what lies over it."""
    sizes = Sizes(graph)
    above: list[tuple[MergeRecord, Touched]] = []
    found = []
    for one in reversed(entries):
        touched = [edit.touches(sizes) for edit in one.undo.edits]
        under: dict[int, MergeRecord] = {}
        words: list[str] = []
        for number, below in enumerate(touched):
            for later, over in above:
                common = _common(below, over)
                if common is not None:
                    under.setdefault(number, later)
                    words.append(f"{later.label} over {common}")
        found.append(Entry(one.path, one.undo, one.said, under, "; ".join(dict.fromkeys(words)) or None))
        above.extend((one.said, part) for part in touched)
        for edit in one.undo.edits:
            edit.resize(sizes)
    return found[::-1]


def _common(one: Touched, other: Touched) -> str | None:
    """What two edits both touch, for a message; None for nothing."""
    for table, rows in one.rows.items():
        if table not in other.rows:
            continue
        others = other.rows[table]
        if rows is None or others is None:
            return f"all rows of {table}"
        both = sorted(set(rows) & set(others))
        if both:
            return f"{'row' if len(both) == 1 else 'rows'} {shorten(both)} of {table}"
    files = sorted(one.files & other.files)
    return ", ".join(files) if files else None


# -- what is taken out -------------------------------------------------------------------------------------------------


def chosen(entries: Sequence[Entry], where: Path, *, everything: bool, adapter: str | None) -> list[Entry]:
    """The merges that are to be taken out, in the order in which that is done.

    Args:
        entries: The stack, the oldest first.
        where: The checkpoint, for messages.
        everything: All of them.
        adapter: One: by its adapter's name, its number, or the beginning of its adapter's hash. By default the last.

    Raises:
        CheckpointError: There is none, or none of that name.
        PlanError: A later merge lies over it.
    """
    if not entries:
        raise CheckpointError(
            "no merge is recorded here, so there is nothing to take out",
            where=where,
            expected=f"{MERGES}/0001.safetensors",
            hint="only embedsurgery's own merges can be taken out",
        )
    if everything:
        return list(reversed(entries))
    one = entries[-1] if adapter is None else _find(entries, where, adapter)
    if one.overlaps is not None:
        raise PlanError(
            "a later merge lies over this one",
            where=f"{where}: {one.said.label}",
            found=one.overlaps,
            hint="take the later one out first, or all",
        )
    return [one]


def _find(entries: Sequence[Entry], where: Path, adapter: str) -> Entry:
    fits = [e for e in entries if e.said.adapter == adapter]
    if not fits and re.fullmatch(r"\d{1,12}", adapter):
        fits = [e for e in entries if e.number == int(adapter)]
    if not fits and len(adapter) >= _LEAST_HASH:
        fits = [e for e in entries if (e.said.adapter_sha256 or "").startswith(adapter)]
    if len(fits) == 1:
        return fits[0]
    what = "several merges fit" if fits else "no merge of that adapter is recorded here"
    listed = ", ".join(e.said.label for e in fits or entries)
    raise CheckpointError(
        what,
        where=where,
        expected=repr(adapter),
        found=listed,
        hint="name it as `embedsurgery log` does, or by its number",
    )


def left_behind(directory: Path, taken: Entry, entries: Sequence[Entry]) -> tuple[tuple[str, ...], dict[str, bytes]]:
    """What becomes of the files in ``.embedsurgery/merges/`` when one merge goes.

    A number below others stays as a note that the record is gone on purpose; notes on top go with the record above.

    Returns:
        Paths that are removed, and path -> bytes of those that are written; relative to the checkpoint.
    """
    rest = [e.number for e in entries if e.number != taken.number]
    top = max(rest, default=0)
    drops = [f"{MERGES}/{taken.path.name}"]
    drops += [f"{MERGES}/{note.name}" for number, note in sorted(tombstones(directory).items()) if number > top]
    if taken.number > top:
        return tuple(drops), {}
    note = {"adapter": taken.said.adapter, "surgery": taken.said.surgery, "files": list(taken.said.files)}
    text = json.dumps(note, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return tuple(drops), {f"{MERGES}/{taken.number:04d}.removed.json": text.encode()}


def tombstones(directory: Path) -> dict[int, Path]:
    """Number -> note that a merge was taken out from under others."""
    folder = directory / MERGES
    if not folder.is_dir():
        return {}
    named = ((_TOMBSTONE.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in named if match}


def taken_from_under(directory: Path) -> Iterator[tuple[int, frozenset[str]]]:
    """Number, and files that were touched, of each merge that was taken out from under others.

    Raises:
        CheckpointError: A note is broken.
    """
    for number, path in sorted(tombstones(directory).items()):
        files = read_json(path, NOTE).get("files")
        if not isinstance(files, list) or not all(isinstance(f, str) for f in files):
            raise CheckpointError("a note of a merge that was taken out is broken", where=path)
        yield number, frozenset(files)

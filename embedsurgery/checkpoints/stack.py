"""The stack of merges in a checkpoint: which merges override others, which can be unmerged, and what records remain.

This file only reads. ``unmerging.py`` carries out what is decided here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from embedsurgery.checkpoints.records import MERGES, MergeRecord, parse_record, read_facts, record_paths
from embedsurgery.errors import CheckpointError, PlanError
from embedsurgery.files.json_reading import NOTE, read_json
from embedsurgery.graph import EmbeddingGraph
from embedsurgery.plan import Undo
from embedsurgery.plan.edit import Sizes, Touched
from embedsurgery.stores.store import shorten

_TOMBSTONE = re.compile(r"(\d{4,12})\.removed\.json")
_MIN_HASH_PREFIX = 6


@dataclass(frozen=True)
class StackedMerge:
    """A merge of the stack, with its undo.

    Attributes:
        path: Its record.
        undo: The undo in the record.
        record: The facts in the record.
        overridden: Position of an edit of the undo -> the last merge that overrides it.
        overlaps: The later merges that override it and where, for messages; None if there are none.
    """

    path: Path
    undo: Undo
    record: MergeRecord
    overridden: Mapping[int, MergeRecord] = field(default_factory=dict)
    overlaps: str | None = None

    @property
    def number(self) -> int:
        """Position in the stack; 1 was merged first."""
        return self.record.number


def read_records(directory: Path) -> tuple[MergeRecord, ...]:
    """Read the records of a checkpoint, the oldest first; only headers are read.

    Raises:
        CheckpointError: The directory does not exist, or a record is broken.
        PlanError: A file is not a record.
    """
    if not os.path.isdir(directory):
        raise CheckpointError("no such checkpoint directory", where=directory)
    return tuple(parse_record(path, read_facts(path)) for path in record_paths(directory))


def read_merge(path: Path) -> StackedMerge:
    """Read one record, without what overrides it.

    Raises:
        CheckpointError, PlanError: The record is broken.
    """
    undo = Undo.load(path, sealed=True)
    return StackedMerge(path, undo, parse_record(path, undo.facts))


def read_stack(directory: Path, graph: EmbeddingGraph) -> list[StackedMerge]:
    """Read all merges, the oldest first, each with what overrides it.

    Args:
        directory: The checkpoint.
        graph: The graph of the checkpoint as it is now.

    Raises:
        CheckpointError, PlanError: A record is broken.
    """
    return find_overlaps([read_merge(path) for path in record_paths(directory)], graph)


def find_overlaps(merges: Sequence[StackedMerge], graph: EmbeddingGraph) -> list[StackedMerge]:
    """Fill in which later merges override which edits of each merge.

    Args:
        merges: The stack, the oldest first.
        graph: The graph of the checkpoint as it is now.
    """
    # The undo of a growth cuts the last rows of its tables; which rows those are depends on the sizes right after that
    # merge. So this goes from the newest merge down and resizes with each undo.
    sizes = Sizes(graph)
    later: list[tuple[MergeRecord, Touched]] = []
    found = []
    for merge in reversed(merges):
        touched = [edit.touches(sizes) for edit in merge.undo.edits]
        overridden: dict[int, MergeRecord] = {}
        descriptions: list[str] = []
        for number, below in enumerate(touched):
            for record, above in later:
                common = _describe_overlap(below, above)
                if common is not None:
                    overridden.setdefault(number, record)
                    descriptions.append(f"{record.label} overrides {common}")
        overlaps = "; ".join(dict.fromkeys(descriptions)) or None
        found.append(replace(merge, overridden=overridden, overlaps=overlaps))
        later.extend((merge.record, part) for part in touched)
        for edit in merge.undo.edits:
            edit.resize(sizes)
    return found[::-1]


def _describe_overlap(one: Touched, other: Touched) -> str | None:
    """What two edits both change, for a message; None if nothing."""
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


# -- which merges to unmerge -------------------------------------------------------------------------------------------


def select_merges(
    merges: Sequence[StackedMerge], where: Path, *, everything: bool, adapter: str | None
) -> list[StackedMerge]:
    """Select the merges to unmerge, in the order in which to do it.

    Args:
        merges: The stack, the oldest first.
        where: The checkpoint, for messages.
        everything: Select all.
        adapter: Select one by its adapter's name, its number, or the beginning of its adapter's hash. By default the
            last merge is selected.

    Raises:
        CheckpointError: There is no merge, or none that ``adapter`` names.
        PlanError: A later merge overrides it.
    """
    if not merges:
        raise CheckpointError(
            "the checkpoint has no merge records, so there is nothing to unmerge",
            where=where,
            expected=f"{MERGES}/0001.safetensors",
            hint="only merges made by embedsurgery can be unmerged",
        )
    if everything:
        return list(reversed(merges))
    merge = merges[-1] if adapter is None else _find_merge(merges, where, adapter)
    if merge.overlaps is not None:
        # Undoing it would restore rows from before both merges and so remove part of the later one.
        raise PlanError(
            "a later merge overrides this one",
            where=f"{where}: {merge.record.label}",
            found=merge.overlaps,
            hint="unmerge the later one first, or all of them",
        )
    return [merge]


def _find_merge(merges: Sequence[StackedMerge], where: Path, adapter: str) -> StackedMerge:
    fits = [m for m in merges if m.record.adapter == adapter]
    if not fits and re.fullmatch(r"\d{1,12}", adapter):
        fits = [m for m in merges if m.number == int(adapter)]
    if not fits and len(adapter) >= _MIN_HASH_PREFIX:
        fits = [m for m in merges if (m.record.adapter_sha256 or "").startswith(adapter)]
    if len(fits) == 1:
        return fits[0]
    raise CheckpointError(
        "several merges match" if fits else "no merge matches",
        where=where,
        expected=repr(adapter),
        found=", ".join(m.record.label for m in fits or merges),
        hint="give the number that `embedsurgery log` shows",
    )


def plan_record_removal(
    directory: Path, removed: StackedMerge, merges: Sequence[StackedMerge]
) -> tuple[tuple[str, ...], dict[str, bytes]]:
    """Decide which files of ``.embedsurgery/merges/`` to remove and to write when one merge is unmerged.

    Numbers are never reused below the top, so a gap needs an explanation: without one, `verify_checkpoint` reports the
    record as missing. A merge unmerged from under others therefore leaves a tombstone. Tombstones above the new top
    explain no gap any more and go too.

    Args:
        directory: The checkpoint.
        removed: The merge to unmerge.
        merges: The stack, including it.

    Returns:
        Paths to remove, and path -> bytes to write; relative to the checkpoint.
    """
    rest = [m.number for m in merges if m.number != removed.number]
    top = max(rest, default=0)
    removes = [f"{MERGES}/{removed.path.name}"]
    removes += [f"{MERGES}/{path.name}" for number, path in sorted(tombstone_paths(directory).items()) if number > top]
    if removed.number > top:
        return tuple(removes), {}
    record = removed.record
    body = {"adapter": record.adapter, "surgery": record.surgery, "files": list(record.files)}
    text = json.dumps(body, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return tuple(removes), {f"{MERGES}/{removed.number:04d}.removed.json": text.encode()}


def tombstone_paths(directory: Path) -> dict[int, Path]:
    """Number -> tombstone of each merge that was unmerged from under others."""
    folder = directory / MERGES
    if not folder.is_dir():
        return {}
    named = ((_TOMBSTONE.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in named if match}


def read_tombstones(directory: Path) -> Iterator[tuple[int, frozenset[str]]]:
    """The number and changed files of each merge that was unmerged from under others.

    Raises:
        CheckpointError: A tombstone is broken.
    """
    for number, path in sorted(tombstone_paths(directory).items()):
        files = read_json(path, NOTE).get("files")
        if not isinstance(files, list) or not all(isinstance(f, str) for f in files):
            raise CheckpointError("broken tombstone of a merge", where=path, expected="files: a list of strings")
        yield number, frozenset(files)

"""Hashes of what a change wrote, and the refusal to undo what has changed since."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from pathlib import Path

from embedsurgery.errors import PlanError
from embedsurgery.graph import Table
from embedsurgery.plan import Grow, Plan, SetBlocks, SetEntries, SetRows, Undo, Untie
from embedsurgery.plan.edits import spans
from embedsurgery.stores.store import Store, entries_of, rows_of
from embedsurgery.tensors.raw import ITEMSIZE


def _grown(edit: Grow, store: Store) -> Iterator[tuple[Table, range]]:
    """The tables that the undo of a growth makes shorter, each with the rows that it takes.

    Raises:
        PlanError: The vocabulary is not there.
    """
    vocabulary = next((v for v in store.graph.vocabularies if edit.vocabulary in v.tables), None)
    if vocabulary is None:
        raise PlanError("a record of a vocabulary that is not there", where=store.name, expected=edit.vocabulary)
    for name in vocabulary.tables:
        table = store.graph.table(name)
        yield table, range(table.shape[0] + edit.count, table.shape[0])


def written(undo: Plan, store: Store) -> list[str]:
    """For each edit of an undo, the hash of what is in the store now where it would put something back."""
    return [_digest(edit, store) for edit in undo.edits]


def _digest(edit: object, store: Store) -> str:
    if isinstance(edit, SetRows):
        return rows_of(store, store.graph.table(edit.table), edit.indices).sha256()
    if isinstance(edit, Untie) and edit.undo:
        return rows_of(store, store.graph.table(edit.head), edit.indices).sha256()
    if isinstance(edit, SetEntries):
        return entries_of(store, edit.vector, edit.indices).sha256()
    digest = hashlib.sha256()
    if isinstance(edit, SetBlocks):
        table = store.graph.table(edit.table)
        name = store.copies(table)[0]
        for start, stop in spans(table.shape[0], table.shape[1] * ITEMSIZE[table.dtype]):
            digest.update(store.read_block(name, start, stop).data)
    elif isinstance(edit, Grow) and edit.count < 0:
        for table, last in _grown(edit, store):
            digest.update(rows_of(store, table, tuple(last)).data)
    return digest.hexdigest()


def check_written(record: Path | str, undo: Undo, store: Store, skip: Collection[int] = ()) -> None:
    """Refuse to undo what has been changed since.

    Args:
        record: For messages.
        undo: What it holds.
        store: Where the merge was done.
        skip: Numbers of edits that are not looked at, because a later merge lies over them.

    Raises:
        PlanError: The rows, or a small file, are not what the merge wrote.
    """
    expected = undo.facts.get("written")
    if not isinstance(expected, list) or len(expected) != len(undo.edits):
        raise PlanError("the record does not say what was written", where=record)
    for number, (edit, before) in enumerate(zip(undo.edits, expected, strict=True)):
        if number in skip:
            continue
        now = _digest(edit, store)
        if before != now:
            where = next((getattr(edit, n) for n in ("table", "vector", "vocabulary") if hasattr(edit, n)), "?")
            raise PlanError("the rows are not those that the merge wrote", where=f"{store.name}: {where}",
                            expected=f"sha256 {str(before)[:12]}", found=now[:12],
                            hint="something changed them since: take that out first")  # fmt: skip

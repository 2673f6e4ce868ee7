"""Hashes what a change wrote, and refuses to undo a change whose rows were changed afterwards."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

from embedsurgery.errors import PlanError
from embedsurgery.plan import Edit, Undo
from embedsurgery.plan.blocks import spans
from embedsurgery.plan.edit import Sizes
from embedsurgery.plan.plan import Edits
from embedsurgery.stores.store import Store, entries_of, rows_of
from embedsurgery.tensors.raw import ITEMSIZE


def hash_written(undo: Edits, store: Store) -> list[str]:
    """Hash, for each edit of an undo, the current values that it would replace."""
    sizes = Sizes(store.graph, store.name)
    return [_hash_edit(edit, store, sizes) for edit in undo.edits]


def _hash_edit(edit: Edit, store: Store, sizes: Sizes) -> str:
    digest = hashlib.sha256()
    vectors = {name for v in store.graph.vocabularies for name in v.vectors}
    for name, indices in edit.replaced_rows(sizes).items():
        if name in vectors:
            digest.update(entries_of(store, name, tuple(indices or ())).data)
            continue
        table = store.graph.table(name)
        if indices is not None:
            digest.update(rows_of(store, table, tuple(indices)).data)
        else:
            for start, stop in spans(table.shape[0], table.shape[1] * ITEMSIZE[table.dtype]):
                digest.update(store.read_block(store.copies(table)[0], start, stop).data)
    return digest.hexdigest()


def check_written(record: Path | str, undo: Undo, store: Store, skip: Collection[int] = ()) -> None:
    """Refuse to undo a merge if rows that it wrote have changed since.

    Args:
        record: Name of the record, for messages.
        undo: The record's undo.
        store: The store with the merge.
        skip: Positions of edits that are not checked, because a later merge changed the same values.

    Raises:
        PlanError: Rows are not those that the merge wrote, or the record has no hashes.
    """
    expected = undo.facts.get("written")
    if not isinstance(expected, list) or len(expected) != len(undo.edits):
        raise PlanError("the record has no valid hashes", where=record, expected=f"{len(undo.edits)} hashes")
    sizes = Sizes(store.graph, store.name)
    for number, (edit, before) in enumerate(zip(undo.edits, expected, strict=True)):
        if number in skip:
            continue
        now = _hash_edit(edit, store, sizes)
        if before != now:
            where = ", ".join(edit.replaced_rows(sizes))
            raise PlanError(
                "the rows are not those that the merge wrote",
                where=f"{store.name}: {where}",
                expected=f"sha256 {str(before)[:12]}",
                found=now[:12],
                hint="undo the later change first",
            )

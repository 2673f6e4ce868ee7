"""Hashes of what a change wrote, and the refusal to undo what has changed since."""

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


def written(undo: Edits, store: Store) -> list[str]:
    """For each edit of an undo, the hash of what is in the store now where it would put something back."""
    sizes = Sizes(store.graph, store.name)
    return [_digest(edit, store, sizes) for edit in undo.edits]


def _digest(edit: Edit, store: Store, sizes: Sizes) -> str:
    digest = hashlib.sha256()
    vectors = {name for v in store.graph.vocabularies for name in v.vectors}
    for name, indices in edit.leaves(sizes).items():
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
    sizes = Sizes(store.graph, store.name)
    for number, (edit, before) in enumerate(zip(undo.edits, expected, strict=True)):
        if number in skip:
            continue
        now = _digest(edit, store, sizes)
        if before != now:
            where = ", ".join(edit.leaves(sizes))
            raise PlanError(
                "the rows are not those that the merge wrote",
                where=f"{store.name}: {where}",
                expected=f"sha256 {str(before)[:12]}",
                found=now[:12],
                hint="something changed them since: take that out first",
            )

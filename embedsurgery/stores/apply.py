"""The one implementation of "rows become new rows", over any store.

`apply` has a plan checked against the store whole (``checks.py``), before anything changes, does the edits, and returns
the undo. What a store is, is ``store.py``'s.
"""

from __future__ import annotations

import contextlib
import weakref
from pathlib import Path

from embedsurgery.errors import PlanError
from embedsurgery.files.safetensors import TensorSource, read_header, write_file
from embedsurgery.graph import Table
from embedsurgery.plan import (
    AddTokens,
    Blocks,
    Edit,
    Grow,
    PatchFile,
    SetBlocks,
    SetEntries,
    SetRows,
    Suppress,
    Undo,
    Untie,
)
from embedsurgery.plan.blocks import spans
from embedsurgery.plan.plan import Edits
from embedsurgery.stores.checks import check_edits, digest, expanded
from embedsurgery.stores.store import Store, entries_of, rows_of
from embedsurgery.tensors.raw import EDITABLE, ITEMSIZE

_WHOLE = (Grow, AddTokens, Suppress, Untie)
"""Edits that a store does all or nothing: where one fails, there is nothing of it to take back."""


def apply(plan: Edits, store: Store, *, spill: Path | None = None) -> Undo:
    """Do a plan's edits in order and return the undo, which `apply` takes like a plan.

    Everything is checked before anything changes, and a failure in the middle takes back what was done.

    Args:
        plan: What to do. Tables are named as in ``store.graph``.
        store: What to change.
        spill: Directory for the saved rows of whole-table edits; by default the temporary directory, where they
            are removed with the undo.

    Raises:
        PlanError: The plan does not fit the store: a table, a row or a width that is not there, rows set twice.
        UnsupportedError: A table whose rows cannot be set, or an edit that the store has no way to do.
    """
    edits = expanded(plan, store)
    check_edits(edits, store)
    undone: list[Edit] = []
    try:
        for edit in edits:
            saved = _save(edit, store, spill)
            if not isinstance(edit, _WHOLE):
                undone[:0] = saved
            _do(edit, store)
            if isinstance(edit, _WHOLE):
                undone[:0] = saved
        store.sync()
        undo = Undo(tuple(undone))
    except BaseException as error:
        for edit in undone:
            try:
                _do(edit, store)
            except BaseException as second:  # what cannot be written back was most likely never written
                error.add_note(f"while taking back {edit.describe()!r}: {second}")
        raise
    return undo


def _save(edit: Edit, store: Store, spill: Path | None) -> tuple[Edit, ...]:
    """The edits that put back what ``edit`` is about to change, in order."""
    if isinstance(edit, SetRows):
        table = store.graph.table(edit.table)
        return (SetRows(edit.table, edit.indices, rows_of(store, table, edit.indices)),)
    if isinstance(edit, SetEntries):
        return (SetEntries(edit.vector, edit.indices, entries_of(store, edit.vector, edit.indices)),)
    if isinstance(edit, SetBlocks):
        return (SetBlocks(edit.table, _spill(store, store.graph.table(edit.table), spill)),)
    if isinstance(edit, Grow):
        return (store.growth_undone(edit),)
    if isinstance(edit, AddTokens):
        return store.tokens_undone(edit)
    if isinstance(edit, Suppress):
        return (store.suppression_undone(edit),)
    if isinstance(edit, Untie):
        return (store.untie_undone(edit),)
    assert isinstance(edit, PatchFile)
    return (PatchFile(edit.path, after=store.read_file(edit.path), before=digest(edit.after)),)


def _spill(store: Store, table: Table, directory: Path | None) -> Blocks:
    """Copy a whole table into a file, block by block; a file of our own choosing goes when the blocks go."""
    import tempfile

    name = store.copies(table)[0]
    chunks = (store.read_block(name, a, b).data for a, b in spans(table.shape[0], _pitch(table)))
    folder = Path(tempfile.mkdtemp(prefix="embedsurgery-undo-", dir=directory))
    path = folder / "blocks.safetensors"
    try:
        write_file(path, {"blocks": TensorSource(table.dtype, table.shape, chunks)}, {})
    except BaseException:
        _remove(path)
        raise
    blocks = Blocks.in_file(path, read_header(path).entries["blocks"])
    weakref.finalize(blocks.block, _remove, path)  # which copies of an undo share
    return blocks


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        path.parent.rmdir()


def _pitch(table: Table) -> int:
    return table.shape[1] * ITEMSIZE[table.dtype]


def _do(edit: Edit, store: Store) -> None:
    if isinstance(edit, SetRows):
        table = store.graph.table(edit.table)
        rows = edit.rows.to(table.dtype)
        for name in store.copies(table):
            store.write_rows(name, edit.indices, rows)
    elif isinstance(edit, SetEntries):
        store.write_entries(edit.vector, edit.indices, edit.entries)
    elif isinstance(edit, SetBlocks):
        table = store.graph.table(edit.table)
        first, *others = store.copies(table)
        for start, stop in spans(table.shape[0], _pitch(table)):
            new = edit.blocks.block(start, stop, store.read_block(first, start, stop))
            if new.shape != (stop - start, table.shape[1]) or new.dtype not in EDITABLE:
                raise PlanError(
                    "a block of the wrong shape or dtype",
                    where=f"{store.name}: {table.name}",
                    expected=f"({stop - start}, {table.shape[1]})",
                    found=f"{new!r}",
                )
            new = new.to(table.dtype)
            for name in (first, *others):
                store.write_block(name, start, new)
    elif isinstance(edit, Grow):
        store.grow(edit)
    elif isinstance(edit, AddTokens):
        store.change_tokens(edit)
    elif isinstance(edit, Suppress):
        store.suppress(edit)
    elif isinstance(edit, Untie):
        store.untie(edit)
    elif isinstance(edit, PatchFile):
        store.patch_file(edit)

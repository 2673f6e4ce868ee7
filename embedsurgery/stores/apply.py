"""Applies a plan to any store, and returns its undo.

``checks.py`` checks the whole plan before anything changes. ``store.py`` defines what a store can do.
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
from embedsurgery.stores.checks import check_edits, digest_of, expand
from embedsurgery.stores.store import Store, entries_of, rows_of
from embedsurgery.tensors.raw import EDITABLE, ITEMSIZE

_ALL_OR_NOTHING = (Grow, AddTokens, Suppress, Untie)
"""Edits that a store does completely or not at all. If one fails, it must not be undone."""


def apply(plan: Edits, store: Store, *, spill: Path | None = None) -> Undo:
    """Apply the edits of a plan in order and return the undo, which `apply` takes like a plan.

    Everything is checked before anything changes. If an edit fails, those before it are undone.

    Args:
        plan: The edits. Tables are named as in ``store.graph``.
        store: The store to change.
        spill: Directory for the saved rows of whole tables; by default the system's temporary directory. They are
            removed together with the undo.

    Raises:
        PlanError: The plan does not fit the store: a table or row does not exist, a shape is wrong, or rows are set
            twice.
        UnsupportedError: Rows of a table cannot be set, or the store cannot do an edit.
    """
    edits = expand(plan, store)
    check_edits(edits, store)
    inverses: list[Edit] = []
    try:
        for edit in edits:
            inverse = _invert(edit, store, spill)
            # Rows that are half written must be restored, so their inverse is registered before the edit is tried.
            # An edit of all or nothing left nothing when it fails, and undoing it would do damage: removing rows, say,
            # that were never added.
            if not isinstance(edit, _ALL_OR_NOTHING):
                inverses[:0] = inverse
            _apply_edit(edit, store)
            if isinstance(edit, _ALL_OR_NOTHING):
                inverses[:0] = inverse
        store.sync()
        undo = Undo(tuple(inverses))
    except BaseException as error:
        for edit in inverses:
            try:
                _apply_edit(edit, store)
            # Go on with the others. What cannot be written now could most likely not be written before either.
            except BaseException as second:
                error.add_note(f"while undoing, {edit.describe()!r} failed: {second}")
        raise
    return undo


def _invert(edit: Edit, store: Store, spill: Path | None) -> tuple[Edit, ...]:
    """Return the edits that undo ``edit``, which has not been applied yet."""
    if isinstance(edit, SetRows):
        table = store.graph.table(edit.table)
        return (SetRows(edit.table, edit.indices, rows_of(store, table, edit.indices)),)
    if isinstance(edit, SetEntries):
        return (SetEntries(edit.vector, edit.indices, entries_of(store, edit.vector, edit.indices)),)
    if isinstance(edit, SetBlocks):
        return (SetBlocks(edit.table, _spill_table(store, store.graph.table(edit.table), spill)),)
    if isinstance(edit, Grow):
        return (store.invert_growth(edit),)
    if isinstance(edit, AddTokens):
        return store.invert_tokens(edit)
    if isinstance(edit, Suppress):
        return (store.invert_suppression(edit),)
    if isinstance(edit, Untie):
        return (store.invert_untie(edit),)
    assert isinstance(edit, PatchFile)
    return (PatchFile(edit.path, after=store.read_file(edit.path), before=digest_of(edit.after)),)


def _spill_table(store: Store, table: Table, directory: Path | None) -> Blocks:
    """Copy a whole table to a new file, block by block. The file is removed together with the returned blocks."""
    import tempfile

    name = store.copies(table)[0]
    chunks = (store.read_block(name, a, b).data for a, b in spans(table.shape[0], _row_bytes(table)))
    folder = Path(tempfile.mkdtemp(prefix="embedsurgery-undo-", dir=directory))
    path = folder / "blocks.safetensors"
    try:
        write_file(path, {"blocks": TensorSource(table.dtype, table.shape, chunks)}, {})
    except BaseException:
        _remove_spill(path)
        raise
    blocks = Blocks.in_file(path, read_header(path).entries["blocks"])
    weakref.finalize(blocks.block, _remove_spill, path)  # copies of the undo share this object
    return blocks


def _remove_spill(path: Path) -> None:
    path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        path.parent.rmdir()


def _row_bytes(table: Table) -> int:
    return table.shape[1] * ITEMSIZE[table.dtype]


def _apply_edit(edit: Edit, store: Store) -> None:
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
        for start, stop in spans(table.shape[0], _row_bytes(table)):
            new = edit.blocks.block(start, stop, store.read_block(first, start, stop))
            if new.shape != (stop - start, table.shape[1]) or new.dtype not in EDITABLE:
                raise PlanError(
                    "wrong shape or dtype of a block",
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

"""The one implementation of "rows become new rows", over any store.

A store reads and writes rows and knows nothing of surgeries; `apply` checks a plan against it whole, before
anything changes, does the edits, and returns the undo. A store for another file format implements `Store` and gets
every surgery.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from embedsurgery.errors import PlanError, TableError, UnsupportedEditError, UnsupportedError
from embedsurgery.graph import EmbeddingGraph, Table
from embedsurgery.plan import Blocks, Edit, PatchFile, Plan, SetBlocks, SetRows, Undo, spans
from embedsurgery.raw import EDITABLE, ITEMSIZE, RawArray
from embedsurgery.safetensors_file import TensorSource, read_header, write_file

_SCALES = ("_scale", "_scale_inv", ".scales", ".qzeros", ".absmax", ".quant_state", ".SCB", "_zero_point", ".g_idx")
"""What lies beside a quantised weight, as a suffix of its name or its module's."""


class Store(ABC):
    """Where tables live. All rows go in and out in the table's own dtype, as (n, D) whatever way they are stored."""

    graph: EmbeddingGraph
    """What is in the store; plans name tables as this graph does."""

    name: str
    """What the store is, for messages."""

    @abstractmethod
    def copies(self, table: Table) -> tuple[str, ...]:
        """The names under which separate copies of a table are stored, one for each memory; the first is read."""

    @abstractmethod
    def read_rows(self, name: str, indices: tuple[int, ...]) -> RawArray:
        """Rows of one copy, (K, D), in the order of the indices, which are in range."""

    @abstractmethod
    def write_rows(self, name: str, indices: tuple[int, ...], rows: RawArray) -> None:
        """Set rows of one copy; their dtype is the table's."""

    @abstractmethod
    def read_block(self, name: str, start: int, stop: int) -> RawArray:
        """Consecutive rows of one copy, (stop - start, D)."""

    @abstractmethod
    def write_block(self, name: str, start: int, rows: RawArray) -> None:
        """Set consecutive rows of one copy; their dtype is the table's."""

    def patch_file(self, edit: PatchFile) -> None:
        """Do a `PatchFile`, whose ``before`` holds."""
        raise UnsupportedEditError("no files lie beside this store", where=self.name, found=edit.describe())

    def read_file(self, path: str) -> bytes | None:
        """The bytes of a small file beside the weights, None where there is none."""
        raise UnsupportedEditError("no files lie beside this store", where=self.name, found=path)

    def check_editable(self, table: Table) -> None:
        """Refuse a table whose rows are not plain numbers.

        Raises:
            UnsupportedError: The table is quantised, sharded or in some other way not what its rows say.
        """
        if table.dtype not in EDITABLE:
            raise UnsupportedError(
                "the rows of this table cannot be set",
                where=f"{self.name}: {table.name}",
                expected=" or ".join(EDITABLE),
                found=table.dtype,
                hint="edit the model before it is quantised",
            )
        names = self.tensor_names()
        for name in self.copies(table):
            module = name.rpartition(".")[0]
            beside = [s for s in _SCALES if name + s in names or module + s in names or f"{module}.weight{s}" in names]
            if beside:
                raise UnsupportedError("the table is quantised: a scale tensor lies beside it", where=name,
                                       found=beside[0], hint="edit the model before it is quantised")  # fmt: skip

    def check_writable(self, table: Table) -> None:  # noqa: B027 - most stores can write what they can read
        """Refuse a table whose rows can be read and trained, but not written here.

        Raises:
            UnsupportedError: It says why.
        """

    @abstractmethod
    def tensor_names(self) -> Collection[str]:
        """The names of everything that is stored, tables or not."""

    def sync(self) -> None:  # noqa: B027 - most stores have nothing to do here
        """Make the edits durable, where that means something."""


def rows_of(store: Store, table: Table, indices: tuple[int, ...]) -> RawArray:
    """A table's rows as they are now, (K, D).

    Raises:
        PlanError: An index is out of range.
    """
    check_indices(table, indices)
    return store.read_rows(store.copies(table)[0], indices)


def check_indices(table: Table, indices: tuple[int, ...]) -> None:
    """Refuse indices that are not rows of the table.

    Raises:
        PlanError: With the offending ones.
    """
    bad = [i for i in indices if not 0 <= i < table.shape[0]]
    if bad:
        raise PlanError("rows that the table does not have", where=table.name,
                        expected=f"0 to {table.shape[0] - 1}", found=shorten(bad))  # fmt: skip


def shorten(values: list[int], most: int = 8) -> str:
    """A list for a message: the first few, and how many more."""
    text = ", ".join(map(str, values[:most]))
    return text if len(values) <= most else f"{text} and {len(values) - most} more"


def apply(plan: Plan, store: Store, *, spill: Path | None = None) -> Undo:
    """Do a plan's edits in order and return the undo, which is a plan that `apply` takes like any other.

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
    check(plan, store)
    undone: list[Edit] = []
    try:
        for edit in plan.edits:
            saved = _save(edit, store, spill)
            undone.insert(0, saved)
            _do(edit, store)
        store.sync()
    except BaseException as error:
        for edit in undone:
            try:
                _do(edit, store)
            except BaseException as second:  # what cannot be written back was most likely never written
                error.add_note(f"while taking back {edit.describe()!r}: {second}")
        raise
    return Undo(tuple(undone))


def check(plan: Plan, store: Store) -> None:
    """All that `apply` checks beforehand; changes nothing."""
    seen: dict[str, set[int]] = {}
    patched: set[str] = set()
    for edit in plan.edits:
        if isinstance(edit, SetRows):
            table = _table(store, edit.table)
            check_indices(table, edit.indices)
            if edit.rows.shape != (len(edit.indices), table.shape[1]) or edit.rows.dtype not in EDITABLE:
                raise PlanError("rows of the wrong shape or dtype", where=f"{store.name}: {table.name}",
                                expected=f"({len(edit.indices)}, {table.shape[1]}) of {', '.join(EDITABLE)}",
                                found=f"{edit.rows.shape} of {edit.rows.dtype}")  # fmt: skip
            _claim(seen, table, list(edit.indices))
        elif isinstance(edit, SetBlocks):
            table = _table(store, edit.table)
            if 0 in table.shape:
                raise PlanError("the table is empty", where=f"{store.name}: {table.name}", found=list(table.shape))
            if edit.blocks.shape != table.shape:
                raise PlanError("a whole table of another shape", where=f"{store.name}: {table.name}",
                                expected=list(table.shape), found=list(edit.blocks.shape))  # fmt: skip
            _claim(seen, table, list(range(table.shape[0])))
        elif isinstance(edit, PatchFile):
            if edit.path in patched:
                raise PlanError("a file would be patched twice", where=f"{store.name}: {edit.path}", expected="once")
            patched.add(edit.path)
            found = store.read_file(edit.path)
            if _digest(found) != edit.before:
                raise PlanError("a file is not what it was when the plan was made", where=f"{store.name}: {edit.path}",
                                expected=_shown(edit.before), found=_shown(_digest(found)))  # fmt: skip
        else:
            raise UnsupportedEditError("this store cannot do this edit", where=store.name, found=edit.describe())


def _table(store: Store, name: str) -> Table:
    try:
        table = store.graph.table(name)
    except TableError as error:
        raise PlanError("the plan names a table that is not in the store", where=store.name, expected=name,
                        found=error.found) from error  # fmt: skip
    store.check_editable(table)
    store.check_writable(table)
    return table


def _claim(seen: dict[str, set[int]], table: Table, indices: list[int]) -> None:
    taken = seen.setdefault(table.name, set())
    twice = sorted(taken.intersection(indices))
    if twice or len(set(indices)) != len(indices):
        twice = twice or sorted(i for i, count in Counter(indices).items() if count > 1)
        raise PlanError("rows would be set twice", where=table.name, expected="each row once", found=shorten(twice))
    taken.update(indices)


def _digest(data: bytes | None) -> str | None:
    return None if data is None else hashlib.sha256(data).hexdigest()


def _shown(digest: str | None) -> str:
    return "no file" if digest is None else f"sha256 {digest[:12]}"


def _save(edit: Edit, store: Store, spill: Path | None) -> Edit:
    """The edit that puts back what ``edit`` is about to change."""
    if isinstance(edit, SetRows):
        table = store.graph.table(edit.table)
        return SetRows(edit.table, edit.indices, rows_of(store, table, edit.indices))
    if isinstance(edit, SetBlocks):
        return SetBlocks(edit.table, _spill(store, store.graph.table(edit.table), spill))
    assert isinstance(edit, PatchFile)
    return PatchFile(edit.path, after=store.read_file(edit.path), before=_digest(edit.after))


def _spill(store: Store, table: Table, directory: Path | None) -> Blocks:
    """Copy a whole table into a file, block by block; a file of our own choosing goes when the blocks go."""
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
    weakref.finalize(blocks, _remove, path)
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
    elif isinstance(edit, SetBlocks):
        table = store.graph.table(edit.table)
        first, *others = store.copies(table)
        for start, stop in spans(table.shape[0], _pitch(table)):
            new = edit.blocks.block(start, stop, store.read_block(first, start, stop))
            if new.shape != (stop - start, table.shape[1]) or new.dtype not in EDITABLE:
                raise PlanError("a block of the wrong shape or dtype", where=f"{store.name}: {table.name}",
                                expected=f"({stop - start}, {table.shape[1]})", found=f"{new!r}")  # fmt: skip
            new = new.to(table.dtype)
            for name in (first, *others):
                store.write_block(name, start, new)
    elif isinstance(edit, PatchFile):
        store.patch_file(edit)

"""Overrides of whole tables in a forward: computes only the rows that a batch looks up, and lets the change do heads.

A table's change may take several tensors. Each is a `Rows`, so that it trains, moves and is saved as rows are. The last
tensor of a table refers to the others and is the one that the hooks get. ``surgeries/whole_tables.py`` has the changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext

import numpy as np
import torch

from embedsurgery.adapters.adapter import Adapter
from embedsurgery.errors import AttachmentError
from embedsurgery.plan import Undo
from embedsurgery.runtime.rows.rows import Rows
from embedsurgery.runtime.rows.sharded import plain_rows
from embedsurgery.runtime.rows.sparse_lookup import pick_rows, should_pick
from embedsurgery.stores.store import Store
from embedsurgery.surgeries.surgery import RowOverride
from embedsurgery.surgeries.whole_tables import TableChange, TableOverride
from embedsurgery.tensors.convert import from_raw
from embedsurgery.tensors.raw import RawArray
from embedsurgery.tensors.sharded import gather, gather_rows, is_sharded


class ExtraTensor(Rows):
    """A tensor of a table's change, except the last one. Hooks do not get it."""


class TableRows(Rows):
    """The last tensor of a table's change.

    Args:
        values: Its values.
        override: The override that it belongs to.
        device: The table's device.
        others: The change's other tensors, in order.
    """

    def __init__(
        self, values: RawArray, override: TableOverride, device: torch.device, others: Sequence[ExtraTensor]
    ) -> None:
        super().__init__(values, override.indices, device)
        assert override.change is not None
        self.change: TableChange = override.change
        self.index_set = range(override.rows)  # a padding row changes, too
        self.others = tuple(others)  # in a tuple, so that they are not registered twice

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors of the change, in order."""
        return [plain_rows(part.values) for part in (*self.others, self)]

    def rows(
        self, ids: torch.Tensor, current: torch.Tensor, tensors: Sequence[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Return changed rows.

        Args:
            ids: Row numbers, int64 (n,).
            current: The base's rows, (n, D).
            tensors: The tensors of the change; by default the present ones.

        Returns:
            (n, D), in the dtype of ``current``, rounded once. Autocast would round in between, so it is off.
        """
        kind = current.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            new = self.change.rows(self.tensors() if tensors is None else tensors, ids, current)
        return new.to(current.dtype)

    def project(self, hidden: torch.Tensor, logits: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return changed logits, (..., V), from hidden states, the base's logits and the table."""
        return self.change.logits(self.tensors(), hidden, logits, gather(weight)).to(logits.dtype)


def make_rows(
    overrides: Sequence[RowOverride], raw: Mapping[str, RawArray], devices: Sequence[torch.device]
) -> list[Rows]:
    """Make the trainable module of each override, in their order.

    Args:
        overrides: The overrides that a surgery's `live` returned.
        raw: The adapter's tensors.
        devices: The device of each override's table.
    """
    made: list[Rows] = []
    waiting: list[ExtraTensor] = []
    for override, device in zip(overrides, devices, strict=True):
        values = raw[override.tensor]
        if not isinstance(override, TableOverride):
            made.append(Rows(values, override.indices, device))
        elif override.change is None:
            waiting.append(ExtraTensor(values, (), device))
            made.append(waiting[-1])
        else:
            made.append(TableRows(values, override, device, waiting))
            waiting = []
    return made


def select_rows(rows: Rows, ids: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what a lookup of token ids needs of live rows.

    Args:
        rows: Rows of a table, or the change of a whole table.
        ids: Token ids of any shape.
        weight: The table, (V, D).

    Returns:
        A small table, (n, D), in the third place. In the first two, of the shape of ``ids``: the position of each id in
        it, and whether the id is overridden.
    """
    if not isinstance(rows, TableRows):
        place, is_overridden = rows.find(ids)
        if is_sharded(rows.values) or not should_pick(rows, ids.numel()):
            return place, is_overridden, plain_rows(rows.values).to(weight.dtype)
        each = torch.arange(ids.numel(), device=ids.device).reshape(ids.shape)
        return each, is_overridden, pick_rows(rows, place.reshape(-1)).to(weight.dtype)
    flat = ids.reshape(-1).long()
    place = torch.arange(flat.numel(), device=ids.device).reshape(ids.shape)
    return place, torch.ones_like(ids, dtype=torch.bool), rows.rows(flat, gather_rows(weight, flat))


def tensors_of(rows: Rows) -> list[torch.Tensor]:
    """Return the trained tensors of live rows, as plain tensors."""
    return rows.tensors() if isinstance(rows, TableRows) else [plain_rows(rows.values)]


def insert_rows(base: torch.Tensor, rows: Rows, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a copy of a table, (V, D), with rows of these tensors in it."""
    if not isinstance(rows, TableRows):
        return base.index_copy(0, rows.indices, tensors[0].to(base.dtype))
    return rows.rows(torch.arange(base.shape[0], device=base.device), base, tensors)


def has_whole_tables(rows: Sequence[Rows]) -> bool:
    """Whether any of them changes a whole table."""
    return any(isinstance(part, TableRows) for part in rows)


def match_whole_tables(
    name: str, live: Sequence[RowOverride], given: Sequence[RowOverride], live_adapter: Adapter, adapter: Adapter
) -> list[torch.Tensor]:
    """Do what `loading.match_rows` does, if an override is of a whole table.

    Raises:
        AttachmentError: The tables, their changes or the shapes of the tensors differ.
    """
    sides = [
        [(o.table, raw[o.tensor].shape, o.indices, getattr(o, "change", None)) for o in overrides]
        for overrides, raw in ((live, live_adapter.raw), (given, adapter.raw))
    ]
    if sides[0] != sides[1]:
        expected, found = (", ".join(f"{table} {list(shape)}" for table, shape, _, _ in side) for side in sides)
        raise AttachmentError(
            "the adapter is for other tables, or for another change of them",
            where=name,
            expected=expected,
            found=found,
        )
    return [from_raw(adapter.raw[override.tensor]) for override in given]


def find_overflow(undo: Undo, store: Store) -> Iterator[tuple[str, list[int]]]:
    """Yield whole tables, and their rows that were finite before a merge and are infinite now.

    Only fp16 tables are read: other dtypes have the range of fp32.

    Args:
        undo: The undo of the merge.
        store: The store that was merged into.
    """
    for edit in undo.edits:
        found = edit.whole_table()
        if found is None or (table := store.graph.table(found[0])).dtype != "F16":
            continue
        blocks = found[1]
        lost: list[int] = []
        for start, stop in blocks.spans():
            now = store.read_block(store.copies(table)[0], start, stop)
            before = blocks.block(start, stop, now)
            overflown = np.isfinite(before.float32()) & ~np.isfinite(now.float32())
            lost += [start + int(row) for row in np.flatnonzero(overflown.any(axis=1))]
        if lost:
            yield table.name, lost

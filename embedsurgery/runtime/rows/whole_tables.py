"""Whole tables that are overridden in a forward: only the rows that a batch looks up are made, and heads as they can.

A table's change may take several tensors. Each is a `Rows` of its own, so that it trains, moves and is saved as rows
are; the last one of a table knows the others and is the one that hooks see.
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
from embedsurgery.runtime.rows.sparse_lookup import picked, picks
from embedsurgery.stores.store import Store
from embedsurgery.surgeries.surgery import RowOverride
from embedsurgery.surgeries.whole_tables import TableChange, TableOverride
from embedsurgery.tensors.convert import from_raw
from embedsurgery.tensors.raw import RawArray
from embedsurgery.tensors.sharded import is_sharded, rows_at, whole


class Companion(Rows):
    """A further tensor of a table's change: no hook sees it."""


class TableRows(Rows):
    """The last tensor of a table's change.

    Args:
        values: Its values.
        override: What it is of.
        device: Where the table is.
        others: The tensors before it.
    """

    def __init__(
        self, values: RawArray, override: TableOverride, device: torch.device, others: Sequence[Companion]
    ) -> None:
        super().__init__(values, override.indices, device)
        assert override.change is not None
        self.change: TableChange = override.change
        self.numbers = range(override.rows)  # a padding row changes as others do
        self.others = tuple(others)  # in a tuple, so that none is registered twice

    def tensors(self) -> list[torch.Tensor]:
        """What the change takes."""
        return [plain_rows(part.values) for part in (*self.others, self)]

    def rows(
        self, ids: torch.Tensor, current: torch.Tensor, tensors: Sequence[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Rows as they become, (n, D) in the table's dtype, rounded once: autocast would round on the way."""
        kind = current.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            new = self.change.rows(self.tensors() if tensors is None else tensors, ids, current)
        return new.to(current.dtype)

    def project(self, hidden: torch.Tensor, logits: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Logits as they become."""
        return self.change.logits(self.tensors(), hidden, logits, whole(weight)).to(logits.dtype)


def rows_for(
    overrides: Sequence[RowOverride], raw: Mapping[str, RawArray], devices: Sequence[torch.device]
) -> list[Rows]:
    """The trainable module of each override, in their order.

    Args:
        overrides: What a surgery returned from `live`.
        raw: The adapter's tensors.
        devices: Where each override's table is.
    """
    made: list[Rows] = []
    waiting: list[Companion] = []
    for override, device in zip(overrides, devices, strict=True):
        values = raw[override.tensor]
        if not isinstance(override, TableOverride):
            made.append(Rows(values, override.indices, device))
        elif override.change is None:
            waiting.append(Companion(values, (), device))
            made.append(waiting[-1])
        else:
            made.append(TableRows(values, override, device, waiting))
            waiting = []
    return made


def chosen(rows: Rows, ids: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a lookup needs of live rows.

    Args:
        rows: Of a few rows, or of the whole table.
        ids: Token ids of any shape.
        weight: The table, (V, D).

    Returns:
        For each id its position in the small table, and whether it is overridden; and the small table, (n, D).
    """
    if not isinstance(rows, TableRows):
        place, ours = rows.find(ids)
        if is_sharded(rows.values) or not picks(rows, ids.numel()):
            return place, ours, plain_rows(rows.values).to(weight.dtype)
        each = torch.arange(ids.numel(), device=ids.device).reshape(ids.shape)
        return each, ours, picked(rows, place.reshape(-1)).to(weight.dtype)
    flat = ids.reshape(-1).long()
    place = torch.arange(flat.numel(), device=ids.device).reshape(ids.shape)
    return place, torch.ones_like(ids, dtype=torch.bool), rows.rows(flat, rows_at(weight, flat))


def tensors_of(rows: Rows) -> list[torch.Tensor]:
    """What live rows are made of, as plain tensors."""
    return rows.tensors() if isinstance(rows, TableRows) else [plain_rows(rows.values)]


def over(base: torch.Tensor, rows: Rows, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """A full copy of a table, (V, D), with live rows in it, made of these tensors."""
    if not isinstance(rows, TableRows):
        return base.index_copy(0, rows.indices, tensors[0].to(base.dtype))
    return rows.rows(torch.arange(base.shape[0], device=base.device), base, tensors)


def has_whole_tables(rows: Sequence[Rows]) -> bool:
    """Whether any of them is of a whole table."""
    return any(isinstance(part, TableRows) for part in rows)


def whole_replacements(
    name: str, ours: Sequence[RowOverride], theirs: Sequence[RowOverride], live: Adapter, adapter: Adapter
) -> list[torch.Tensor]:
    """As `loading.replacements`, where an override is of a whole table.

    Raises:
        AttachmentError: They are not for the same tables, in the same way.
    """
    parts = [
        [(o.table, raw[o.tensor].shape, o.indices, getattr(o, "change", None)) for o in overrides]
        for overrides, raw in ((ours, live.raw), (theirs, adapter.raw))
    ]
    if parts[0] != parts[1]:
        expected, found = (", ".join(f"{table} {list(shape)}" for table, shape, _, _ in part) for part in parts)
        raise AttachmentError(
            "the adapter is for other tables, or changes them otherwise", where=name, expected=expected, found=found
        )
    return [from_raw(adapter.raw[override.tensor]) for override in theirs]


def overflown(undo: Undo, store: Store) -> Iterator[tuple[str, list[int]]]:
    """Whole tables of fp16 with rows that were numbers before a merge and are infinite now; other dtypes reach further.

    Args:
        undo: Of the merge.
        store: Where to.
    """
    for edit in undo.edits:
        whole = edit.whole()
        if whole is None or (table := store.graph.table(whole[0])).dtype != "F16":
            continue
        blocks = whole[1]
        lost: list[int] = []
        for start, stop in blocks.spans():
            now = store.read_block(store.copies(table)[0], start, stop)
            before = blocks.block(start, stop, now)
            gone = np.isfinite(before.float32()) & ~np.isfinite(now.float32())
            lost += [start + int(row) for row in np.flatnonzero(gone.any(axis=1))]
        if lost:
            yield table.name, lost

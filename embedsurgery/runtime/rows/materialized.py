"""Weights with the live rows for code outside of all forwards, inside `Attachment.materialized`.

A training loop that passes ``model.lm_head.weight`` to a fused loss reads it where no hook runs. The weight is covered
as in ``stand_in.py``, but the next read after an optimizer's step has the new rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from embedsurgery.errors import UnsupportedError
from embedsurgery.graph import EmbeddingGraph, Table
from embedsurgery.runtime.rows.full_copy import full_copy
from embedsurgery.runtime.rows.overlays import Holder, LazyOverlay
from embedsurgery.runtime.rows.rows import Rows
from embedsurgery.runtime.rows.sites import parameter_of, table_holders
from embedsurgery.runtime.rows.stand_in import LazySource, LazyWeight, make_lazy_weight
from embedsurgery.runtime.rows.whole_tables import has_whole_tables
from embedsurgery.tensors.sharded import is_sharded


class MaterializedWeights(LazyOverlay):
    """Covers one table's weights from `cover` to `uncover`.

    Args:
        table: The table.
        holders: Every alias of it.
        live: Its live rows.
    """

    def __init__(self, table: Table, holders: list[Holder], live: list[Rows]) -> None:
        super().__init__(table, holders, live, _ignore_reads, ())

    def cover(self) -> None:
        """Cover the weights, if rows are live.

        Raises:
            UnsupportedError: A sharded table, a table that is overridden as a whole, or a batch that mixes adapters.
        """
        if not self.live:
            return
        parts = [*(rows.values for rows in self.live), *(parameter_of(m, n) for m, n, _ in self.holders)]
        found = (
            "a sharded table"
            if any(is_sharded(part) or hasattr(part, "ds_id") for part in parts)
            else "a table that is overridden as a whole"
            if has_whole_tables(self.live)
            else "a batch in per_sample()"
            if any(rows.samples is not None for rows in self.live)
            else None
        )
        if found is not None:
            raise UnsupportedError(
                "attachment.materialized() does not support this",
                where=self.table.name,
                found=found,
                hint="read the weight in the forward of the model",
            )
        module, name, transposed = self.holders[0]
        base = parameter_of(module, name)
        table = base.t() if transposed else base
        source = _CurrentSource(self.table, table, tuple(self.live), _ignore_reads, self.running_sites)
        made: dict[int, LazyWeight] = {}
        with torch.enable_grad():
            for module, name, transposed in self.holders:
                weight = parameter_of(module, name)
                if id(weight) not in made:
                    made[id(weight)] = make_lazy_weight(weight, transposed, source)
                self._cover(module, name, made[id(weight)])

    def __getstate__(self) -> dict[str, Any]:
        raise UnsupportedError(
            "a model cannot be copied inside attachment.materialized()",
            where=self.table.name,
            hint="copy it before the with-block",
        )


class _CurrentSource(LazySource):
    """A source that notices changed rows. It compares values, because a write to ``.data`` counts in no version."""

    seen: Any = None
    values: list[torch.Tensor]

    def full_table(self, function: Any) -> torch.Tensor:
        if torch.compiler.is_compiling():  # it cannot compare values, so each read makes a copy
            self._note_read(function, True)
            return full_copy(self.base, self.rows)
        rows = [rows.values for rows in self.rows]
        now = (
            torch.is_grad_enabled(),
            [(id(one), one._version, one.requires_grad) for one in rows],
            self.base._version,
            self.base.data_ptr(),
        )
        if now != self.seen or not all(map(_equal, rows, self.values)):
            self.copies.clear()
            self.seen = now
            self.values = [one.detach().clone() for one in rows]
            self.grad = torch.is_grad_enabled()
        return super().full_table(function)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)


def materialized_weights(
    model: nn.Module, graph: EmbeddingGraph, live: Mapping[str, list[Rows]]
) -> list[MaterializedWeights]:
    """Return the covers of all tables that can have live rows.

    Args:
        model: The attached model.
        graph: Its graph.
        live: Table name -> its live rows.
    """
    tables = [graph.table(name) for name in live]
    return [
        MaterializedWeights(table, list(table_holders(model, table.names, table.transposed)), live[table.name])
        for table in tables
    ]


_ignore_reads: Callable[[Table, Any], None] = lambda *_: None  # noqa: E731

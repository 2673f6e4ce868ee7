"""Weights that have the live rows for code outside of every forward, while a with-block lasts.

A loop of one's own that gives ``model.lm_head.weight`` to a fused loss reads it where no hook comes by. What stands in
for the weight is as in ``standin.py``, but follows the rows: after an optimizer's step the next read has the new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from embedsurgery.errors import UnsupportedError
from embedsurgery.graph import EmbeddingGraph, Table
from embedsurgery.runtime.rows.full_copy import full_copy
from embedsurgery.runtime.rows.overlays import Holder, StandIns
from embedsurgery.runtime.rows.rows import Rows
from embedsurgery.runtime.rows.sites import held, holders
from embedsurgery.runtime.rows.stand_in import Source, StandIn, stand_in
from embedsurgery.runtime.rows.whole_tables import has_whole_tables
from embedsurgery.tensors.sharded import is_sharded


class Standing(StandIns):
    """What stands in for one table's weights from `lay` to `take_away`.

    Args:
        table: What it is for.
        holders: Every alias of it.
        live: The rows that are live for it.
    """

    def __init__(self, table: Table, holders: list[Holder], live: list[Rows]) -> None:
        super().__init__(table, holders, live, _say_nothing, ())

    def lay(self) -> None:
        """Lay it over the weights, if rows are live.

        Raises:
            UnsupportedError: A table in pieces, one whose rows are computed, or a batch that mixes adapters.
        """
        if not self.live:
            return
        parts = [*(rows.values for rows in self.live), *(held(m, n) for m, n, _ in self.holders)]
        found = (
            "a table in pieces"
            if any(is_sharded(part) or hasattr(part, "ds_id") for part in parts)
            else "a table that is changed as a whole"
            if has_whole_tables(self.live)
            else "a batch that mixes adapters"
            if any(rows.samples is not None for rows in self.live)
            else None
        )
        if found is not None:
            raise UnsupportedError(
                "a weight cannot be shown outside of the forwards",
                where=self.table.name,
                found=found,
                hint="read it in the forward of the model",
            )
        module, name, transposed = self.holders[0]
        base = held(module, name)
        source = _Following(self.table, base.t() if transposed else base, tuple(self.live), _say_nothing, self.bare)
        made: dict[int, StandIn] = {}
        with torch.enable_grad():
            for module, name, transposed in self.holders:
                weight = held(module, name)
                if id(weight) not in made:
                    made[id(weight)] = stand_in(weight, transposed, source)
                self._over(module, name, made[id(weight)])

    def __getstate__(self) -> dict[str, Any]:
        raise UnsupportedError(
            "a model cannot be copied while attachment.materialized() lasts",
            where=self.table.name,
            hint="copy it before",
        )


class _Following(Source):
    """A source that outlives steps of an optimizer, of which some write where no version counts it: ``.data``."""

    seen: Any = None
    values: list[torch.Tensor]

    def whole(self, function: Any) -> torch.Tensor:
        if torch.compiler.is_compiling():  # of compiled code each read makes its own, which asks for no values
            self._begin(function, True)
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
        return super().whole(function)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)


def standing(model: nn.Module, graph: EmbeddingGraph, live: Mapping[str, list[Rows]]) -> list[Standing]:
    """What stands in for each table that rows may be live for.

    Args:
        model: The attached model.
        graph: Of it.
        live: Table's name -> the rows that are live for it.
    """
    tables = [graph.table(name) for name in live]
    return [Standing(table, list(holders(model, table.names, table.transposed)), live[table.name]) for table in tables]


_say_nothing: Callable[[Table, Any], None] = lambda *_: None  # noqa: E731

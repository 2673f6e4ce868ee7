"""What a surgery on whole tables returns: how a table changes while it is live, and block by block when it is merged.

All of it is data, and nothing here imports torch. What runs it in a forward is ``runtime/whole_tables.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from embedsurgery.graph import Table
from embedsurgery.plan import Blocks, SetBlocks
from embedsurgery.surgeries.surgery import RowOverride
from embedsurgery.tensors.raw import RawArray

if TYPE_CHECKING:
    import torch

SAMPLE = 64
"""Rows of a table whose fingerprint stands for the whole: evidence of a base, not proof."""


class TableChange(ABC):
    """How all rows of a table become others. A frozen dataclass of a module's top level: it is copied and pickled."""

    @abstractmethod
    def rows(self, tensors: Sequence[torch.Tensor], indices: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
        """Some rows as they become.

        Args:
            tensors: The adapter's trainable tensors, in the order of the override.
            indices: Row numbers, int64 (n,); a row may stand there several times.
            current: These rows of the table, (n, D).

        Returns:
            (n, D), in any float dtype: it is rounded to the table's.
        """

    def logits(
        self, tensors: Sequence[torch.Tensor], hidden: torch.Tensor, logits: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """Logits as they become. By default by a full copy of the table; most changes have a cheaper way.

        Args:
            tensors: The adapter's trainable tensors.
            hidden: What the projection is given, (..., D).
            logits: What it gave, (..., V), its bias included.
            weight: The table, (V, D).
        """
        import torch

        new = self.rows(tensors, torch.arange(weight.shape[0], device=weight.device), weight).to(weight.dtype)
        return logits + torch.nn.functional.linear(hidden, new - weight)


@dataclass(frozen=True)
class TableOverride(RowOverride):
    """While the adapter is live, all rows of a table are others. Made by `table_overrides`, one for each tensor.

    Attributes:
        table: The table's name in the model's graph.
        tensor: The tensor's name in the adapter.
        indices: Rows whose fingerprint the adapter has; empty but in a table's last override.
        change: What is done with the tensors; None but in a table's last override.
        rows: V in a table's last override.
    """

    change: TableChange | None = None
    rows: int = 0


def table_overrides(
    table: Table, tensors: Sequence[str], sampled: tuple[int, ...], change: TableChange
) -> tuple[TableOverride, ...]:
    """The overrides of one whole table, to be returned from `Surgery.live`.

    Args:
        table: The table of the model.
        tensors: Names of the adapter's tensors that train, as `TableChange` gets them. One whose last axis is D
            has the name of the table's record, and is the last.
        sampled: The rows that the record's fingerprint is of.
        change: What is done with them.
    """
    *others, last = tensors
    parts = tuple(TableOverride(table.name, name, ()) for name in others)
    return (*parts, TableOverride(table.name, last, sampled, change, table.shape[0]))


def sampled_rows(table: Table) -> tuple[int, ...]:
    """Up to `SAMPLE` rows, spread evenly, for a record's fingerprint."""
    count = min(SAMPLE, table.shape[0])
    return tuple(number * table.shape[0] // count for number in range(count))


def set_table(table: Table, dtype: str, block: Callable[[int, int, RawArray], RawArray]) -> SetBlocks:
    """The edit that makes all rows others, in bounded memory.

    Args:
        table: The table of the store.
        dtype: Of what ``block`` returns.
        block: Called as ``block(start, stop, current)`` with the rows as they are; returns the new ones.
    """
    return SetBlocks(table.name, Blocks(table.shape, dtype, block))

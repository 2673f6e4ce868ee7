"""What a surgery on whole tables returns: how a table changes while live, and block by block when it is merged.

All of it is data, and nothing here imports torch until a change is live. ``runtime/rows/whole_tables.py`` applies it in
a forward.
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
"""Number of rows in the fingerprint of a whole table. They are evidence of a base, not proof."""


class TableChange(ABC):
    """How all rows of a table change. It is copied and pickled: make it a frozen dataclass at a module's top level."""

    @abstractmethod
    def rows(self, tensors: Sequence[torch.Tensor], indices: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
        """Return the changed values of some rows.

        Args:
            tensors: The adapter's trainable tensors, in the order of the override.
            indices: Row numbers, int64 (n,), with repeats.
            current: These rows of the table, (n, D).

        Returns:
            (n, D), in any float dtype; it is rounded to the table's.
        """

    def logits(
        self, tensors: Sequence[torch.Tensor], hidden: torch.Tensor, logits: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """Return the changed logits. The default makes a full copy of the table; most changes have a cheaper way.

        Args:
            tensors: The adapter's trainable tensors.
            hidden: The projection's input, (..., D).
            logits: Its output, (..., V), its bias included.
            weight: The table, (V, D).

        Returns:
            (..., V)
        """
        import torch  # kept out of merging on disk

        new = self.rows(tensors, torch.arange(weight.shape[0], device=weight.device), weight).to(weight.dtype)
        return logits + torch.nn.functional.linear(hidden, new - weight)


@dataclass(frozen=True)
class TableOverride(RowOverride):
    """While the adapter is live, all rows of a table change. `table_overrides` makes one for each tensor.

    Attributes:
        table: The table's name in the model's graph.
        tensor: The tensor's name in the adapter.
        indices: The rows of the adapter's fingerprint in a table's last override; empty in the others.
        change: The change in a table's last override; None in the others.
        rows: V in a table's last override; 0 in the others.
    """

    change: TableChange | None = None
    rows: int = 0


def table_overrides(
    table: Table, tensors: Sequence[str], sampled: tuple[int, ...], change: TableChange
) -> tuple[TableOverride, ...]:
    """Return the overrides of one whole table, for `Surgery.live`.

    Args:
        table: The table of the model.
        tensors: Names of the adapter's trained tensors, in the order in which `TableChange` gets them. The last has the
            name of the table's record, and D as its last axis.
        sampled: The rows of the record's fingerprint.
        change: The change.
    """
    *others, last = tensors
    parts = tuple(TableOverride(table.name, name, ()) for name in others)
    return (*parts, TableOverride(table.name, last, sampled, change, table.shape[0]))


def sampled_rows(table: Table) -> tuple[int, ...]:
    """Return up to `SAMPLE` evenly spread rows, for a record's fingerprint."""
    count = min(SAMPLE, table.shape[0])
    return tuple(number * table.shape[0] // count for number in range(count))


def set_table(table: Table, dtype: str, block: Callable[[int, int, RawArray], RawArray]) -> SetBlocks:
    """Return the edit that changes all rows of a table, in bounded memory.

    Args:
        table: The table of the store.
        dtype: Dtype of what ``block`` returns.
        block: Called as ``block(start, stop, current)`` with the current rows; returns the new ones.
    """
    return SetBlocks(table.name, Blocks(table.shape, dtype, block))

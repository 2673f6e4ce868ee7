"""Edits that set values: some or all rows of a table, or entries of a per-token vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from embedsurgery.errors import PlanError
from embedsurgery.files.safetensors import TensorSource
from embedsurgery.graph import EmbeddingGraph
from embedsurgery.plan.blocks import BlockFunction, Blocks
from embedsurgery.plan.edit import Edit, Footprint, Rows, Sizes, StoreFiles, Values, find_positions, format_row_count
from embedsurgery.plan.serial import integers_source
from embedsurgery.tensors.raw import ITEMSIZE, RawArray

if TYPE_CHECKING:
    from embedsurgery.plan.serial import PlanFile


@dataclass(frozen=True)
class SetRows(Edit):
    """Set some rows of a table.

    Attributes:
        table: The table's name in the store's graph.
        indices: Row numbers, (K,), each once.
        rows: The new rows, (K, D), in any editable dtype; rounded once to the table's dtype.
    """

    rearranges: ClassVar[bool] = False

    table: str
    indices: tuple[int, ...]
    rows: RawArray

    def describe(self) -> str:
        return f"set {format_row_count(len(self.indices))} of {self.table}"

    def sets(self) -> Rows:
        return {self.table: self.indices}

    def footprint(self, store: StoreFiles) -> Footprint:
        return Footprint(store.row_ranges(self.table, self.indices))

    def kept_bytes(self, graph: EmbeddingGraph) -> int:
        table = graph.find(self.table)
        return 0 if table is None else len(self.indices) * table.shape[1] * ITEMSIZE[table.dtype]

    def arrays(self) -> Mapping[str, RawArray]:
        return {self.table: self.rows}

    def values(self, sizes: Sizes) -> list[Values]:
        return [Values(self.table, self.indices, self.rows)]

    def with_values(self, new: Mapping[str, RawArray]) -> SetRows:
        return replace(self, rows=new[self.table])

    def with_tables(self, names: Mapping[str, str]) -> SetRows | None:
        return replace(self, table=names[self.table]) if self.table in names else None

    def restrict(self, wanted: Callable[[str, int], bool]) -> SetRows | None:
        places = find_positions(self.indices, self.table, wanted)
        if len(places) == len(self.indices):
            return self
        indices = tuple(self.indices[n] for n in places)
        return SetRows(self.table, indices, self.rows.take(places)) if places else None

    def encode(self, prefix: str, tensors: dict[str, TensorSource]) -> dict[str, Any]:
        tensors[prefix + "indices"] = integers_source(self.indices)
        tensors[prefix + "rows"] = TensorSource.of(self.rows)
        return {"table": self.table}

    @classmethod
    def decode(cls, body: Mapping[str, Any], prefix: str, file: PlanFile) -> SetRows:
        return cls(str(body["table"]), file.integers(prefix + "indices"), file.tensor(prefix + "rows"))


@dataclass(frozen=True)
class SetEntries(Edit):
    """Set some entries of a per-token vector, such as a head's bias.

    Attributes:
        vector: The vector's name in the store's graph.
        indices: Token ids, (K,), each once.
        entries: The new entries, (K,), in any editable dtype; rounded once to the vector's dtype.
    """

    rearranges: ClassVar[bool] = False

    vector: str
    indices: tuple[int, ...]
    entries: RawArray

    def describe(self) -> str:
        count = len(self.indices)
        return f"set {count:,} {'entry' if count == 1 else 'entries'} of {self.vector}"

    def sets(self) -> Rows:
        return {self.vector: self.indices}

    def footprint(self, store: StoreFiles) -> Footprint:
        return Footprint(store.entry_ranges(self.vector, self.indices))

    def arrays(self) -> Mapping[str, RawArray]:
        return {self.vector: self.entries}

    def values(self, sizes: Sizes) -> list[Values]:
        return [Values(self.vector, self.indices, self.entries)]

    def with_values(self, new: Mapping[str, RawArray]) -> SetEntries:
        return replace(self, entries=new[self.vector])

    def restrict(self, wanted: Callable[[str, int], bool]) -> SetEntries | None:
        places = find_positions(self.indices, self.vector, wanted)
        if len(places) == len(self.indices):
            return self
        indices = tuple(self.indices[n] for n in places)
        return SetEntries(self.vector, indices, self.entries.take(places)) if places else None

    def encode(self, prefix: str, tensors: dict[str, TensorSource]) -> dict[str, Any]:
        tensors[prefix + "indices"] = integers_source(self.indices)
        tensors[prefix + "entries"] = TensorSource.of(self.entries)
        return {"vector": self.vector}

    @classmethod
    def decode(cls, body: Mapping[str, Any], prefix: str, file: PlanFile) -> SetEntries:
        return cls(str(body["vector"]), file.integers(prefix + "indices"), file.tensor(prefix + "entries"))


@dataclass(frozen=True)
class SetBlocks(Edit):
    """Set all rows of a table, block by block in bounded memory. Its undo is saved in a file.

    Attributes:
        table: The table's name in the store's graph.
        blocks: The new rows.
    """

    rearranges: ClassVar[bool] = False

    table: str
    blocks: Blocks

    def describe(self) -> str:
        return f"set all {format_row_count(self.blocks.shape[0])} of {self.table}, block by block"

    def sets(self) -> Rows:
        return {self.table: None}

    def footprint(self, store: StoreFiles) -> Footprint:
        return Footprint(store.row_ranges(self.table, None))

    def kept_bytes(self, graph: EmbeddingGraph) -> int:
        table = graph.find(self.table)
        return 0 if table is None else table.shape[0] * table.shape[1] * ITEMSIZE[table.dtype]

    def whole_table(self) -> tuple[str, Blocks]:
        return self.table, self.blocks

    def with_blocks(self, wrap: Callable[[BlockFunction], BlockFunction], *, stored: bool) -> SetBlocks:
        blocks = self.blocks
        return SetBlocks(self.table, replace(blocks, block=wrap(blocks.block), stored=blocks.stored and stored))

    def with_tables(self, names: Mapping[str, str]) -> SetBlocks | None:
        return replace(self, table=names[self.table]) if self.table in names else None

    def encode(self, prefix: str, tensors: dict[str, TensorSource]) -> dict[str, Any]:
        blocks = self.blocks
        if not blocks.stored:
            raise PlanError(
                "cannot save blocks that are computed from the current rows",
                where=self.table,
                hint="apply the plan and save its undo",
            )
        chunks = (blocks.read_rows(start, stop).data for start, stop in blocks.spans())
        tensors[prefix + "blocks"] = TensorSource(blocks.dtype, blocks.shape, chunks)
        return {"table": self.table}

    @classmethod
    def decode(cls, body: Mapping[str, Any], prefix: str, file: PlanFile) -> SetBlocks:
        return cls(str(body["table"]), Blocks.in_file(file.path, file.entries[prefix + "blocks"]))

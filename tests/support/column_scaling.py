"""A surgery that scales the columns of a whole table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import torch

import embedsurgery as es
from embedsurgery.adapters.adapter import Adapter, PeftFiles
from embedsurgery.adapters.manifest import Fingerprint, Manifest, TableRecord
from embedsurgery.graph import Table
from embedsurgery.plan import Plan
from embedsurgery.stores.store import Store, rows_of
from embedsurgery.surgeries.surgery import Base, RowOverride, Surgery, SurgeryRecord
from embedsurgery.surgeries.whole_tables import TableChange, sampled_rows, set_table, table_overrides
from embedsurgery.tensors.raw import RawArray


@dataclass(frozen=True)
class ColumnsConfig:
    """The config of `ColumnScaling`."""


@dataclass(frozen=True)
class Columns(TableChange):
    """``current * (1 + factors) + shift``. It does not override `TableChange.logits`."""

    def rows(self, tensors: Sequence[torch.Tensor], indices: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
        shift, factors = tensors
        return current * (1 + factors) + shift


class ColumnScaling(Surgery):
    """Each column of the input table is scaled and shifted."""

    name = "column_scaling"

    def start(self, config: Any, store: Store, base: Base) -> Adapter:
        table = store.graph.main_input()
        wide = "F64" if table.dtype == "F64" else "F32"
        zeros = RawArray.of(np.zeros((1, table.shape[1]))).to(wide)
        sampled = sampled_rows(table)
        record = TableRecord(
            table.name,
            table.aliases,
            sampled,
            table.shape,
            table.dtype,
            "output" in table.roles,
            Fingerprint.of(rows_of(store, table, sampled)),
        )
        raw = {table.name: zeros, f"{table.name}.shift": zeros}
        return Adapter(Manifest(self.name, 1, {}, (record,)), raw, self)

    def live(self, adapter: Adapter, located: Mapping[str, Table]) -> tuple[RowOverride, ...]:
        (record,) = adapter.manifest.tables
        return table_overrides(located[record.name], (f"{record.name}.shift", record.name), record.indices, Columns())

    def plan(self, adapter: Adapter, located: Mapping[str, Table]) -> Plan:
        (record,) = adapter.manifest.tables
        table = located[record.name]
        wide = "F64" if table.dtype == "F64" else "F32"
        shift, factors = (adapter.raw[name].to(wide).bits for name in (f"{record.name}.shift", record.name))

        def block(start: int, stop: int, current: RawArray) -> RawArray:
            return RawArray.of(current.to(wide).bits * (1 + factors) + shift)

        return Plan((set_table(table, wide, block),))

    def to_peft(self, adapter: Adapter) -> PeftFiles:
        return PeftFiles({"peft_type": "COLUMNS"}, dict(adapter.raw))

    def from_peft(self, files: PeftFiles) -> Adapter:
        raise NotImplementedError

    def from_files(self, files: PeftFiles, adapter: Adapter) -> Adapter:
        return replace(adapter, raw=dict(files.tensors))


plugin = ModuleType("a_plugin_of_whole_tables")


plugin.embedsurgery_surgeries = es.hookimpl(  # type: ignore[attr-defined]
    lambda: [SurgeryRecord("column_scaling", ColumnsConfig, ColumnScaling(), "COLUMNS")]
)

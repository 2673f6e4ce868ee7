"""LoRA on whole tables: the update is ``scaling * left @ right``; a forward computes only the rows that it reads.

A table (V, D) has two matrices in the adapter: ``right`` (r, D) under the table record's name, and ``left`` (V, r)
under that name with `LEFT`. For an embedding these are the transposes of PEFT's ``lora_embedding_B`` and
``lora_embedding_A``; for a head they are ``lora_A`` and ``lora_B``. An adapter can have trained token rows of other
tables too (PEFT's ``trainable_token_indices``). ``files.py`` and ``reading.py`` write and read PEFT's files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from embedsurgery import __version__
from embedsurgery.adapters.adapter import Adapter, PeftFiles
from embedsurgery.adapters.manifest import Fingerprint, Manifest, TableRecord
from embedsurgery.errors import BaseMismatchError, UnsupportedError, warn
from embedsurgery.graph import Table
from embedsurgery.plan import Edit, Plan, SetBlocks, SetRows
from embedsurgery.stores.store import Store, rows_of
from embedsurgery.surgeries.surgery import Base, RowOverride, Surgery
from embedsurgery.surgeries.whole_tables import TableChange, sampled_rows, set_table, table_overrides
from embedsurgery.tensors.raw import RawArray
from embedsurgery_lora.config import LoraTablesConfig, scaling
from embedsurgery_lora.files import LEFT, TOKENS, from_files, kind_of, to_peft
from embedsurgery_lora.reading import from_peft

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LowRank(TableChange):
    """``current + scaling * left @ right``, for one pair of matrices or, on a tied table, several.

    Attributes:
        scalings: The factor of each pair.
    """

    scalings: tuple[float, ...]

    def rows(self, tensors: Sequence[torch.Tensor], indices: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
        for factor, left, right in zip(self.scalings, tensors[::2], tensors[1::2], strict=True):
            current = current + factor * (left[indices] @ right)
        return current

    def logits(
        self, tensors: Sequence[torch.Tensor], hidden: torch.Tensor, logits: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        for factor, left, right in zip(self.scalings, tensors[::2], tensors[1::2], strict=True):
            logits = logits + factor * (hidden.to(right.dtype) @ right.t() @ left.t())
        return logits


class Lora(Surgery):
    """A low-rank update of whole tables, at every site of a table: on a tied table, at the head too."""

    name = "lora"

    def start(self, config: LoraTablesConfig, store: Store, base: Base) -> Adapter:
        """Start without a change, as PEFT does: ``left`` is zero, ``right`` is random.

        Raises:
            TableError: No table fits ``target_modules``.
            UnsupportedError: A table is quantised or sharded.
        """
        graph = store.graph
        tables = (graph.main_input(),) if config.target_modules is None else graph.select(config.target_modules)
        records, raw, kinds = [], {}, {}
        for number, table in enumerate(tables):
            store.check_editable(table)
            dtype = "F64" if table.dtype == "F64" else "F32"
            stream = np.random.default_rng([config.seed, number])
            right = stream.standard_normal((config.r, table.shape[1])) / np.sqrt(table.shape[1])
            raw[table.name] = RawArray.of(right).to(dtype)
            raw[table.name + LEFT] = RawArray.of(np.zeros((table.shape[0], config.r))).to(dtype)
            kinds[table.name] = {
                "kind": kind_of(table),
                "scaling": scaling(config.lora_alpha, config.r, rslora=config.use_rslora),
            }
            sampled = sampled_rows(table)
            heads = [t for t in graph.tables if "output" in t.roles and t.shape[0] == table.shape[0]]
            records.append(
                TableRecord(
                    name=table.name,
                    aliases=table.aliases,
                    indices=sampled,
                    shape=table.shape,
                    dtype=table.dtype,
                    tied="output" in table.roles if heads and "input" in table.roles else None,
                    fingerprint=Fingerprint.of(rows_of(store, table, sampled)),
                )
            )
        settings = {**config.to_json(), "tables": kinds}
        manifest = Manifest(
            self.name, self.version, settings, tuple(records), base.name, base.revision, library_version=__version__
        )
        return Adapter(manifest, raw, self)

    def live(self, adapter: Adapter, located: Mapping[str, Table]) -> tuple[RowOverride, ...]:
        """Override whole tables, and rows of the tables with trained tokens."""
        overrides: list[RowOverride] = []
        for table, records in _group_by_table(adapter, located):
            names = [record.name for record in records]
            if _settings_of(adapter, records[0])["kind"] == TOKENS:
                overrides.append(RowOverride(table.name, names[0], records[0].indices))
                continue
            change = LowRank(tuple(float(_settings_of(adapter, record)["scaling"]) for record in records))
            tensors = [tensor for name in names for tensor in (name + LEFT, name)]
            overrides += table_overrides(table, tensors, records[-1].indices, change)
        return tuple(overrides)

    def plan(self, adapter: Adapter, located: Mapping[str, Table]) -> Plan:
        """Set whole tables block by block, in fp32 (fp64 for an fp64 table) and rounded once; and token rows."""
        edits: list[Edit] = []
        for table, records in _group_by_table(adapter, located):
            if _settings_of(adapter, records[0])["kind"] == TOKENS:
                edits.append(SetRows(table.name, records[0].indices, adapter.raw[records[0].name]))
                continue
            pairs = [
                (adapter.raw[r.name + LEFT], adapter.raw[r.name], float(_settings_of(adapter, r)["scaling"]))
                for r in records
            ]
            edits.append(_plan_table(table, pairs))
        return Plan(tuple(edits))

    def to_peft(self, adapter: Adapter) -> PeftFiles:
        return to_peft(adapter)

    def from_files(self, files: PeftFiles, adapter: Adapter) -> Adapter:
        return from_files(files, adapter)

    def from_peft(self, files: PeftFiles) -> Adapter:
        return from_peft(files, self)


def _settings_of(adapter: Adapter, record: TableRecord) -> Mapping[str, Any]:
    settings: Mapping[str, Any] = adapter.manifest.config["tables"][record.name]
    return settings


def _group_by_table(adapter: Adapter, located: Mapping[str, Table]) -> list[tuple[Table, list[TableRecord]]]:
    """Group records by table. Updates of both ends of a tie are added, as PEFT's merge adds them.

    Args:
        adapter: The adapter.
        located: Table record's name -> table.

    Raises:
        BaseMismatchError: A table has another shape.
        UnsupportedError: A table has token rows beside another update, or is replaced at one end of a tie.
    """
    left = adapter.manifest.config.get("left") or ()
    groups: dict[str, tuple[Table, list[TableRecord]]] = {}
    for record in adapter.manifest.tables:
        table = located[record.name]
        groups.setdefault(table.name, (table, []))[1].append(record)
    for table, records in groups.values():
        kinds = {_settings_of(adapter, record)["kind"] == TOKENS for record in records}
        if True in kinds and len(records) > 1:
            raise UnsupportedError(
                "token rows and another update of one table",
                where=table.name,
                expected="tables apart",
                found=", ".join(r.name for r in records),
                hint="merge it with PEFT, and use embedsurgery extract on the result",
            )
        copies = [module for module in left if f"{module}.weight" in table.names]
        if copies:
            raise UnsupportedError(
                "the adapter replaces one end of a tied table and updates the other",
                where=table.name,
                found=f"modules_to_save: {', '.join(copies)}",
                hint="merge it with PEFT",
            )
        if adapter.manifest.library_version is None and True not in kinds:
            _warn_split_updates(adapter, table, records)
        for record in records:
            if True not in kinds and record.shape is not None and record.shape != table.shape:
                raise BaseMismatchError(
                    "the table has another shape than the adapter's update",
                    where=table.name,
                    expected=list(record.shape),
                    found=list(table.shape),
                    hint="use the base that the adapter was trained on",
                )
    return list(groups.values())


def _warn_split_updates(adapter: Adapter, table: Table, records: Sequence[TableRecord]) -> None:
    """Warn that updates that PEFT trained at one end of a tied table apply to both ends."""
    if {"input", "output"} <= set(table.roles) and not any(
        _settings_of(adapter, record).get("twins") for record in records
    ):
        each = dict.fromkeys(f"{record.name} ({_settings_of(adapter, record)['kind']})" for record in records)
        warn(
            f"{table.name} is tied, and PEFT trained {' and '.join(each)} at one end: the update applies to both ends, "
            "as when PEFT merges it",
            plugin=__file__,
        )


def _plan_table(table: Table, pairs: Sequence[tuple[RawArray, RawArray, float]]) -> SetBlocks:
    name = "F64" if table.dtype == "F64" else "F32"
    dtype: Any = np.float64 if name == "F64" else np.float32
    matrices: list[tuple[Any, Any]] = []
    for left, right, factor in pairs:
        scaled: Any = right.to(name).bits
        matrices.append((left.to(name).bits, (scaled * dtype(factor)).astype(dtype)))

    def block(start: int, stop: int, current: RawArray) -> RawArray:
        rows: Any = current.to(name).bits
        for down, up in matrices:
            rows = rows + down[start:stop] @ up
        return RawArray.of(np.ascontiguousarray(rows, dtype=dtype))

    return set_table(table, name, block)

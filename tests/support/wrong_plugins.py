"""Surgeries, initialisers and stores with one fault each, and the tests of the kit that must catch it.

Each class is a contract as a plugin's author writes it. ``caught`` maps the names of the tests that must fail to a text
in their output. ``tests/plugins/test_kit_catches.py`` runs them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch

import embedsurgery as es
from embedsurgery.adapters.adapter import Adapter, PeftFiles
from embedsurgery.graph import Table
from embedsurgery.graph.architectures import ARCHITECTURES, Layout
from embedsurgery.initializers import Initializer, InitializerRecord, NewToken, TableView
from embedsurgery.plan import PatchFile, Plan, SetRows, Untie
from embedsurgery.plugins.hookspecs import StoreRecord
from embedsurgery.stores.store import Store, rows_of
from embedsurgery.surgeries.surgery import BakeContext, Base, RowOverride, Surgery, SurgeryRecord
from embedsurgery.surgeries.trainable_tokens.surgery import TrainableTokens
from embedsurgery.tensors.raw import RawArray
from embedsurgery.testing import InitializerContract, StoreContract, SurgeryContract
from embedsurgery.testing.models import INPUT, OUTPUT
from tests.support.column_scaling import Columns, ColumnScaling, ColumnsConfig
from tests.support.npy_files import write
from tests.support.npy_store import NpyStore

# -- surgeries -------------------------------------------------------------------------------------------------------


def plugin_with(hook: str, record: Any) -> ModuleType:
    """Return a plugin that brings one record."""
    module = ModuleType("a_wrong_plugin")
    setattr(module, f"embedsurgery_{hook}", es.hookimpl(lambda: [record]))
    return module


@dataclass(frozen=True)
class RowsConfig(es.TrainableTokensConfig):
    """The config of the faulty surgeries on rows."""


class Rows(TrainableTokens):
    """A surgery without a fault."""

    name = "rows"


class WrongSurgery(SurgeryContract):
    """A contract of a surgery with one fault."""

    surgery: ClassVar[type[Surgery]]
    caught: ClassVar[dict[str, str]]
    dtypes = ("F32",)
    ties = (True,)
    config = RowsConfig([3, 17, 5])

    def __init_subclass__(cls) -> None:
        cls.plugin = plugin_with("surgeries", SurgeryRecord("rows", RowsConfig, cls.surgery(), "ROWS"))


class WrongStart(WrongSurgery):
    caught: ClassVar = {"test_fresh_adapter_is_a_no_op": "Tensor-likes are not close"}

    class surgery(Rows):
        def start(self, config: Any, store: Store, base: Base) -> Adapter:
            adapter = super().start(config, store, base)
            return replace(adapter, raw={n: RawArray.of(r.bits + np.float32(1)) for n, r in adapter.raw.items()})


class WrongStartsAsBase(WrongSurgery):
    caught: ClassVar = {"test_fresh_adapter_is_a_no_op": "starts_as_base is False"}
    starts_as_base = False
    surgery = Rows


class WrongPlan(WrongSurgery):
    caught: ClassVar = {
        "test_attached_equals_merged": "Tensor-likes are not close",
        "test_gradients_match_the_merged_model": "assert",
    }

    class surgery(Rows):
        def plan(self, adapter: Adapter, located: Mapping[str, Table]) -> Plan:
            (edit,) = super().plan(adapter, located).edits
            assert isinstance(edit, SetRows)
            return Plan((replace(edit, rows=RawArray.of(edit.rows.bits * np.float32(1.5))),))


class WrongOneWayToMerge(WrongSurgery):
    """`merge` and the attachment's own merge differ in the last bit."""

    caught: ClassVar = {"test_attached_equals_merged": "state_bits"}

    class surgery(Rows):
        def bake(self, adapter: Adapter, context: BakeContext) -> Plan:
            (edit,) = self.plan(adapter, context.located).edits
            assert isinstance(edit, SetRows)
            return Plan((replace(edit, rows=RawArray.of(np.nextafter(edit.rows.bits, np.float32(9)))),))


class WrongNothingLive(WrongSurgery):
    caught: ClassVar = {"test_attached_equals_merged": "allclose"}

    class surgery(Rows):
        def live(self, adapter: Adapter, located: Mapping[str, Table]) -> tuple[RowOverride, ...]:
            return ()


class WrongOnDisk(WrongSurgery):
    caught: ClassVar = {"test_merged_on_disk_equals_merged_in_memory": "found"}

    class surgery(Rows):
        def plan(self, adapter: Adapter, located: Mapping[str, Table]) -> Plan:
            plan = super().plan(adapter, located)
            (edit,) = plan.edits
            assert isinstance(edit, SetRows)
            zeros = RawArray.of(edit.rows.bits * np.float32(0))
            return Plan((replace(edit, rows=zeros),)) if located[INPUT].files else plan


class WrongFile(WrongSurgery):
    caught: ClassVar = {"test_merged_on_disk_equals_merged_in_memory": "notes.txt"}

    class surgery(Rows):
        def bake(self, adapter: Adapter, context: BakeContext) -> Plan:
            plan = self.plan(adapter, context.located)
            note = PatchFile.change("notes.txt", None, b"a note")
            return Plan((*plan.edits, note)) if context.located[INPUT].files else plan


class WrongUndo(WrongSurgery):
    """It writes to the store directly, so that the undo lacks a row."""

    caught: ClassVar = {"test_undo_is_exact": "state_bits"}

    class surgery(Rows):
        def bake(self, adapter: Adapter, context: BakeContext) -> Plan:
            table = context.located[INPUT]
            rows = rows_of(context.store, table, (0,))
            context.store.write_rows(context.store.copies(table)[0], (0,), RawArray.of(rows.bits + np.float32(1)))
            return self.plan(adapter, context.located)


class WrongTie(WrongSurgery):
    caught: ClassVar = {"test_merge_keeps_ties": "shared_memory"}

    class surgery(Rows):
        def bake(self, adapter: Adapter, context: BakeContext) -> Plan:
            row = rows_of(context.store, context.located[INPUT], (0,))
            return Plan((*self.plan(adapter, context.located).edits, Untie(INPUT, OUTPUT, (0,), row)))


class WrongKeepsTies(WrongSurgery):
    caught: ClassVar = {"test_merge_keeps_ties": "keeps_ties is False"}
    keeps_ties = False
    surgery = Rows


class WrongSaving(WrongSurgery):
    """Its files have lower precision than its tensors."""

    caught: ClassVar = {
        "test_save_and_load": "raw",
        "test_loaded_adapter_can_be_trained": "bits",
        "test_hub_round_trip": "raw",
    }

    class surgery(Rows):
        def to_peft(self, adapter: Adapter) -> PeftFiles:
            files = super().to_peft(adapter)
            return replace(files, tensors={name: raw.to("BF16") for name, raw in files.tensors.items()})


class WrongFingerprint(WrongSurgery):
    caught: ClassVar = {"test_other_base_is_refused": ""}

    class surgery(Rows):
        def start(self, config: Any, store: Store, base: Base) -> Adapter:
            adapter = super().start(config, store, base)
            tables = tuple(replace(record, fingerprint=None) for record in adapter.manifest.tables)
            return replace(adapter, manifest=replace(adapter.manifest, tables=tables))


class WrongTables(SurgeryContract):
    """A contract of a surgery on whole tables with one fault in its `TableChange`."""

    wrong: ClassVar[Columns]
    caught: ClassVar[dict[str, str]]
    dtypes = ("F32",)
    ties = (True,)
    config = ColumnsConfig()

    def __init_subclass__(cls) -> None:
        class Faulty(ColumnScaling):
            def live(self, adapter: Adapter, located: Mapping[str, Table]) -> tuple[RowOverride, ...]:
                *others, last = super().live(adapter, located)
                return (*others, replace(last, change=cls.wrong))  # type: ignore[call-arg]

        record = SurgeryRecord("column_scaling", ColumnsConfig, Faulty(), "COLUMNS")
        cls.plugin = plugin_with("surgeries", record)


@dataclass(frozen=True)
class NoGradient(Columns):
    def rows(self, tensors: Sequence[torch.Tensor], indices: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
        return super().rows([tensors[0], tensors[1].detach()], indices, current)


class WrongNoGradient(WrongTables):
    caught: ClassVar = {
        "test_gradients_match_the_merged_model": "is not None",
        "test_loaded_adapter_can_be_trained": "grad is not None",
    }
    wrong = NoGradient()


@dataclass(frozen=True)
class NegatedGradient(Columns):
    def rows(self, tensors: Sequence[torch.Tensor], indices: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
        return super().rows([2 * tensor.detach() - tensor for tensor in tensors], indices, current)


class WrongGradient(WrongTables):
    caught: ClassVar = {
        "test_gradients_match_the_merged_model": "approx",
        "test_training_lowers_the_loss_and_keeps_the_base": "losses",
    }
    wrong = NegatedGradient()


@dataclass(frozen=True)
class WritingIntoWeight(Columns):
    def logits(self, tensors: Any, hidden: Any, logits: Any, weight: torch.Tensor) -> torch.Tensor:
        changed = super().logits(tensors, hidden, logits, weight)
        weight.data[0].zero_()
        return changed


class WrongForward(WrongTables):
    """Its forward writes into the base."""

    caught: ClassVar = {
        "test_training_lowers_the_loss_and_keeps_the_base": "state_bits",
        "test_fresh_adapter_is_a_no_op": "state_bits",
    }
    wrong = WritingIntoWeight()


_FIRST_TENSORS: list[torch.Tensor] = []


@dataclass(frozen=True)
class SharedAcrossCopies(Columns):
    def rows(self, tensors: Sequence[torch.Tensor], indices: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
        _FIRST_TENSORS[:] = _FIRST_TENSORS or [tensor.detach().clone() for tensor in tensors]
        return super().rows(_FIRST_TENSORS, indices, current)


class WrongCopy(WrongTables):
    """All copies use the tensors of the first."""

    caught: ClassVar = {"test_deepcopy_is_independent": "bits"}
    wrong = SharedAcrossCopies()


# -- initialisers ----------------------------------------------------------------------------------------------------


class WrongInitializer(InitializerContract):
    """A contract of an initialiser with one fault."""

    init = "wrong"
    initializer: ClassVar[type[Initializer]]
    caught: ClassVar[dict[str, str]]

    def __init_subclass__(cls) -> None:
        cls.plugin = plugin_with("initializers", InitializerRecord("wrong", cls.initializer()))


def mean(view: TableView, tokens: Sequence[NewToken]) -> Any:
    """Rows without a fault: the mean of the known rows."""
    return np.tile(view.rows(range(view.known)).astype(np.float64).mean(axis=0), (len(tokens), 1))


class WrongNumbers(WrongInitializer):
    caught: ClassVar = {"test_rows_are_finite_float32": "NaN"}

    class initializer(Initializer):
        """NaN."""

        def rows(self, view: TableView, tokens: Any, argument: Any, streams: Any) -> Any:
            return mean(view, tokens) * np.nan


class WrongShape(WrongInitializer):
    caught: ClassVar = {"test_rows_are_finite_float32": "(3, 8)"}

    class initializer(Initializer):
        """One row for all tokens."""

        def rows(self, view: TableView, tokens: Any, argument: Any, streams: Any) -> Any:
            return mean(view, tokens)[:1]


class WrongDraws(WrongInitializer):
    """It draws random numbers that no seed controls."""

    caught: ClassVar = {"test_rows_depend_on_seed_only_if_drawn": "assert"}

    class initializer(Initializer):
        """Random."""

        def rows(self, view: TableView, tokens: Any, argument: Any, streams: Any) -> Any:
            return mean(view, tokens) * np.random.default_rng().standard_normal()


class WrongDrawsAttribute(WrongInitializer):
    caught: ClassVar = {"test_rows_depend_on_seed_only_if_drawn": "assert"}
    draws = True

    class initializer(Initializer):
        """The mean."""

        def rows(self, view: TableView, tokens: Any, argument: Any, streams: Any) -> Any:
            return mean(view, tokens)


class WrongNeighbours(WrongInitializer):
    caught: ClassVar = {"test_each_row_is_independent_of_other_tokens": "Not equal"}

    class initializer(Initializer):
        """The mean, divided by the number of tokens."""

        def rows(self, view: TableView, tokens: Any, argument: Any, streams: Any) -> Any:
            return mean(view, tokens) / len(tokens)


class WrongSpareRows(WrongInitializer):
    caught: ClassVar = {"test_spare_rows_are_ignored": "assert"}

    class initializer(Initializer):
        """The mean of all rows, spare ones included."""

        def rows(self, view: TableView, tokens: Any, argument: Any, streams: Any) -> Any:
            return np.tile(view.rows(range(view.shape[0])).mean(axis=0), (len(tokens), 1))


class WrongTakesSpareRows(WrongInitializer):
    caught: ClassVar = {"test_spare_rows_are_ignored": "assert"}
    takes_spare_rows = True

    class initializer(Initializer):
        """The mean."""

        def rows(self, view: TableView, tokens: Any, argument: Any, streams: Any) -> Any:
            return mean(view, tokens)


class WrongState(WrongInitializer):
    """Each call returns other rows."""

    caught: ClassVar = {"test_same_rows_in_model_and_state_dict": "assert"}

    class initializer(Initializer):
        """The mean plus a counter."""

        calls = itertools.count()

        def rows(self, view: TableView, tokens: Any, argument: Any, streams: Any) -> Any:
            return mean(view, tokens) + next(self.calls)


class WrongSpace(WrongInitializer):
    caught: ClassVar = {"test_head_rows_come_from_the_head": "assert"}

    class initializer(Initializer):
        """Ones."""

        def rows(self, view: TableView, tokens: Any, argument: Any, streams: Any) -> Any:
            return np.ones((len(tokens), view.shape[1]))


class WrongSize(WrongInitializer):
    """Its rows overflow fp16."""

    caught: ClassVar = {"test_add_tokens_checkpoint_writes_these_rows": ""}

    class initializer(Initializer):
        """The mean times 1e8."""

        def rows(self, view: TableView, tokens: Any, argument: Any, streams: Any) -> Any:
            return mean(view, tokens) * 1e8


# -- stores ----------------------------------------------------------------------------------------------------------


class WrongStore(StoreContract):
    """A contract of a store with one fault."""

    store: ClassVar[type[NpyStore]]
    caught: ClassVar[dict[str, str]]
    dtypes = ("F32",)

    def make(self, folder: Path, tensors: Mapping[str, torch.Tensor], *, tied: bool) -> Any:
        write(folder, {name: value for name, value in tensors.items() if name != OUTPUT or not tied}, tied=tied)
        return folder

    def open(self, home: Any) -> Store:
        return self.store(home)

    def read(self, home: Any) -> dict[str, torch.Tensor]:
        names = json.loads((home / "tensors.json").read_text())
        return {name: torch.from_numpy(np.load(home / f"{name}.npy")) for name in names}


class WrongTies(WrongStore):
    caught: ClassVar = {"test_graph_has_the_tables": "", "test_plan_can_name_the_head": ""}

    class store(NpyStore):
        def __init__(self, directory: Path, architectures: Mapping[str, Layout] = ARCHITECTURES) -> None:
            super().__init__(directory, architectures)
            tables = tuple(replace(table, aliases=()) for table in self.graph.tables)
            self.graph = replace(self.graph, tables=tables)


class WrongOrder(WrongStore):
    caught: ClassVar = {"test_rows_are_read_in_the_given_order": "bits"}

    class store(NpyStore):
        def read_rows(self, name: str, indices: tuple[int, ...]) -> RawArray:
            return super().read_rows(name, tuple(sorted(indices)))


class WrongNeighbour(WrongStore):
    """It writes one row too many."""

    caught: ClassVar = {"test_set_rows_rounds_once_and_is_undone": ""}

    class store(NpyStore):
        def write_rows(self, name: str, indices: tuple[int, ...], rows: RawArray) -> None:
            super().write_rows(name, indices, rows)
            super().write_rows(name, (max(indices) + 1,), rows.take([0]))


class WrongBlock(WrongStore):
    caught: ClassVar = {"test_set_blocks_is_undone": ""}

    class store(NpyStore):
        def write_block(self, name: str, start: int, rows: RawArray) -> None:
            super().write_block(name, 0, rows)


class WrongCache(WrongStore):
    """It writes each block only once, so that a failed edit cannot be undone."""

    caught: ClassVar = {"test_failed_block_restores_everything": ""}

    class store(NpyStore):
        def write_block(self, name: str, start: int, rows: RawArray) -> None:
            written = vars(self).setdefault("written", set())
            if start not in written:
                super().write_block(name, start, rows)
            written.add(start)


class WrongShapes(WrongStore):
    """Its graph has one row too many."""

    caught: ClassVar = {"test_invalid_plan_changes_nothing": ""}

    class store(NpyStore):
        def __init__(self, directory: Path, architectures: Mapping[str, Layout] = ARCHITECTURES) -> None:
            super().__init__(directory, architectures)
            tables = tuple(replace(t, shape=(t.shape[0] + 1, t.shape[1])) for t in self.graph.tables)
            self.graph = replace(self.graph, tables=tables)


class WrongIntegers(WrongStore):
    """It reads integers as floats."""

    caught: ClassVar = {"test_integer_table_is_refused": ""}

    class store(NpyStore):
        def __init__(self, directory: Path, architectures: Mapping[str, Layout] = ARCHITECTURES) -> None:
            super().__init__(directory, architectures)
            self.graph = replace(self.graph, tables=tuple(replace(t, dtype="F32") for t in self.graph.tables))

        def read_rows(self, name: str, indices: tuple[int, ...]) -> RawArray:
            return super().read_rows(name, indices).to("F32")


class WrongNoRecord(WrongStore):
    """Its homes are directories, but it has no record that could open them."""

    caught: ClassVar = {"test_record_recognises_and_opens": "isinstance(home"}
    store = NpyStore


class WrongRecord(WrongStore):
    """It recognises every directory."""

    caught: ClassVar = {"test_record_recognises_and_opens": "recognises"}
    store = NpyStore
    record = StoreRecord("npy", lambda directory: True, NpyStore)

"""Surgeries, initialisers and stores that are wrong in one thing each, and the check of the test kit that must see it.

Each class is a contract's, as a plugin's author writes it, and names in ``caught`` the checks that must fail, with what
they must say. ``test_kit_catches.py`` runs them.
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


def bringing(hook: str, record: Any) -> ModuleType:
    """A plugin of one record."""
    module = ModuleType("a_wrong_plugin")
    setattr(module, f"embedsurgery_{hook}", es.hookimpl(lambda: [record]))
    return module


@dataclass(frozen=True)
class RowsConfig(es.TrainableTokensConfig):
    """Asks for a wrong surgery on rows."""


class Rows(TrainableTokens):
    """Right as it is."""

    name = "rows"


class WrongSurgery(SurgeryContract):
    """A contract that nothing but its wrong surgery breaks."""

    surgery: ClassVar[type[Surgery]]
    caught: ClassVar[dict[str, str]]
    dtypes = ("F32",)
    ties = (True,)
    config = RowsConfig([3, 17, 5])

    def __init_subclass__(cls) -> None:
        cls.plugin = bringing("surgeries", SurgeryRecord("rows", RowsConfig, cls.surgery(), "ROWS"))


class WrongStart(WrongSurgery):
    caught: ClassVar = {"test_a_fresh_adapter_changes_nothing": "Tensor-likes are not close"}

    class surgery(Rows):
        def start(self, config: Any, store: Store, base: Base) -> Adapter:
            adapter = super().start(config, store, base)
            return replace(adapter, raw={n: RawArray.of(r.bits + np.float32(1)) for n, r in adapter.raw.items()})


class WrongWordOnTheStart(WrongSurgery):
    caught: ClassVar = {"test_a_fresh_adapter_changes_nothing": "starts_as_base is False"}
    starts_as_base = False
    surgery = Rows


class WrongPlan(WrongSurgery):
    caught: ClassVar = {
        "test_attached_is_merged_in_memory": "Tensor-likes are not close",
        "test_gradients_are_those_of_the_merged_model": "assert",
    }

    class surgery(Rows):
        def plan(self, adapter: Adapter, located: Mapping[str, Table]) -> Plan:
            (edit,) = super().plan(adapter, located).edits
            assert isinstance(edit, SetRows)
            return Plan((replace(edit, rows=RawArray.of(edit.rows.bits * np.float32(1.5))),))


class WrongOneWayToMerge(WrongSurgery):
    """By the attachment other last bits than by the function."""

    caught: ClassVar = {"test_attached_is_merged_in_memory": "state_bits"}

    class surgery(Rows):
        def bake(self, adapter: Adapter, context: BakeContext) -> Plan:
            (edit,) = self.plan(adapter, context.located).edits
            assert isinstance(edit, SetRows)
            return Plan((replace(edit, rows=RawArray.of(np.nextafter(edit.rows.bits, np.float32(9)))),))


class WrongNothingLive(WrongSurgery):
    caught: ClassVar = {"test_attached_is_merged_in_memory": "changes nothing"}

    class surgery(Rows):
        def live(self, adapter: Adapter, located: Mapping[str, Table]) -> tuple[RowOverride, ...]:
            return ()


class WrongOnDisk(WrongSurgery):
    caught: ClassVar = {"test_merged_on_disk_is_merged_in_memory": "found"}

    class surgery(Rows):
        def plan(self, adapter: Adapter, located: Mapping[str, Table]) -> Plan:
            plan = super().plan(adapter, located)
            (edit,) = plan.edits
            assert isinstance(edit, SetRows)
            zeros = RawArray.of(edit.rows.bits * np.float32(0))
            return Plan((replace(edit, rows=zeros),)) if located[INPUT].files else plan


class WrongFile(WrongSurgery):
    caught: ClassVar = {"test_merged_on_disk_is_merged_in_memory": "notes.txt"}

    class surgery(Rows):
        def bake(self, adapter: Adapter, context: BakeContext) -> Plan:
            plan = self.plan(adapter, context.located)
            note = PatchFile.change("notes.txt", None, b"I was here")
            return Plan((*plan.edits, note)) if context.located[INPUT].files else plan


class WrongUndo(WrongSurgery):
    """It writes past the plan, of which the undo knows nothing."""

    caught: ClassVar = {"test_undo_is_exact": "state_bits"}

    class surgery(Rows):
        def bake(self, adapter: Adapter, context: BakeContext) -> Plan:
            table = context.located[INPUT]
            rows = rows_of(context.store, table, (0,))
            context.store.write_rows(context.store.copies(table)[0], (0,), RawArray.of(rows.bits + np.float32(1)))
            return self.plan(adapter, context.located)


class WrongTie(WrongSurgery):
    caught: ClassVar = {"test_ties_hold": "shared_memory"}

    class surgery(Rows):
        def bake(self, adapter: Adapter, context: BakeContext) -> Plan:
            row = rows_of(context.store, context.located[INPUT], (0,))
            return Plan((*self.plan(adapter, context.located).edits, Untie(INPUT, OUTPUT, (0,), row)))


class WrongWordOnTies(WrongSurgery):
    caught: ClassVar = {"test_ties_hold": "keeps_ties is False"}
    keeps_ties = False
    surgery = Rows


class WrongSaving(WrongSurgery):
    """Its files hold less than it has."""

    caught: ClassVar = {
        "test_save_and_load": "raw",
        "test_a_loaded_adapter_goes_on": "bits",
        "test_it_comes_back_from_the_hub": "raw",
    }

    class surgery(Rows):
        def to_peft(self, adapter: Adapter) -> PeftFiles:
            files = super().to_peft(adapter)
            return replace(files, tensors={name: raw.to("BF16") for name, raw in files.tensors.items()})


class WrongFingerprint(WrongSurgery):
    caught: ClassVar = {"test_another_base_is_refused": ""}

    class surgery(Rows):
        def start(self, config: Any, store: Store, base: Base) -> Adapter:
            adapter = super().start(config, store, base)
            tables = tuple(replace(record, fingerprint=None) for record in adapter.manifest.tables)
            return replace(adapter, manifest=replace(adapter.manifest, tables=tables))


class WrongTables(SurgeryContract):
    """Contracts for whole tables, whose changes run in each forward."""

    wrong: ClassVar[Columns]
    caught: ClassVar[dict[str, str]]
    dtypes = ("F32",)
    ties = (True,)
    config = ColumnsConfig()

    def __init_subclass__(cls) -> None:
        class Changed(ColumnScaling):
            def live(self, adapter: Adapter, located: Mapping[str, Table]) -> tuple[RowOverride, ...]:
                *others, last = super().live(adapter, located)
                return (*others, replace(last, change=cls.wrong))  # type: ignore[call-arg]

        record = SurgeryRecord("column_scaling", ColumnsConfig, Changed(), "COLUMNS")
        cls.plugin = bringing("surgeries", record)


@dataclass(frozen=True)
class NoGradient(Columns):
    def rows(self, tensors: Sequence[torch.Tensor], indices: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
        return super().rows([tensors[0], tensors[1].detach()], indices, current)


class WrongNoGradient(WrongTables):
    caught: ClassVar = {
        "test_gradients_are_those_of_the_merged_model": "without a gradient",
        "test_a_loaded_adapter_goes_on": "grad is not None",
    }
    wrong = NoGradient()


@dataclass(frozen=True)
class TurnedGradient(Columns):
    def rows(self, tensors: Sequence[torch.Tensor], indices: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
        return super().rows([2 * tensor.detach() - tensor for tensor in tensors], indices, current)


class WrongGradient(WrongTables):
    caught: ClassVar = {
        "test_gradients_are_those_of_the_merged_model": "approx",
        "test_training_lowers_the_loss_and_leaves_the_base": "losses",
    }
    wrong = TurnedGradient()


@dataclass(frozen=True)
class Scribbling(Columns):
    def logits(self, tensors: Any, hidden: Any, logits: Any, weight: torch.Tensor) -> torch.Tensor:
        found = super().logits(tensors, hidden, logits, weight)
        weight.data[0].zero_()
        return found


class WrongForward(WrongTables):
    """Its forward writes into the base."""

    caught: ClassVar = {
        "test_training_lowers_the_loss_and_leaves_the_base": "state_bits",
        "test_a_fresh_adapter_changes_nothing": "state_bits",
    }
    wrong = Scribbling()


_KEPT: list[torch.Tensor] = []


@dataclass(frozen=True)
class Remembering(Columns):
    def rows(self, tensors: Sequence[torch.Tensor], indices: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
        _KEPT[:] = _KEPT or [tensor.detach().clone() for tensor in tensors]
        return super().rows(_KEPT, indices, current)


class WrongCopy(WrongTables):
    """Its copies all have the tensors of the first."""

    caught: ClassVar = {"test_a_copy_is_on_its_own": "bits"}
    wrong = Remembering()


# -- initialisers ----------------------------------------------------------------------------------------------------


class WrongInitializer(InitializerContract):
    """A contract that nothing but its wrong initialiser breaks."""

    init = "wrong"
    initializer: ClassVar[type[Initializer]]
    caught: ClassVar[dict[str, str]]

    def __init_subclass__(cls) -> None:
        cls.plugin = bringing("initializers", InitializerRecord("wrong", cls.initializer()))


def mean(view: TableView, tokens: Sequence[NewToken]) -> Any:
    """A right start."""
    return np.tile(view.rows(range(view.known)).astype(np.float64).mean(axis=0), (len(tokens), 1))


class WrongNumbers(WrongInitializer):
    caught: ClassVar = {"test_shape_and_numbers": "NaN"}

    class initializer(Initializer):
        """NaN."""

        def rows(self, view: TableView, tokens: Any, argument: Any, streams: Any) -> Any:
            return mean(view, tokens) * np.nan


class WrongShape(WrongInitializer):
    caught: ClassVar = {"test_shape_and_numbers": "wrong thing"}

    class initializer(Initializer):
        """One row for all."""

        def rows(self, view: TableView, tokens: Any, argument: Any, streams: Any) -> Any:
            return mean(view, tokens)[:1]


class WrongDraws(WrongInitializer):
    """Random numbers of its own."""

    caught: ClassVar = {"test_the_same_again": "assert"}

    class initializer(Initializer):
        """Random."""

        def rows(self, view: TableView, tokens: Any, argument: Any, streams: Any) -> Any:
            return mean(view, tokens) * np.random.default_rng().standard_normal()


class WrongWordOnDraws(WrongInitializer):
    caught: ClassVar = {"test_the_same_again": "assert"}
    draws = True

    class initializer(Initializer):
        """The mean."""

        def rows(self, view: TableView, tokens: Any, argument: Any, streams: Any) -> Any:
            return mean(view, tokens)


class WrongNeighbours(WrongInitializer):
    caught: ClassVar = {"test_a_row_does_not_depend_on_the_tokens_beside_it": "Not equal"}

    class initializer(Initializer):
        """Shared among the tokens."""

        def rows(self, view: TableView, tokens: Any, argument: Any, streams: Any) -> Any:
            return mean(view, tokens) / len(tokens)


class WrongSpareRows(WrongInitializer):
    caught: ClassVar = {"test_spare_rows_do_not_count": "assert"}

    class initializer(Initializer):
        """The mean of everything."""

        def rows(self, view: TableView, tokens: Any, argument: Any, streams: Any) -> Any:
            return np.tile(view.rows(range(view.shape[0])).mean(axis=0), (len(tokens), 1))


class WrongWordOnSpareRows(WrongInitializer):
    caught: ClassVar = {"test_spare_rows_do_not_count": "assert"}
    takes_spare_rows = True

    class initializer(Initializer):
        """The mean."""

        def rows(self, view: TableView, tokens: Any, argument: Any, streams: Any) -> Any:
            return mean(view, tokens)


class WrongState(WrongInitializer):
    """Each call gives something else."""

    caught: ClassVar = {"test_the_same_wherever_the_table_lies": "assert"}

    class initializer(Initializer):
        """Counts."""

        calls = itertools.count()

        def rows(self, view: TableView, tokens: Any, argument: Any, streams: Any) -> Any:
            return mean(view, tokens) + next(self.calls)


class WrongSpace(WrongInitializer):
    caught: ClassVar = {"test_each_table_in_its_own_space": "assert"}

    class initializer(Initializer):
        """Ones."""

        def rows(self, view: TableView, tokens: Any, argument: Any, streams: Any) -> Any:
            return np.ones((len(tokens), view.shape[1]))


class WrongSize(WrongInitializer):
    """Larger than a narrow dtype holds."""

    caught: ClassVar = {"test_new_tokens_in_a_checkpoint_start_so": ""}

    class initializer(Initializer):
        """The mean, far away."""

        def rows(self, view: TableView, tokens: Any, argument: Any, streams: Any) -> Any:
            return mean(view, tokens) * 1e8


# -- stores ----------------------------------------------------------------------------------------------------------


class WrongStore(StoreContract):
    """A contract that nothing but its wrong store breaks."""

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
    caught: ClassVar = {"test_it_finds_the_tables": "", "test_the_projection_names_its_rows": ""}

    class store(NpyStore):
        def __init__(self, directory: Path, architectures: Mapping[str, Layout] = ARCHITECTURES) -> None:
            super().__init__(directory, architectures)
            tables = tuple(replace(table, aliases=()) for table in self.graph.tables)
            self.graph = replace(self.graph, tables=tables)


class WrongOrder(WrongStore):
    caught: ClassVar = {"test_rows_are_read_in_the_order_asked_for": "bits"}

    class store(NpyStore):
        def read_rows(self, name: str, indices: tuple[int, ...]) -> RawArray:
            return super().read_rows(name, tuple(sorted(indices)))


class WrongNeighbour(WrongStore):
    """It writes one row too many."""

    caught: ClassVar = {"test_rows_are_rounded_once": ""}

    class store(NpyStore):
        def write_rows(self, name: str, indices: tuple[int, ...], rows: RawArray) -> None:
            super().write_rows(name, indices, rows)
            super().write_rows(name, (max(indices) + 1,), rows.take([0]))


class WrongBlock(WrongStore):
    caught: ClassVar = {"test_whole_tables_go_block_by_block": ""}

    class store(NpyStore):
        def write_block(self, name: str, start: int, rows: RawArray) -> None:
            super().write_block(name, 0, rows)


class WrongCache(WrongStore):
    """Each block is written once, so that nothing is taken back."""

    caught: ClassVar = {"test_a_block_that_fails_takes_everything_back": ""}

    class store(NpyStore):
        def write_block(self, name: str, start: int, rows: RawArray) -> None:
            done = vars(self).setdefault("done", set())
            if start not in done:
                super().write_block(name, start, rows)
            done.add(start)


class WrongShapes(WrongStore):
    """It says that there is a row more."""

    caught: ClassVar = {"test_a_bad_plan_is_refused_before_anything_changes": ""}

    class store(NpyStore):
        def __init__(self, directory: Path, architectures: Mapping[str, Layout] = ARCHITECTURES) -> None:
            super().__init__(directory, architectures)
            tables = tuple(replace(t, shape=(t.shape[0] + 1, t.shape[1])) for t in self.graph.tables)
            self.graph = replace(self.graph, tables=tables)


class WrongIntegers(WrongStore):
    """It takes integers for floats."""

    caught: ClassVar = {"test_integers_are_refused": ""}

    class store(NpyStore):
        def __init__(self, directory: Path, architectures: Mapping[str, Layout] = ARCHITECTURES) -> None:
            super().__init__(directory, architectures)
            self.graph = replace(self.graph, tables=tuple(replace(t, dtype="F32") for t in self.graph.tables))

        def read_rows(self, name: str, indices: tuple[int, ...]) -> RawArray:
            return super().read_rows(name, indices).to("F32")


class WrongNoRecord(WrongStore):
    """Its homes are directories, which nobody could open."""

    caught: ClassVar = {"test_the_record_knows_its_own": "name its record"}
    store = NpyStore


class WrongRecord(WrongStore):
    """Every directory is its own."""

    caught: ClassVar = {"test_the_record_knows_its_own": "recognises"}
    store = NpyStore
    record = StoreRecord("npy", lambda directory: True, NpyStore)

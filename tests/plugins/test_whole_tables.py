"""Whole tables that are live: in every way that rows are, by a change whose logits need the whole table."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import embedsurgery as es
import embedsurgery.runtime.attach as attaching
from embedsurgery.adapter import Adapter, Fingerprint, Manifest, PeftFiles, TableRecord
from embedsurgery.errors import AttachmentError, UnsupportedError
from embedsurgery.graph import Table
from embedsurgery.plan import Plan
from embedsurgery.raw import RawArray
from embedsurgery.stores.base import Store, rows_of
from embedsurgery.surgeries.base import Base, RowOverride, Surgery, SurgeryRecord
from embedsurgery.surgeries.whole_tables import TableChange, sampled_rows, set_table, table_overrides
from embedsurgery.testing import SurgeryContract, TinyModel, bits, installed
from embedsurgery.testing.models import INPUT, ROWS, every_token

live = pytest.mark.skipif(not hasattr(attaching, "rows_for"), reason="the runtime of this embedsurgery has rows alone")


@dataclass(frozen=True)
class ColumnsConfig:
    """Asks for it."""


@dataclass(frozen=True)
class Columns(TableChange):
    """``current * (1 + factors) + shift``: no logits of its own."""

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
        record = TableRecord(table.name, table.aliases, sampled, table.shape, table.dtype, "output" in table.roles,
                             Fingerprint.of(rows_of(store, table, sampled)))  # fmt: skip
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


@live
class TestColumnScaling(SurgeryContract):
    plugin = plugin
    config = ColumnsConfig()


@pytest.fixture(autouse=True)
def _plugin() -> Any:
    with installed(plugin):
        yield


def attached(*, tied: bool = True, **options: Any) -> tuple[Any, Any, torch.Tensor]:
    """A model, its attachment with other values than at the start, and the logits of the merged model."""
    model = TinyModel(tied=tied)
    attachment = es.attach(model, ColumnsConfig(), **options)
    with torch.no_grad():
        for number, parameter in enumerate(attachment.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.3)
    merged = TinyModel(tied=tied)
    es.merge(merged, attachment.adapter())
    return model, attachment, merged(every_token()).detach()


@live
def test_by_a_full_copy() -> None:
    model, attachment, wanted = attached(materialize=True)
    found = model(every_token())
    torch.testing.assert_close(found.detach(), wanted)
    found.sum().backward()
    by_copy = [p.grad.clone() for p in attachment.parameters()]
    other, plain, _ = attached()
    other(every_token()).sum().backward()
    for one, two in zip(by_copy, plain.parameters(), strict=True):
        torch.testing.assert_close(one, two.grad)


@live
def test_restored_removed_disabled_and_pickled() -> None:
    model, attachment, wanted = attached()
    saved, base = attachment.adapter(), TinyModel()(every_token()).detach()
    parameters = list(attachment.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()
    attachment.restore(saved)
    assert [id(p) for p in attachment.parameters()] == [id(p) for p in parameters]
    torch.testing.assert_close(model(every_token()).detach(), wanted)
    again = pickle.loads(pickle.dumps(model))
    assert bits(again(every_token())) == bits(model(every_token()))
    with attachment.disabled():
        assert bits(model(every_token())) == bits(base)
    attachment.detach()
    assert bits(model(every_token())) == bits(base)


@live
def test_a_batch_that_mixes() -> None:
    model, attachment, wanted = attached()
    base = TinyModel()(every_token()).detach()
    with attachment.rows(["default", None]):
        found = model(every_token()).detach()
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[1], base[1])


class Reader(TinyModel):
    """Reads the weight itself."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        weight = self.get_input_embeddings().weight
        return torch.nn.functional.embedding(input_ids, weight) @ weight.t()


class Behind(torch.autograd.Function):
    """Code that torch does not see."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
        return weight.sum()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient.expand(ROWS, 8)


@live
@pytest.mark.filterwarnings("ignore:.*full copy")
def test_code_that_reads_the_weight_itself() -> None:
    """It has the change, with its gradient; where the gradient would be lost, that is refused."""
    model = Reader()
    attachment = es.attach(model, ColumnsConfig())
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.fill_(0.5)
    table = model.get_input_embeddings().weight.detach() * 1.5 + 0.5
    found = model(every_token())
    torch.testing.assert_close(found.detach(), table[every_token()] @ table.t())
    found.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in attachment.parameters())
    attachment.detach()
    Reader.forward = lambda self, ids: Behind.apply(self.get_input_embeddings().weight)  # type: ignore[method-assign]
    attachment = es.attach(model, ColumnsConfig())
    with pytest.raises(UnsupportedError, match="materialize"):
        model(every_token()).backward()


@live
def test_nothing_else_is_live_beside_it() -> None:
    model, attachment, _ = attached()
    with pytest.raises(AttachmentError, match="column_scaling"):
        es.attach(model, es.TrainableTokensConfig([1]), name="other")
    assert attachment.names == ("default",)
    assert INPUT in attachment.adapter().raw


def test_the_parts_of_an_override() -> None:
    table = Table("x", (200, 4), "F32")
    parts = table_overrides(table, ("a", "b", "x"), sampled_rows(table), Columns())
    assert [(p.tensor, len(p.indices), p.change, p.rows) for p in parts] == [
        ("a", 0, None, 0), ("b", 0, None, 0), ("x", 64, Columns(), 200)]  # fmt: skip
    assert len(set(parts[-1].indices)) == 64
    assert sampled_rows(Table("x", (3, 4), "F32")) == (0, 1, 2)

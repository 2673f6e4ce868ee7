"""Live overrides of whole tables, by a change whose logits need the whole table."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import embedsurgery as es
from embedsurgery.errors import AttachmentError, EmbedSurgeryWarning, UnsupportedError
from embedsurgery.graph import Table
from embedsurgery.surgeries.whole_tables import sampled_rows, table_overrides
from embedsurgery.tensors.raw import RawArray
from embedsurgery.testing import SurgeryContract, TinyModel, bits, contents, installed, write_checkpoint
from embedsurgery.testing.models import INPUT, ROWS, WIDTH, every_token, state_bits
from tests.support.column_scaling import Columns, ColumnsConfig, plugin
from tests.support.errors import raises


class TestColumnScaling(SurgeryContract):
    plugin = plugin
    config = ColumnsConfig()


@pytest.fixture(autouse=True)
def _plugin() -> Any:
    with installed(plugin):
        yield


def attached(*, tied: bool = True, **options: Any) -> tuple[Any, Any, torch.Tensor]:
    """Return a model, its attachment with random values, and the logits of the merged model."""
    model = TinyModel(tied=tied)
    attachment = es.attach(model, ColumnsConfig(), **options)
    with torch.no_grad():
        for number, parameter in enumerate(attachment.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.3)
    merged = TinyModel(tied=tied)
    es.merge(merged, attachment.adapter())
    return model, attachment, merged(every_token()).detach()


def test_by_a_full_copy() -> None:
    model, attachment, expected = attached(materialize=True)
    found = model(every_token())
    torch.testing.assert_close(found.detach(), expected)
    found.sum().backward()
    by_copy = [p.grad.clone() for p in attachment.parameters()]
    other, plain, _ = attached()
    other(every_token()).sum().backward()
    for one, two in zip(by_copy, plain.parameters(), strict=True):
        torch.testing.assert_close(one, two.grad)


def test_restored_removed_disabled_and_pickled() -> None:
    model, attachment, expected = attached()
    saved, base = attachment.adapter(), TinyModel()(every_token()).detach()
    parameters = list(attachment.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()
    attachment.restore(saved)
    assert [id(p) for p in attachment.parameters()] == [id(p) for p in parameters]
    torch.testing.assert_close(model(every_token()).detach(), expected)
    again = pickle.loads(pickle.dumps(model))
    assert bits(again(every_token())) == bits(model(every_token()))
    with attachment.disabled():
        assert bits(model(every_token())) == bits(base)
    attachment.detach()
    assert bits(model(every_token())) == bits(base)


def test_a_batch_that_mixes() -> None:
    model, attachment, expected = attached()
    base = TinyModel()(every_token()).detach()
    with attachment.per_sample(["default", None]):
        found = model(every_token()).detach()
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], base[1])


class Reader(TinyModel):
    """Its forward reads the weight directly, in one of several ways."""

    how = "head"

    def part(self, states: torch.Tensor) -> torch.Tensor:
        weight = self.get_input_embeddings().weight
        return torch.tanh(states @ weight.t() @ weight)  # type: ignore[operator, arg-type]

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        weight: Any = self.get_input_embeddings().weight
        if self.how == "function":
            return SumWeight.apply(weight)  # type: ignore[no-untyped-call, no-any-return]
        states = torch.nn.functional.embedding(input_ids, weight)
        if self.how == "head":
            return states @ weight.t()
        for _ in range(2):
            states = self.part(states) if self.how == "parts" else checkpoint(self.part, states, use_reentrant=True)
        return states


class SumWeight(torch.autograd.Function):
    """Reads the weight where no torch function sees it."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
        return weight.sum()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        return gradient.expand(ROWS, WIDTH)


@pytest.mark.filterwarnings("ignore:.*full copy")
def test_code_that_reads_the_weight_directly() -> None:
    """It gets the changed weight with its gradient, also in an autograd.Function."""
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
    for parameter in attachment.parameters():
        parameter.grad = None
    model.how = "function"
    found = model(every_token())
    torch.testing.assert_close(found.detach(), table.sum())
    found.backward()
    shift, factors = attachment.parameters()
    base = model.get_input_embeddings().weight.detach()
    torch.testing.assert_close(shift.grad, torch.full((1, WIDTH), float(ROWS)))
    torch.testing.assert_close(factors.grad, base.sum(0, keepdim=True))


@pytest.mark.filterwarnings("ignore:.*full copy")
@pytest.mark.parametrize("materialize", [True, False])
def test_activation_checkpointing(materialize: bool) -> None:
    """Each checkpointed part runs its own backward through the one full copy."""
    found = {}
    for how in ("parts", "again"):
        model = Reader()
        model.how = how
        attachment = es.attach(model, ColumnsConfig(), materialize=materialize)
        with torch.no_grad():
            for parameter in attachment.parameters():
                parameter.fill_(0.1)
        out = model(every_token())
        out.square().sum().backward()
        found[how] = [out.detach(), *(p.grad for p in attachment.parameters())]
    for one, other in zip(found["parts"], found["again"], strict=True):
        torch.testing.assert_close(one, other)


@dataclass(frozen=True)
class Counted(Columns):
    """Records how many rows each call computes."""

    counts: list[int]

    def rows(self, tensors: Sequence[torch.Tensor], indices: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
        self.counts.append(len(indices))
        assert current.shape == (len(indices), WIDTH)
        return super().rows(tensors, indices, current)


def test_a_lookup_computes_only_the_rows_of_the_batch() -> None:
    model, attachment, _ = attached(tied=False)
    live = attachment._installation.live[INPUT][0]
    live.change = Counted([])
    model(every_token()[:, :3])
    assert live.change.counts == [6]


def test_under_autocast_rows_are_rounded_once() -> None:
    model, _, _ = attached(tied=False)
    plain = model.get_input_embeddings()(every_token())
    with torch.autocast("cpu", torch.bfloat16):
        assert bits(model.get_input_embeddings()(every_token())) == bits(plain)


def test_compiled() -> None:
    model, attachment, expected = attached()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = compiled(every_token())
    torch.testing.assert_close(found.detach(), expected)
    found.sum().backward()
    assert all(p.grad is not None for p in attachment.parameters())


def test_a_whole_table_cannot_be_activated_inside_materialized() -> None:
    model, attachment, expected = attached()
    attachment.activate()
    base = model(every_token())
    with attachment.materialized():
        with raises(UnsupportedError, where=INPUT):
            attachment.activate("default")
        assert attachment.active == ()
        assert torch.equal(model(every_token()), base)
    attachment.activate("default")
    torch.testing.assert_close(model(every_token()).detach(), expected)


def test_a_merged_model_is_copied_and_pickled() -> None:
    """The undo of a whole table is in a file; copies of the model must not depend on it."""
    model, attachment, expected = attached()
    base = state_bits(TinyModel())
    attachment.merge()
    copied, pickled = copy.deepcopy(model), pickle.dumps(model)
    attachment.unmerge()
    assert state_bits(model) == base
    del model, attachment
    for other in (copied, pickle.loads(pickled)):
        torch.testing.assert_close(other(every_token()).detach(), expected)
        again = es.get_attachment(other)
        assert again is not None
        again.unmerge()
        assert state_bits(other) == base


def test_rows_that_overflow_are_named() -> None:
    model = TinyModel(dtype="F16")
    attachment = es.attach(model, ColumnsConfig())
    with torch.no_grad():
        next(iter(attachment.parameters()))[0, 2] = 1e6
    with pytest.warns(EmbedSurgeryWarning, match=r"embed_tokens.*\b0, 1, 2, 3"):
        attachment.merge()
    attachment.unmerge()
    assert state_bits(model) == state_bits(TinyModel(dtype="F16"))


def test_what_does_not_fit_is_not_restored() -> None:
    _, attachment, _ = attached()
    saved = attachment.adapter()
    narrow = {name: RawArray.of(raw.bits[:, :1]) for name, raw in saved.raw.items()}
    before = bits(next(attachment.parameters()))
    with raises(AttachmentError, expected="[1, 8]", found="[1, 1]"):
        attachment.restore(replace(saved, raw=narrow))
    assert bits(next(attachment.parameters())) == before


def test_later_merges_on_disk(tmp_path: Path) -> None:
    """A dry run reports the size of the undo; merges are verified, and undone in reverse order."""
    model = TinyModel(tied=False)
    base = write_checkpoint(model, tmp_path / "base")
    whole = attached(tied=False)[1].adapter()
    dry = es.merge_checkpoint(base, whole, None, dry_run=True)
    assert (dry.undo, dry.done) == (ROWS * WIDTH * 4, False)
    es.merge_checkpoint(base, whole, tmp_path / "one")
    es.merge(model, whole)
    rows = es.attach(model, es.TrainableTokensConfig([3]))
    with torch.no_grad():
        next(rows.parameters()).fill_(7)
    es.merge_checkpoint(tmp_path / "one", rows.adapter(), tmp_path / "two")
    assert [check.name for check in es.verify_checkpoint(tmp_path / "two") if not check.ok] == []
    es.unmerge_checkpoint(tmp_path / "two", tmp_path / "three")
    assert contents(tmp_path / "three") == contents(tmp_path / "one")
    es.unmerge_checkpoint(tmp_path / "three", tmp_path / "four")
    assert contents(tmp_path / "four") == contents(base)


def test_no_other_adapter_can_be_attached_beside_it() -> None:
    model, attachment, _ = attached()
    with raises(AttachmentError, found="column_scaling"):
        es.attach(model, es.TrainableTokensConfig([1]), name="other")
    assert attachment.names == ("default",)
    assert INPUT in attachment.adapter().raw


def test_the_parts_of_an_override() -> None:
    table = Table("x", (200, 4), "F32")
    parts = table_overrides(table, ("a", "b", "x"), sampled_rows(table), Columns())
    assert [(p.tensor, len(p.indices), p.change, p.rows) for p in parts] == [
        ("a", 0, None, 0),
        ("b", 0, None, 0),
        ("x", 64, Columns(), 200),
    ]
    assert len(set(parts[-1].indices)) == 64
    assert sampled_rows(Table("x", (3, 4), "F32")) == (0, 1, 2)

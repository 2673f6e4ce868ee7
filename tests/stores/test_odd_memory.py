"""State dicts and modules whose tensors have unusual memory layouts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from embedsurgery.errors import OverlapError, UnsupportedError
from embedsurgery.plan import Plan, SetRows
from embedsurgery.stores.apply import apply
from embedsurgery.stores.modules import module_store
from embedsurgery.stores.state_dicts import state_dict_store
from embedsurgery.stores.store import Store
from embedsurgery.tensors.convert import to_raw
from embedsurgery.tensors.raw import RawArray
from tests.support.comparing import bits
from tests.support.errors import raises
from tests.support.homes import EMBED, HEAD, module_of

NEW = torch.arange(100.0, 112.0).reshape(2, 6)


def memory(home: str, values: dict[str, torch.Tensor]) -> Store:
    return state_dict_store(values) if home == "state dict" else module_store(module_of(values))


both = pytest.mark.parametrize("home", ["state dict", "module"])


@both
def test_a_square_table_and_its_transpose(home: str) -> None:
    """With V = D only the strides show whether a head is stored transposed."""
    table = torch.randn(6, 6)
    before = table.clone()
    undo = apply(Plan((SetRows(EMBED, (4, 1), to_raw(NEW)),)), memory(home, {EMBED: table, HEAD: table.t()}))
    expected = before.clone()
    expected[[4, 1]] = NEW
    assert bits(table) == bits(expected)
    apply(undo, memory(home, {EMBED: table, HEAD: table.t()}))
    assert bits(table) == bits(before)


@both
def test_a_table_that_is_not_contiguous(home: str) -> None:
    memory_of_it = torch.randn(6, 11)
    values = {EMBED: memory_of_it.t(), HEAD: torch.randn(11, 6)}
    expected, head = memory_of_it.clone(), values[HEAD].clone()
    expected.t()[[4, 1]] = NEW
    apply(Plan((SetRows(EMBED, (4, 1), to_raw(NEW)),)), memory(home, values))
    assert bits(memory_of_it) == bits(expected)
    assert bits(values[HEAD]) == bits(head)


@both
def test_equal_copies_with_different_strides(home: str) -> None:
    table = torch.randn(11, 6)
    values = {EMBED: table, HEAD: table.t().contiguous().t()}
    store = memory(home, values)
    apply(Plan((SetRows(EMBED, (4, 1), to_raw(NEW)),)), store)
    assert bits(table[[4, 1]]) == bits(NEW)
    if home == "state dict":  # equal values are a tie that is stored twice
        assert bits(values[HEAD]) == bits(table)


@both
def test_a_column_slice_of_a_wider_memory(home: str) -> None:
    wide = torch.randn(11, 15)
    expected = wide.clone()
    expected[[4, 1], 3:9] = NEW
    apply(Plan((SetRows(EMBED, (4, 1), to_raw(NEW)),)), memory(home, {EMBED: wide[:, 3:9]}))
    assert bits(wide) == bits(expected)


@both
def test_a_head_over_a_part_of_the_table_is_refused(home: str) -> None:
    table = torch.randn(11, 6)
    before = table.clone()
    with raises(OverlapError, what=HEAD, where=EMBED, found=[9, 6]):
        apply(Plan((SetRows(EMBED, (4, 1), to_raw(NEW)),)), memory(home, {EMBED: table, HEAD: table[:9]}))
    assert bits(table) == bits(before)


@both
def test_an_expanded_table_is_refused(home: str) -> None:
    """It has one row in memory, so setting one of its rows would set all of them."""
    row = torch.randn(1, 6)
    before = row.clone()
    with raises(UnsupportedError, where=EMBED, found="expanded"):
        apply(Plan((SetRows(EMBED, (4, 1), to_raw(NEW)),)), memory(home, {EMBED: row.expand(11, 6)}))
    assert bits(row) == bits(before)


@both
def test_meta_tensors_are_refused(home: str) -> None:
    values = {EMBED: torch.empty(11, 6, device="meta"), HEAD: torch.empty(11, 6, device="meta")}
    with raises(UnsupportedError, where=EMBED, found="meta"):
        apply(Plan((SetRows(EMBED, (4, 1), to_raw(NEW)),)), memory(home, values))


def test_a_parameter_that_requires_grad_keeps_its_object_and_graph() -> None:
    model = nn.Sequential(nn.Embedding(11, 6))
    weight = model[0].weight
    version = weight._version
    apply(Plan((SetRows("0.weight", (4, 1), to_raw(NEW)),)), module_store(model))
    assert model[0].weight is weight
    assert weight.requires_grad
    assert weight.is_leaf
    assert weight._version > version  # autograd sees that a saved table has changed
    assert bits(weight[[4, 1]]) == bits(NEW)


def test_a_state_dict_may_have_other_values() -> None:
    values = {EMBED: torch.zeros(11, 6), "model.extra_state": {"a": 1}, "step": 3}
    apply(Plan((SetRows(EMBED, (2,), RawArray.of(torch.ones(1, 6).numpy())),)), state_dict_store(values))  # type: ignore[arg-type]
    assert float(values[EMBED].sum()) == 6.0

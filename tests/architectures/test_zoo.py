"""Every model of the zoo builds, is finite and deterministic, and has logits of the expected shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support import zoo
from tests.support.zoo_overrides import VOCABULARY

CASES = zoo.cases()


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_cases_are_sorted_and_unique() -> None:
    names = [case.name for case in CASES]
    assert names == sorted(set(names))
    assert {case.kind for case in CASES} == {"causal", "masked", "seq2seq", "multimodal"}


def test_unbuildable_classes_are_not_cases() -> None:
    assert not {case.class_name for case in CASES} & set(zoo.UNBUILDABLE)


@pytest.mark.sweep
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_build_and_forward(case: zoo.Case) -> None:
    model = zoo.build(case, seed=3)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}

    state, again = model.state_dict(), zoo.build(case, seed=3).state_dict()
    assert state.keys() == again.keys()
    for name, tensor in again.items():
        assert torch.equal(tensor, state[name]), name

    kwargs = zoo.inputs(case, model)
    with torch.no_grad():
        first = zoo.logits(model(**kwargs))
        second = zoo.logits(model(**kwargs))
    assert first.shape[-1] == VOCABULARY
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)
    assert first.flatten(0, -2).std(dim=0).max() > 1e-4


@pytest.mark.sweep
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_parameter_is_random(case: zoo.Case) -> None:
    one, other = zoo.build(case, seed=1), zoo.build(case, seed=2)
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        owner = type(one.get_submodule(name.rpartition(".")[0])).__name__
        if mine.requires_grad and "Sinusoid" not in owner:
            assert not torch.equal(mine, theirs), name


@pytest.mark.parametrize("tie", [True, False])
def test_tie_is_set_before_construction(tie: bool) -> None:
    case = next(case for case in CASES if case.name == "LlamaForCausalLM")
    model = zoo.build(case, tie=tie)
    assert model.config.tie_word_embeddings is tie
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tie

"""Attaching to parts of attached models and to modules around them, and roots that are sites themselves."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import embedsurgery as es
from embedsurgery.errors import AttachmentError, EmbedSurgeryWarning, UnsupportedError
from embedsurgery.runtime.attachment import attach_adapter
from tests.support.errors import raises
from tests.support.models import logits, tiny
from tests.support.modules import D, V, tied

CONFIG = es.TrainableTokensConfig([5, 7])
IDS = torch.tensor([[1, 4, 2, 7], [4, 4, 9, 0]])


@pytest.mark.parametrize("part", ["model", "model.embed_tokens", "model.layers.0", "lm_head"])
def test_a_part_of_an_attached_model_is_refused(part: str) -> None:
    model = tiny("llama-tied")
    attachment = es.attach(model, CONFIG, name="whole")
    inner = model.get_submodule(part)
    config = es.TrainableTokensConfig([1], target_modules=[""]) if part == "model.embed_tokens" else CONFIG
    if part in ("model.layers.0", "lm_head"):  # they have no table
        inner.other = nn.Embedding(V, D)
        config = es.TrainableTokensConfig([1], target_modules=["other"])
    where = f"{part} ({type(inner).__name__}) of LlamaForCausalLM"
    with raises(AttachmentError, where=where, found="whole", hint="name="):
        es.attach(inner, config)
    assert es.get_attachment(inner) is None
    assert es.get_attachment(model) is attachment
    attachment.detach()
    es.attach(inner, config)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_part_of_a_copy_is_refused(how: str) -> None:
    model = tiny("llama-tied")
    es.attach(model, CONFIG)
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    es.get_attachment(model).detach()
    es.attach(model.model, CONFIG)
    with raises(AttachmentError, where="model (LlamaModel) of LlamaForCausalLM", found="default"):
        es.attach(other.model, CONFIG)


def test_a_model_with_tables_outside_of_an_attached_part_is_refused() -> None:
    model = tiny("llama-tied")
    attachment = es.attach(model.model, CONFIG)
    adapter, record = attachment.adapter(), attachment._members["default"].record
    with raises(AttachmentError, where="LlamaModel in LlamaForCausalLM", found="lm_head"):
        attach_adapter(model.model, adapter, record, graph=attachment.graph, name="b", given=model)
    with raises(AttachmentError, where="LlamaModel in LlamaForCausalLM", found="lm_head"):
        es.attach(model, es.TrainableTokensConfig([3]), name="b")
    assert attachment.names == ("default",)


def test_attaching_to_a_wrapper_attaches_to_the_model() -> None:
    model = tiny("llama-tied")
    attachment = es.attach(model, CONFIG)
    wrapper = nn.ModuleDict({"inner": model, "loss": nn.Linear(3, 2)})
    assert es.attach(wrapper, es.TrainableTokensConfig([3]), name="b") is attachment
    assert attachment.names == ("default", "b")


@pytest.mark.parametrize("materialize", [True, False])
def test_a_root_that_is_a_lookup(materialize: bool) -> None:
    model = nn.Embedding(V, D, padding_idx=2).double()
    edited = copy.deepcopy(model)
    edited.padding_idx = None
    attachment = es.attach(model, es.TrainableTokensConfig([4, 2], target_modules=[""]), materialize=materialize)
    check(model, edited, attachment, IDS)


class Head(nn.Linear):
    """A projection that transformers' interface names as the output."""

    def get_output_embeddings(self) -> nn.Module:
        return self


@pytest.mark.parametrize("materialize", [True, False])
def test_a_root_that_is_a_projection(materialize: bool) -> None:
    torch.manual_seed(0)
    model = Head(D, V).double()
    edited = copy.deepcopy(model)
    attachment = es.attach(model, es.TrainableTokensConfig([4, 2], target_modules=[""]), materialize=materialize)
    check(model, edited, attachment, torch.randn(3, D, dtype=torch.float64))


def check(model: Any, edited: Any, attachment: Any, given: torch.Tensor) -> None:
    weight, before = model.weight, model.weight.detach().clone()
    (rows,) = attachment.parameters()
    with torch.no_grad():
        rows.normal_()
        edited.weight[[4, 2]] = rows
    found = model(given)
    torch.testing.assert_close(found, edited(given), rtol=1e-13, atol=1e-13)
    found.square().sum().backward()
    edited(given).square().sum().backward()
    torch.testing.assert_close(rows.grad, edited.weight.grad[[4, 2]], rtol=1e-12, atol=1e-12)
    attachment.merge()
    assert torch.equal(model.weight, edited.weight)
    assert torch.equal(model(given), edited(given))
    attachment.unmerge()
    attachment.detach()
    assert model.weight is weight
    assert torch.equal(weight, before)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert weight.requires_grad


class TwoModes(nn.Embedding):
    """A lookup that accepts probabilities as well as ids."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return ids @ self.weight if ids.is_floating_point() else super().forward(ids)


def test_a_lookup_that_gets_probabilities() -> None:
    model = nn.Sequential(TwoModes(V, D), nn.Linear(D, V))
    model[1].weight = model[0].weight
    config = es.TrainableTokensConfig([4, 2], target_modules=["0"])
    probabilities = torch.randn(2, 3, V).softmax(-1)
    attachment = es.attach(model, config)
    model(IDS)
    with raises(UnsupportedError, where="0", found="torch.float32", hint="materialize=True"):
        model(probabilities)
    attachment.detach()
    edited = copy.deepcopy(model)
    (rows,) = es.attach(model, config, materialize=True).parameters()
    with torch.no_grad():
        rows.normal_()
        edited[0].weight[[4, 2]] = rows
    for given in (IDS, probabilities):
        torch.testing.assert_close(model(given), edited(given))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_merging_values_that_overflow_warns(dtype: torch.dtype) -> None:
    model = tied().to(dtype)
    attachment = es.attach(model, es.TrainableTokensConfig([4, 2, 9], target_modules=["embed"]))
    (rows,) = attachment.parameters()
    with torch.no_grad():
        rows[0, 1], rows[2, 0], rows[1, 0] = 7e4, -1e5, torch.inf  # the last was infinite before
    before = model.embed.weight.detach().clone()
    if dtype == torch.float16:
        with pytest.warns(EmbedSurgeryWarning, match=r"embed\.weight \(torch\.float16\), rows 4, 9; unmerge\(\)"):
            attachment.merge()
        assert model.embed.weight[4, 1] == torch.inf
    else:
        attachment.merge()
    attachment.unmerge()
    assert torch.equal(model.embed.weight, before)


def test_a_refusal_changes_nothing() -> None:
    model = tiny("llama-tied")
    before = logits(model)
    es.attach(model, CONFIG)
    with raises(AttachmentError, where="model (LlamaModel) of LlamaForCausalLM"):
        es.attach(model.model, CONFIG)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)
    assert [name for name, _ in model.named_modules() if name.endswith("embedsurgery")] == ["embedsurgery"]

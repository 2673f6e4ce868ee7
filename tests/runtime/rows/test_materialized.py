"""Weights that are read outside of all forwards, inside attachment.materialized()."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import embedsurgery as es
from embedsurgery.errors import AttachmentError, UnsupportedError
from tests.support.comparing import state_bits
from tests.support.errors import raises
from tests.support.integrations import INDICES, attach_tiny, batch
from tests.support.models import VOCABULARY, tiny

BATCH = batch()


def loss_of(model: Any, *, labels: bool = True) -> torch.Tensor:
    """Return the loss of a custom loop, which calls the body and passes the head's weight to a function."""
    hidden = model.model(BATCH["input_ids"])[0]
    scores = F.linear(hidden, model.lm_head.weight)
    return F.cross_entropy(scores[:, :-1].flatten(0, 1), BATCH["labels"][:, 1:].flatten()) if labels else scores


@pytest.mark.parametrize("kind", ["llama-tied", "llama-untied"])
@pytest.mark.parametrize("materialize", [False, True])
@pytest.mark.parametrize("forwards", [False, True])
@pytest.mark.parametrize("indices", [INDICES, list(range(4, 20))], ids=["few", "many"])
def test_a_custom_loop_equals_the_dense_model(kind: str, materialize: bool, forwards: bool, indices: list[int]) -> None:
    targets = ["embed_tokens"] if kind == "llama-tied" else ["embed_tokens", "lm_head"]
    model, dense = tiny(kind), tiny(kind)
    before = state_bits(model)
    config = es.TrainableTokensConfig(indices, target_modules=targets)
    attachment = es.attach(model, config, materialize=materialize)
    weights = [dense.model.embed_tokens.weight, dense.lm_head.weight][: len(targets)]
    ours = torch.optim.SGD(attachment.parameters(), lr=0.5)
    with attachment.materialized():
        for _ in range(3):
            ours.zero_grad()
            loss = loss_of(model)
            loss.backward()
            expected = loss_of(dense)
            gradients = torch.autograd.grad(expected, weights)
            torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
            for part, gradient in zip(attachment.parameters(), gradients, strict=True):
                torch.testing.assert_close(part.grad, gradient[indices], rtol=0, atol=1e-5)
            ours.step()
            with torch.no_grad():
                for weight, part in zip(weights, attachment.parameters(), strict=True):
                    weight[indices] = part
                torch.testing.assert_close(
                    loss_of(model, labels=False), loss_of(dense, labels=False), rtol=0, atol=1e-5
                )
            if forwards:  # the model's own, between and around
                torch.testing.assert_close(model(**BATCH).loss, dense(**BATCH).loss, rtol=0, atol=1e-5)
        assert state_bits(model) == before
        assert model.lm_head.weight.shape == (VOCABULARY, model.config.hidden_size)
    assert state_bits(model) == before
    for module in model.modules():
        assert "weight" not in module.__dict__
    torch.testing.assert_close(model(**BATCH).loss, dense(**BATCH).loss, rtol=0, atol=1e-5)


def test_weights_follow_the_live_rows() -> None:
    model, attachment = attach_tiny()
    with torch.no_grad():
        next(attachment.parameters()).add_(1.0)
    base = tiny("llama-tied").lm_head.weight
    with attachment.materialized():
        live = model.lm_head.weight.clone()
        with attachment.disabled():
            assert torch.equal(model.lm_head.weight, base)
        assert torch.equal(model.lm_head.weight.clone(), live)
        assert torch.equal(live[INDICES], next(attachment.parameters()))
        attachment.activate()
        assert torch.equal(model.lm_head.weight, base)
        attachment.activate("default")
        attachment.merge()
        assert torch.equal(model.lm_head.weight, live)
        attachment.unmerge()
        assert torch.equal(model.lm_head.weight.clone(), live)
        with (
            raises(UnsupportedError, where="model.embed_tokens.weight", found="clone()"),
            attachment.per_sample(["default", None]),
        ):
            model.lm_head.weight.clone()
        with pytest.raises((UnsupportedError, RuntimeError)):  # torch refuses a tensor with a gradient function first
            copy.deepcopy(model)
        with (
            torch.no_grad(),
            attachment.disabled(),
            raises(UnsupportedError, where="embed_tokens", what="materialized()", hint="copy"),
        ):
            copy.deepcopy(model)
    with (
        attachment.per_sample(["default", None]),
        raises(UnsupportedError, where="model.embed_tokens.weight", found="per_sample()"),
        attachment.materialized(),
    ):
        pass
    assert type(model.lm_head.weight) is torch.nn.Parameter
    attachment.merge()
    with raises(AttachmentError, where="materialized()", hint="unmerge()"), attachment.materialized():
        pass
    attachment.unmerge()
    with attachment.materialized():
        attachment.detach()
        assert type(model.lm_head.weight) is torch.nn.Parameter


def test_nested_blocks_restore_the_weights() -> None:
    model, attachment = attach_tiny("llama-untied")
    es.attach(model, es.TrainableTokensConfig([9, 11]), name="b")
    attachment.activate("default")
    (own, other), base = attachment.parameters(), tiny("llama-untied").model.embed_tokens.weight
    with torch.no_grad():
        own.fill_(1.0)
        other.fill_(2.0)

    def shown(*names: str) -> bool:
        weight = model.model.embed_tokens.weight.detach()
        wanted = base.detach().clone()
        for name in names:
            wanted[INDICES if name == "default" else [9, 11]] = 1.0 if name == "default" else 2.0
        return torch.equal(weight, wanted)

    with attachment.materialized():
        with attachment.materialized():
            assert shown("default")
            with attachment.disabled():
                assert shown()
            assert shown("default")
            attachment.activate("b")
            assert shown("b")
        assert shown("b")
        attachment.activate("default", "b")
        assert shown("default", "b")
    assert shown()
    with attachment.materialized(), attachment.materialized():
        attachment.detach()
        assert shown()
    assert type(model.model.embed_tokens.weight) is torch.nn.Parameter


def test_a_table_attached_inside_is_covered() -> None:
    model, attachment = attach_tiny("llama-untied")
    with attachment.materialized():
        es.attach(model, es.TrainableTokensConfig([9], target_modules=["lm_head"]), name="b")
        with torch.no_grad():
            list(attachment.parameters())[1].fill_(2.0)
        assert torch.equal(model.lm_head.weight[9].detach(), torch.full((model.config.hidden_size,), 2.0))
    assert torch.equal(model.lm_head.weight, tiny("llama-untied").lm_head.weight)


@pytest.mark.parametrize("write", ["add_", "data.add_", "data ="])
def test_all_ways_of_writing_rows_are_seen(write: str) -> None:
    model, attachment = attach_tiny()
    (rows,) = attachment.parameters()
    with attachment.materialized():
        for _ in range(2):
            assert torch.equal(model.lm_head.weight[INDICES].clone(), rows)
            assert torch.equal((model.lm_head.weight * 1.0)[INDICES], rows)
            if write == "data =":
                rows.data = rows.data + 1.0
            elif write == "data.add_":
                rows.data.add_(1.0)
            else:
                with torch.no_grad():
                    rows.add_(1.0)


def test_rows_that_are_unfrozen_inside() -> None:
    model, attachment = attach_tiny()
    (rows,) = attachment.parameters()
    rows.requires_grad_(False)
    with attachment.materialized():
        assert not (model.lm_head.weight * 1.0).requires_grad
        attachment.unfreeze()
        (model.lm_head.weight * 1.0).sum().backward()
    assert torch.equal(rows.grad, torch.ones_like(rows))


@pytest.mark.parametrize("path", ["model.embed_tokens", "lm_head", ""])
def test_a_failed_call_leaves_the_weights_covered(path: str) -> None:
    model, attachment = attach_tiny()
    with torch.no_grad():
        next(attachment.parameters()).add_(1.0)
    with attachment.materialized():
        shown = (model.lm_head.weight * 1.0).detach()
        with pytest.raises((IndexError, RuntimeError)):
            model.get_submodule(path)(torch.full((1, 3), 10**6))
        for weight in (model.lm_head.weight, model.model.embed_tokens.weight):
            assert torch.equal((weight * 1.0).detach(), shown)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_code_sees_the_rows_of_each_step() -> None:
    torch._dynamo.reset()
    model, attachment = attach_tiny()
    dense = tiny("llama-tied")
    (rows,) = attachment.parameters()
    hidden = torch.randn(3, model.config.hidden_size, generator=torch.Generator().manual_seed(1))

    def loss(weight: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, weight).logsumexp(-1).sum()

    run = torch.compile(loss, backend="eager", fullgraph=True)
    with attachment.materialized():
        for step in range(4):
            with torch.no_grad():
                rows.data.add_(0.5) if step % 2 else rows.add_(0.5)
                dense.lm_head.weight[INDICES] = rows
            rows.grad = None
            found = run(model.lm_head.weight)
            found.backward()
            torch.testing.assert_close(found, loss(dense.lm_head.weight))
            (gradient,) = torch.autograd.grad(loss(dense.lm_head.weight), dense.lm_head.weight)
            torch.testing.assert_close(rows.grad, gradient[INDICES])

"""Heads with many consecutive new rows: the dense model's numbers at the cost of its products."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import embedsurgery as es
from embedsurgery.runtime.rows.sliced_head import SlicedWeight
from tests.support.calls import OperationCounter
from tests.support.row_models import dense_gradients, step
from tests.support.row_models import pair as attached_and_edited

V, D = 60, 8
RUNS = {"first": range(12), "middle": range(20, 32), "last": range(48, 60), "all": range(60)}
KINDS: dict[str, dict[str, bool]] = {"tied": {}, "untied": {"tie": False}, "bias": {"bias": True}}
IDS = torch.tensor([[4, 25, 31], [47, 59, 59]])


def pair(run: str = "last", dtype: torch.dtype = torch.float64, **kind: bool) -> tuple[Any, Any, list[Any]]:
    """Return an attached and an edited model, as `attached_and_edited`, with the rows of a run."""
    return attached_and_edited(list(RUNS[run]), dtype, **kind)


def loss(one: Any) -> torch.Tensor:
    return F.cross_entropy(one(IDS).flatten(0, 1).float(), IDS.flip(0).flatten())


def sliced_products(one: Any) -> int:
    """Return the number of products that a forward writes to a part of the logits."""
    with OperationCounter() as calls:
        one(IDS)
    assert calls.count("mm", "addmm", size=IDS.numel() * V) in (0, 1)
    return sum(name in ("mm", "addmm") for name, _ in calls.seen) - 2  # the body's, and the head's first


def assert_dense(model: Any, dense: Any, rows: list[Any], run: str, **tolerance: float) -> None:
    tolerance = tolerance or {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(step(model, loss), step(dense, loss), **tolerance)
    torch.testing.assert_close(model(IDS), dense(IDS), **tolerance)
    found = dense_gradients(dense, list(RUNS[run]))
    for part, gradient in zip(rows, found, strict=True):
        torch.testing.assert_close(part.grad, gradient.to(part.dtype), **tolerance)
    torch.testing.assert_close(model.body.weight.grad, dense.body.weight.grad, **tolerance)


@pytest.mark.filterwarnings("ignore:.* past half of the vocabulary")
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_the_dense_models(kind: str, run: str) -> None:
    model, dense, rows = pair(run, **KINDS[kind])
    assert sliced_products(model) == {"middle": 2, "all": 0}.get(run, 1)
    assert sliced_products(dense) == 0
    assert_dense(model, dense, rows, run)
    assert model.head._parameters["weight"].grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_fp32_rows_over_tables_of_any_dtype(kind: str, dtype: torch.dtype) -> None:
    model, dense, rows = pair("middle", dtype, **KINDS[kind])
    assert sliced_products(model) == 2
    assert_dense(
        model,
        dense,
        rows,
        "middle",
        rtol=1e-5 if dtype == torch.float32 else 0.05,
        atol=1e-6 if dtype == torch.float32 else 0.02,
    )
    assert all(part.grad.dtype == torch.float32 for part in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_has_only_the_dense_models_products(kind: str) -> None:
    model, dense, rows = pair("middle", **KINDS[kind])
    dense.embed.weight.requires_grad_(False)
    dense.head.weight.requires_grad_(False)
    made = []
    for one in (model, dense):
        with OperationCounter() as calls:
            loss(one).backward()
        made.append(calls)
    assert made[0].count("mm", "addmm", size=len(RUNS["middle"]) * D) == 1  # the rows' own gradient
    for size in (IDS.numel() * V, V * D, len(RUNS["middle"]) * D):
        copies = ("clone", "copy_", "add", "add_", "sub", "index_select", "scatter_", "index_copy_", "cat")
        assert made[0].count(*copies, size=size) == made[1].count(*copies, size=size)
    assert rows[-1].grad is not None


def test_gradients_of_gradients_are_the_dense_models() -> None:
    model, dense, (rows,) = pair("middle", bias=True)
    found = []
    for one, weight in ((model, rows), (dense, dense.embed.weight)):
        first = torch.autograd.grad(loss(one), [one.body.weight, weight], create_graph=True)
        wanted = first[1][list(RUNS["middle"])] if one is dense else first[1]
        total = first[0].square().sum() + wanted.square().sum()
        second = torch.autograd.grad(total, [one.body.weight, weight])
        found.append((second[0], second[1][list(RUNS["middle"])] if one is dense else second[1]))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(D,), (0, D), (2, 0, D), (1, 1, 1, D)])
def test_hidden_states_of_any_shape(shape: tuple[int, ...]) -> None:
    model, dense, (rows,) = pair()
    hidden = torch.randn(shape, dtype=torch.float64)
    for one in (model, dense):
        one.head(hidden.clone().requires_grad_()).square().sum().backward()
    torch.testing.assert_close(model.head(hidden), dense.head(hidden), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rows.grad, dense.embed.weight.grad[list(RUNS["last"])], rtol=1e-12, atol=1e-12)


def test_hidden_states_that_are_not_contiguous() -> None:
    model, dense, (rows,) = pair("middle")
    found = []
    for one in (model, dense):
        hidden = torch.randn(3, D, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        logits = one.head(hidden.transpose(1, 2))
        logits /= 30.0  # soft caps and temperatures do so in place
        logits.logsumexp(-1).sum().backward()
        found.append((logits, hidden.grad))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rows.grad, dense.embed.weight.grad[list(RUNS["middle"])], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_head(reentrant: bool) -> None:
    model, dense, (rows,) = pair("middle")
    for one in (model, dense):
        shift = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        checkpoint(lambda s, one=one: one(IDS) + s, shift, use_reentrant=reentrant).logsumexp(-1).sum().backward()
    torch.testing.assert_close(rows.grad, dense.embed.weight.grad[list(RUNS["middle"])], rtol=1e-12, atol=1e-12)


def _autocast(model: Any, dense: Any) -> Any:
    return torch.autocast("cpu", torch.bfloat16)


def _no_grad(model: Any, dense: Any) -> Any:
    return torch.no_grad()


@pytest.mark.parametrize("around", [_autocast, _no_grad, lambda *_: torch.inference_mode()])
def test_columns_are_replaced_without_gradients_or_under_autocast(around: Any) -> None:
    model, dense, _ = pair("middle", torch.float32)
    with around(model, dense):
        with OperationCounter() as calls:
            found = model(IDS)
        wanted = dense(IDS)
    assert calls.count("mm", "addmm", "linear", size=IDS.numel() * V) == 1
    torch.testing.assert_close(found, wanted, rtol=0.02 if around is _autocast else 1e-6, atol=0.01)
    outside = [column for column in range(V) if column not in RUNS["middle"]]
    if around is not _autocast:
        assert torch.equal(found[..., outside], wanted[..., outside])


def _train_bias(model: Any) -> None:
    model.head.bias.requires_grad_(True)


def _train_table(model: Any) -> None:
    model.embed.weight.requires_grad_(True)


def _own_forward(model: Any) -> None:
    run = type(model.head).forward
    model.head.forward = lambda hidden: run(model.head, hidden)


@pytest.mark.parametrize("change", [_train_bias, _train_table, _own_forward])
def test_heads_that_are_not_sliced(change: Any) -> None:
    model, dense, rows = pair("middle", bias=True)
    change(model)
    with OperationCounter() as calls:
        model(IDS)
    assert calls.count("mm", "addmm", size=IDS.numel() * V) == 1
    assert_dense(model, dense, rows, "middle")
    if change is _train_bias:
        torch.testing.assert_close(model.head.bias.grad, dense.head.bias.grad, rtol=1e-12, atol=1e-12)


def test_few_rows_replace_their_columns() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(1000, D), nn.Linear(D, 1000, bias=False))
    model[1].weight = model[0].weight
    es.attach(model, es.TrainableTokensConfig([996, 997, 998, 999]))
    with OperationCounter() as calls:
        model(IDS)
    assert calls.count("mm", size=IDS.numel() * 1000) == 1
    assert calls.count("mm", size=IDS.numel() * 4) == 1


def test_two_adapters_and_mixed_batches() -> None:
    model, dense, (rows,) = pair("middle")
    attachment = es.get_attachment(model)
    es.attach(model, es.TrainableTokensConfig(list(RUNS["last"])), name="other", freeze=False)
    (others,) = (part for part in attachment.parameters() if part is not rows)
    with torch.no_grad():
        others.normal_()
    attachment.activate("default")
    alone = model(IDS[:1])
    assert sliced_products(model) == 2
    torch.testing.assert_close(alone, dense(IDS[:1]), rtol=1e-12, atol=1e-12)
    with attachment.per_sample(["default", None]):
        mixed = model(IDS)
    torch.testing.assert_close(mixed[:1], alone, rtol=1e-12, atol=1e-12)
    attachment.activate("default", "other")
    with torch.no_grad():
        dense.embed.weight[list(RUNS["last"])] = others.double()
    assert_dense(model, dense, [rows], "middle")


def test_user_hooks_see_the_weight_and_the_new_logits() -> None:
    model, dense, _ = pair("middle")
    seen: dict[str, Any] = {}

    def before(module: Any, args: Any) -> None:
        seen["weight"] = module.weight * 1.0
        seen["shape"], seen["pointer"] = module.weight.shape, module.weight.data_ptr()

    def after(module: Any, args: Any, output: Any) -> None:
        seen["weight after"], seen["logits"] = module.weight, output.detach()

    model.head.register_forward_pre_hook(before)
    model.head.register_forward_hook(after)
    logits = model.head(torch.ones(2, D, dtype=torch.float64))
    base = model.head._parameters["weight"]
    assert torch.equal(seen["weight"], base)
    assert (seen["shape"], seen["pointer"]) == (base.shape, base.data_ptr())
    assert seen["weight after"] is base
    assert torch.equal(seen["logits"], logits)
    torch.testing.assert_close(logits, dense.head(torch.ones(2, D, dtype=torch.float64)), rtol=1e-12, atol=1e-12)


def test_a_failed_call_uncovers_the_weight() -> None:
    model, dense, rows = pair()
    base = model.head._parameters["weight"]
    with pytest.raises(RuntimeError):
        model.head(torch.ones(2, D + 1, dtype=torch.float64))
    assert model.head.weight is base
    assert_dense(model, dense, rows, "last")


def test_the_next_use_uncovers_the_weight_of_an_interrupted_call() -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    for use in (
        es.get_attachment,
        lambda model: model.head(torch.ones(2, D, dtype=torch.float64)),
        lambda model: loss(model),
    ):
        model, dense, rows = pair()
        handle = model.head.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.head(torch.ones(2, D, dtype=torch.float64))
        handle.remove()
        assert isinstance(model.head.weight, SlicedWeight)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_dense(copied, copy.deepcopy(dense), list(es.get_attachment(copied).parameters()), "last")
        use(model)
        assert model.head.weight is model.head._parameters["weight"]
        assert_dense(model, dense, rows, "last")


def test_two_threads_in_one_head() -> None:
    model, dense, _ = pair("last", tie=False)
    together = threading.Barrier(2, timeout=30)

    def wait(*_: Any) -> None:
        together.wait()

    model.head.register_forward_pre_hook(wait)  # both threads have covered the weight
    model.head.register_forward_hook(wait, prepend=True)  # both have their product before either takes it
    hidden = torch.randn(3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found: list[torch.Tensor] = []

    def work(one: Any) -> None:
        given = hidden.clone().requires_grad_()
        one.head(given).logsumexp(-1).square().sum().backward()
        found.append(given.grad)

    threads = [threading.Thread(target=work, args=(model,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    work(dense)
    assert len(found) == 3
    for gradient in found[:2]:
        torch.testing.assert_close(gradient, found[2], rtol=1e-12, atol=1e-12)
    assert model.head.weight is model.head._parameters["weight"]


@pytest.mark.parametrize("run", ["last", "middle"])
@pytest.mark.parametrize("how", ["before ours", "of all modules"])
def test_an_earlier_hook_that_returns_another_tensor(how: str, run: str) -> None:
    model, dense, rows = pair(run)

    def another(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.clone()

    if how == "before ours":
        for one in (model, dense):
            one.head.register_forward_hook(another, prepend=True)
        assert_dense(model, dense, rows, run)
        return
    handle = torch.nn.modules.module.register_module_forward_hook(another)
    try:
        assert_dense(model, dense, rows, run)
    finally:
        handle.remove()

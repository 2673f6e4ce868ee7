"""More rows than tokens: sparse gradients of lookups are added to the head's; columns in chunks and in slices."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import embedsurgery as es
from embedsurgery.runtime.rows import columns as columns_module
from tests.support.calls import OperationCounter
from tests.support.row_models import IDS, RUN, SPREAD, D, V, dense_gradients, pair, step


def lm_loss(one: Any) -> torch.Tensor:
    return F.cross_entropy(one(IDS).flatten(0, 1), IDS.flip(0).flatten())


def twice(one: Any) -> torch.Tensor:
    """Return a loss of two lookups and two heads, as with an encoder and a decoder."""
    return one(IDS).square().mean() + one(IDS.flip(1) + 1).logsumexp(-1).sum()


def checkpointed(one: Any, reentrant: bool) -> torch.Tensor:
    shift = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    logits = checkpoint(lambda s: one(IDS) + s, shift, use_reentrant=reentrant)
    return logits.logsumexp(-1).sum()


LOSSES: dict[str, Callable[[Any], torch.Tensor]] = {
    "of the logits": lm_loss,
    "of hidden states alone": lambda one: one.hidden(IDS).square().sum(),
    "of logits and hidden states": lambda one: lm_loss(one) + one.hidden(IDS).square().sum(),
    "of the head alone": lambda one: one.head(torch.ones(2, 3, D, dtype=torch.float64)).logsumexp(-1).sum(),
    "of two passes": twice,
    "checkpointed": lambda one: checkpointed(one, False),
    "checkpointed, reentrant": lambda one: checkpointed(one, True),
}
KINDS: dict[str, dict[str, bool]] = {
    "tied": {},
    "untied": {"tie": False},
    "tied, bias": {"bias": True},
    "sparse lookup": {"tie": False, "sparse": True},
}


@pytest.mark.parametrize("indices", [SPREAD, RUN, RUN[::-1]], ids=["spread", "run", "backwards"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_dense_models(kind: str, loss: str, indices: list[int]) -> None:
    model, dense, rows = pair(indices, **KINDS[kind])
    for _ in range(2):
        torch.testing.assert_close(step(model, LOSSES[loss]), step(dense, LOSSES[loss]), rtol=1e-12, atol=1e-12)
        wanted = dense_gradients(dense, indices)
        found = [part.grad for part in rows if part.grad is not None]
        for part, gradient in zip(found, wanted, strict=True):
            assert not part.is_sparse
            torch.testing.assert_close(part, gradient, rtol=0, atol=1e-12)
        if dense.body.weight.grad is not None:
            torch.testing.assert_close(model.body.weight.grad, dense.body.weight.grad, rtol=0, atol=1e-12)
        with torch.no_grad():  # as an optimizer would
            for part in rows:
                part.mul_(0.9)
            for module in {id(dense.embed.weight): dense.embed, id(dense.head.weight): dense.head}.values():
                module.weight[indices] *= 0.9


@pytest.mark.parametrize("indices", [SPREAD, RUN], ids=["spread", "run"])
@pytest.mark.parametrize("kind", ["tied", "untied", "tied, bias"])
def test_gradients_of_gradients(kind: str, indices: list[int]) -> None:
    model, dense, rows = pair(indices, **KINDS[kind])
    weights = list({id(w): w for w in (dense.embed.weight, dense.head.weight)}.values())
    found = []
    for one, parts in ((model, rows), (dense, weights)):
        first = torch.autograd.grad(one(IDS).logsumexp(-1).square().sum(), [one.body.weight, *parts], create_graph=True)
        small = first if one is model else (first[0], *(g[indices] for g in first[1:]))
        second = torch.autograd.grad(sum(g.square().sum() for g in small), [one.body.weight, *parts])
        found.append(second if one is model else (second[0], *(g[indices] for g in second[1:])))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("indices", [SPREAD, RUN], ids=["spread", "run"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_differences_in_chunks(
    indices: list[int], dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, dense, (rows,) = pair(indices, dtype)
    if autocast and dtype != torch.float32:
        pytest.skip("autocast is for fp32 weights")
    losses = []
    for size in (columns_module._CHUNK_BYTES, 1):  # one chunk, and chunks of as many rows as tokens
        monkeypatch.setattr(columns_module, "_CHUNK_BYTES", size)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            losses.append(step(model, lambda one: one(IDS).float().logsumexp(-1).sum()))
        step(dense, lambda one: one(IDS).float().logsumexp(-1).sum())
        exact = dtype == torch.float32 and not autocast
        loose = {"rtol": 0, "atol": 1e-5} if exact else {"rtol": 0.05, "atol": 0.05}
        assert rows.grad.dtype == torch.float32
        torch.testing.assert_close(rows.grad, dense_gradients(dense, indices)[0].float(), **loose)
        torch.testing.assert_close(model.body.weight.grad, dense.body.weight.grad, **loose)
    assert torch.equal(*losses)


def test_gradients_accumulate() -> None:
    model, dense, (rows,) = pair(SPREAD)
    for one in (model, dense):
        loss = lm_loss(one)
        loss.backward(retain_graph=True)
        loss.backward()
        lm_loss(one).backward()
    torch.testing.assert_close(rows.grad, dense_gradients(dense, SPREAD)[0], rtol=0, atol=1e-12)
    one, two = (torch.autograd.grad(lm_loss(model), rows)[0] for _ in range(2))
    assert torch.equal(one, two)


def test_a_hook_of_the_rows_sees_one_dense_gradient() -> None:
    model, dense, (rows,) = pair(SPREAD)
    seen: list[torch.Tensor] = []
    rows.register_hook(seen.append)
    step(model, lm_loss)
    step(dense, lm_loss)
    torch.testing.assert_close(seen, dense_gradients(dense, SPREAD), rtol=0, atol=1e-12)


@pytest.mark.parametrize("how", ["parameter", "data"])
def test_replaced_values_get_the_gradient(how: str) -> None:
    model, _, (rows,) = pair(SPREAD)
    step(model, lm_loss)
    before = rows.grad.clone()
    holder = next(m for m in model.modules() if getattr(m, "values", None) is rows)
    if how == "parameter":
        holder.values = nn.Parameter(rows.detach())  # over the same memory
        rows.grad = None
    else:
        rows.data = rows.data * 1.0
    step(model, lm_loss)
    assert (rows.grad is None) is (how == "parameter")
    torch.testing.assert_close(holder.values.grad, before, rtol=0, atol=1e-14)


def test_frozen_rows_and_inference() -> None:
    model, dense, (rows,) = pair(SPREAD)
    step(model, lm_loss)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(model(IDS), dense(IDS), rtol=0, atol=1e-13)
    rows.requires_grad_(False)
    rows.grad = None
    step(model, lm_loss)
    step(dense, lm_loss)
    assert rows.grad is None
    torch.testing.assert_close(model.body.weight.grad, dense.body.weight.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "moved"])
def test_copies_and_moves_after_a_step(how: str) -> None:
    model, _, (rows,) = pair(SPREAD)
    loss = step(model, lm_loss)
    before = rows.grad.clone()
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    other = model.to("cpu", torch.float64) if how == "moved" else other
    assert torch.equal(step(other, lm_loss), loss)
    (theirs,) = es.get_attachment(other).parameters()
    assert torch.equal(theirs.grad, before)


def test_torch_func() -> None:
    model, dense, (rows,) = pair(SPREAD)
    step(dense, lm_loss)
    name = next(n for n, p in model.named_parameters() if p is rows)

    def loss(values: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(
            torch.func.functional_call(model, {name: values}, IDS).flatten(0, 1), IDS.flip(0).flatten()
        )

    found = torch.func.grad(loss)(rows.detach())
    torch.testing.assert_close(found, dense_gradients(dense, SPREAD)[0], rtol=0, atol=1e-12)
    given = rows.detach().clone().requires_grad_()
    loss(given * 1.0).backward()
    torch.testing.assert_close(given.grad, found, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # both are dynamo's own doing
@pytest.mark.parametrize(
    "indices", [pytest.param(SPREAD, id="spread", marks=pytest.mark.sweep), pytest.param(RUN, id="run")]
)
def test_compiled_for_fewer_and_more_tokens_than_rows(indices: list[int]) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    model, dense, (rows,) = pair(indices)
    step(model, lm_loss)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for length in (3, 4, 30, 5):
        ids = torch.arange(2 * length).reshape(2, length) % V
        for one, run in ((model, compiled), (dense, dense)):
            one.zero_grad()
            run(ids).logsumexp(-1).sum().backward()
        torch.testing.assert_close(rows.grad, dense_gradients(dense, indices)[0], rtol=0, atol=1e-11)
        frames.append(counter.frame_count)
    assert len(set(frames)) == 1


@pytest.mark.parametrize("indices", [SPREAD, RUN], ids=["spread", "run"])
@pytest.mark.parametrize("kind", ["tied", "untied", "tied, bias"])
def test_no_needless_copies(kind: str, indices: list[int]) -> None:
    model, _, _ = pair(indices, **KINDS[kind])
    step(model, lm_loss)
    model.zero_grad()
    with OperationCounter() as calls:
        logits = model(IDS)
    moved = {"scatter_", "copy_", "clone", "index_add_", "index_copy_", "add", "gather", "index_select", "index", "sub"}
    written = {name: [size for one, size in calls.seen if one == name] for name in moved}
    assert written["scatter_"] == ([] if indices is RUN else [IDS.numel() * V])
    assert IDS.numel() * V not in [size for name in moved - {"scatter_"} for size in written[name]]
    with OperationCounter() as calls:
        logits.backward(torch.ones_like(logits))
    seen = [(name, size) for name, size in calls.seen if name in moved | {"_to_dense", "add_", "new_zeros"}]
    assert not [name for name, size in seen if size == IDS.numel() * V]
    rows = len(indices) * D
    assert [name for name, size in seen if size == rows and name != "index_add_"] == (
        [] if indices is RUN else ["index_select", "sub"]  # the change from the old rows to the new
    )


@pytest.mark.parametrize("indices", [SPREAD, RUN], ids=["spread", "run"])
def test_values_set_to_another_part_of_the_same_storage(indices: list[int]) -> None:
    model, dense, (rows,) = pair(indices)
    both = torch.randn(2, *rows.shape, dtype=rows.dtype, generator=torch.Generator().manual_seed(2))
    for values in both:
        rows.data = values
        dense.embed.weight.data[indices] = values
        rows.grad = None
        torch.testing.assert_close(step(model, _of_logits), step(dense, _of_logits), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(rows.grad, dense_gradients(dense, indices)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("indices", [SPREAD, SPREAD[:2]], ids=["more rows than tokens", "fewer"])
def test_batched_gradients(indices: list[int]) -> None:
    model, dense, (rows,) = pair(indices)
    several = torch.randn(2, *IDS.shape, V, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (found,) = torch.autograd.grad(model(IDS), rows, several, is_grads_batched=True)
    (wanted,) = torch.autograd.grad(dense(IDS), dense.embed.weight, several, is_grads_batched=True)
    torch.testing.assert_close(found, wanted[:, indices], rtol=1e-12, atol=1e-12)


def _of_logits(one: Any) -> torch.Tensor:
    return one(IDS).logsumexp(-1).square().sum()

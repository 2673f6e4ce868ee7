"""New columns of frozen logits: exact values, the dense model's gradients, and only the products that they need."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import embedsurgery as es
from embedsurgery.errors import EmbedSurgeryWarning
from embedsurgery.runtime.rows.columns import new_columns
from tests.support.calls import OperationCounter
from tests.support.modules import Conv1D as walker_Conv1D

V, D, K = 50, 6, 3
INDICES = [31, 4, 17]


class Dense(nn.Module):
    """An embedding, a trainable body and a head."""

    def __init__(self, head: nn.Module, tie: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.body = nn.Linear(D, D)
        self.head = head
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(self.embed(ids))))


class Conv1D(walker_Conv1D):
    """A transposed projection to this file's vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, V))
        self.bias = nn.Parameter(torch.randn(V))


HEADS: dict[str, tuple[Any, bool]] = {
    "tied": (lambda: nn.Linear(D, V, bias=False), True),
    "untied": (lambda: nn.Linear(D, V, bias=False), False),
    "tied with a bias": (lambda: nn.Linear(D, V), True),
    "transposed with a bias": (Conv1D, False),
}


def pair(head: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any, list[torch.Tensor]]:
    """Return an attached model with random rows whose body trains too, a dense model with these rows, and the rows."""
    torch.manual_seed(0)
    make, tie = HEADS[head]
    model = Dense(make(), tie).to(dtype)
    dense = copy.deepcopy(model)
    model.requires_grad_(False)
    model.body.requires_grad_(True)
    targets = ["embed"] if tie else ["embed", "head"]
    attachment = es.attach(model, es.TrainableTokensConfig(INDICES, target_modules=targets), freeze=False, **options)
    rows = list(attachment.parameters())
    with torch.no_grad():
        for part, module in zip(rows, (dense.embed, dense.head), strict=False):
            part.normal_()
            weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
            weight[INDICES] = part.to(dtype)
    return model, dense, rows


def dense_rows(dense: Any, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    found = [dense.embed.weight.grad[INDICES]]
    if len(rows) == 2:
        gradient = dense.head.weight.grad
        found.append((gradient.t() if isinstance(dense.head, Conv1D) else gradient)[INDICES])
    return found


IDS = torch.tensor([[4, 9, 31, 2], [17, 17, 0, 5]])


@pytest.mark.parametrize("head", HEADS)
def test_gradients_are_the_dense_models(head: str) -> None:
    model, dense, rows = pair(head)
    for one in (model, dense):
        F.cross_entropy(one(IDS).flatten(0, 1), IDS.flip(0).flatten()).backward()
    torch.testing.assert_close(model(IDS), dense(IDS), rtol=0, atol=1e-13)
    for part, expected in zip(rows, dense_rows(dense, rows), strict=True):
        torch.testing.assert_close(part.grad, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.body.weight.grad, dense.body.weight.grad, rtol=0, atol=1e-12)
    assert model.embed.weight.grad is None


@pytest.mark.parametrize("head", HEADS)
def test_gradients_of_gradients_are_the_dense_models(head: str) -> None:
    model, dense, rows = pair(head)
    second = []
    for one, parts in ((model, rows), (dense, None)):
        weights = [dense.embed.weight] if len(rows) == 1 else [dense.embed.weight, dense.head.weight]
        wanted = [one.body.weight, *(parts or weights)]
        first = torch.autograd.grad(one(IDS).logsumexp(-1).square().sum(), wanted, create_graph=True)
        if parts is None:
            picked = [g.t() if g.shape[0] == D else g for g in first[1:]]
            first = (first[0], *(g[INDICES] for g in picked))
        loss = sum(g.square().sum() for g in first)
        found = torch.autograd.grad(loss, wanted)
        if parts is None:
            found = (found[0], *((g.t() if g.shape[0] == D else g)[INDICES] for g in found[1:]))
        second.append(found)
    for one, two in zip(*second, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_new_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, rows = (torch.randn(n, D, dtype=torch.float64, generator=generator).requires_grad_() for n in (5, K))
    weight = torch.randn(V, D, dtype=torch.float64, generator=generator)
    indices = torch.tensor(INDICES)

    def change(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return hidden @ (rows - weight[indices]).t()

    def ours(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return new_columns(hidden, rows, weight, indices, None)

    assert torch.equal(ours(hidden, rows), F.linear(hidden, rows))
    direction = torch.randn(5, K, dtype=torch.float64, generator=generator)
    for found, expected in zip(
        torch.autograd.grad((ours(hidden, rows) * direction).sum(), (hidden, rows)),
        torch.autograd.grad((change(hidden, rows) * direction).sum(), (hidden, rows)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    batch = torch.randn(4, 5, D, dtype=torch.float64, generator=generator)
    each = torch.func.vmap(torch.func.grad(lambda h: ours(h, rows).square().sum()))(batch)
    for h, found in zip(batch, each, strict=True):
        new = F.linear(h, rows)
        torch.testing.assert_close(found, 2 * new @ (rows - weight[indices]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("head", ["tied", "tied with a bias"])
def test_a_trained_table_has_the_dense_gradient(head: str) -> None:
    model, dense, (rows,) = pair(head)
    model.requires_grad_(True)
    for one in (model, dense):
        one(IDS).logsumexp(-1).square().sum().backward()
    torch.testing.assert_close(rows.grad, dense.embed.weight.grad[INDICES], rtol=0, atol=1e-12)
    expected = dense.embed.weight.grad.clone()
    expected[INDICES] = 0
    torch.testing.assert_close(model.embed.weight.grad, expected, rtol=0, atol=1e-12)
    for name, parameter in model.head.named_parameters():
        if name == "bias":
            torch.testing.assert_close(parameter.grad, dense.head.bias.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("head", HEADS)
def test_under_autocast_products_are_bf16_and_gradients_fp32(head: str) -> None:
    model, dense, rows = pair(head, torch.float32)
    for one in (model, dense):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = one(IDS)
        assert found.dtype == (torch.float32 if head.startswith("transposed") else torch.bfloat16)
        found.float().logsumexp(-1).sum().backward()
    for part, expected in zip(rows, dense_rows(dense, rows), strict=True):
        assert part.grad.dtype == torch.float32
        torch.testing.assert_close(part.grad, expected, rtol=0.05, atol=0.02)
    torch.testing.assert_close(model.body.weight.grad, dense.body.weight.grad, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_rows_of_a_16_bit_table(dtype: torch.dtype) -> None:
    model, dense, (rows,) = pair("tied", dtype)
    assert torch.equal(model(IDS), dense(IDS))
    for one in (model, dense):
        one(IDS).float().logsumexp(-1).sum().backward()
    assert rows.grad.dtype == torch.float32
    torch.testing.assert_close(rows.grad, dense.embed.weight.grad[INDICES].float(), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("frozen", ["body", "rows"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    model, dense, parts = pair("untied")
    rows = parts[1]
    if frozen == "body":
        model.body.requires_grad_(False)
        parts[0].requires_grad_(False)
    else:
        rows.requires_grad_(False)
    for one in (model, dense):
        one(IDS).logsumexp(-1).square().sum().backward()
    if frozen == "body":
        torch.testing.assert_close(rows.grad, dense.head.weight.grad[INDICES], rtol=0, atol=1e-12)
    else:
        assert rows.grad is None
        torch.testing.assert_close(model.body.weight.grad, dense.body.weight.grad, rtol=0, atol=1e-12)


def test_one_product_over_the_rows_forward_and_two_backward() -> None:
    model, _, _ = pair("untied")
    with OperationCounter() as calls:
        loss = model(IDS).logsumexp(-1).sum()
    assert calls.count("mm", "addmm", size=IDS.numel() * K) == 1
    with OperationCounter() as calls:
        loss.backward()
    products = [size for name, size in calls.seen if name in ("mm", "addmm")]
    assert products.count(K * D) == 1
    assert products.count(IDS.numel() * D) == 3  # through the head, its columns, and the body


def test_a_mixed_batch_copies_no_logits() -> None:
    model, _, (rows,) = pair("tied")
    attachment = es.get_attachment(model)
    with attachment.per_sample(["default", None]), OperationCounter() as calls:
        mixed = model(IDS)
    names = {name for name, number in calls.seen if number == IDS.numel() * V}
    assert names <= {"mm", "_unsafe_view", "view", "t", "index_add_", "scatter_", "detach"}
    mixed.logsumexp(-1).square().sum().backward()
    found, rows.grad = rows.grad, None
    model(IDS[:1]).logsumexp(-1).square().sum().backward()
    torch.testing.assert_close(found, rows.grad, rtol=0, atol=1e-12)
    with attachment.disabled():
        base = model(IDS)
    assert torch.equal(mixed[1], base[1])
    torch.testing.assert_close(mixed[0], model(IDS)[0], rtol=0, atol=0)


@pytest.mark.parametrize("head", HEADS)
def test_one_position(head: str) -> None:
    model, dense, _ = pair(head)
    hidden = torch.randn(D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    given = [hidden.clone().requires_grad_() for _ in range(2)]
    found, wanted = model.head(given[0]), dense.head(given[1])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    found.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(given[0].grad, given[1].grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [float("nan"), float("inf"), 3e4, 1e3])
@pytest.mark.parametrize("second", [False, True])
def test_old_rows_that_would_distort_the_gradient(size: float, dtype: torch.dtype, second: bool) -> None:
    """Spare rows of a table may hold anything. The adapter that sets them is the only one, or the second."""
    torch.manual_seed(0)
    model = Dense(nn.Linear(D, V, bias=False), True).to(dtype)
    with torch.no_grad():
        model.embed.weight[INDICES[0]] = size
    dense = copy.deepcopy(model)
    model.requires_grad_(False)
    model.body.requires_grad_(True)
    if second:
        es.attach(model, es.TrainableTokensConfig([9]), name="first", freeze=False)
    with pytest.warns(EmbedSurgeryWarning, match=r"embed\.weight.* head \(Linear\) .*non-finite"):
        attachment = es.attach(model, es.TrainableTokensConfig(INDICES), freeze=False)
    rows = attachment.rows_of["adapter_default"][0].values
    with torch.no_grad():
        rows.normal_()
        dense.embed.weight[INDICES] = rows.to(dtype)
    ids = torch.tensor([[4, 17, 5], [31, 9, 2]])
    for one in (model, dense):
        F.cross_entropy(one(ids).flatten(0, 1).float(), ids.flip(0).flatten()).backward()
    assert torch.equal(model(ids), dense(ids))
    assert torch.equal(model.body.weight.grad, dense.body.weight.grad)


def test_old_rows_of_a_usual_size_cost_no_copy() -> None:
    torch.manual_seed(0)
    model = Dense(nn.Linear(D, V, bias=False), True)
    with torch.no_grad():
        model.embed.weight[INDICES[0]] *= 10
        model.embed.weight[INDICES[1]] = 0
        model.embed.weight[9] = float("nan")  # a row that is not trained
        model.embed.weight[18:45] *= 1e-4  # rows that were never trained, and are nearly zero
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        es.attach(model, es.TrainableTokensConfig(INDICES))


def test_a_second_adapter_that_asks_for_a_full_copy_gets_one() -> None:
    model, dense, _ = pair("tied")
    attachment = es.attach(model, es.TrainableTokensConfig([9]), name="second", materialize=True, freeze=False)
    assert attachment._installation.copied_tables == {"embed.weight"}
    more = attachment.rows_of["adapter_second"][0].values
    with torch.no_grad():
        more.normal_()
        dense.embed.weight[9] = more[0]
    ids = torch.tensor([[4, 17, 9], [31, 9, 2]])
    torch.testing.assert_close(model(ids), dense(ids), rtol=1e-12, atol=1e-12)
    parts = (model, model.embed, model.body, model.head)
    hooks = [list(module._forward_hooks) for module in parts]
    third = es.attach(model, es.TrainableTokensConfig([11]), name="third", freeze=False)
    assert [list(module._forward_hooks) for module in parts] == hooks  # nothing to install
    third.detach()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

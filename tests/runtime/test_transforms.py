"""Attached models below transforms of torch.func, and their forward-mode derivatives: those of the edited model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.optim import swa_utils

import embedsurgery as es
from tests.support.models import tiny

V, D = 40, 8
ROWS = {"few": [31, 4, 17], "many, in a run": list(range(20, 40)), "many, spread": list(range(39, 0, -3))}
SLOW = pytest.mark.sweep
IDS = torch.tensor([[4, 9, 31, 22], [17, 17, 0, 36]])


class Model(nn.Module):
    """A language model that takes ids or embeddings; its head may read the weight directly."""

    def __init__(self, tie: bool, functional: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.body = nn.Linear(D, D)
        self.head = nn.Linear(D, V, bias=not tie)
        self.functional = functional
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor | None = None, x: torch.Tensor | None = None) -> torch.Tensor:
        hidden = torch.tanh(self.body(self.embed(ids) if x is None else x))
        return F.linear(hidden, self.head.weight, self.head.bias) if self.functional else self.head(hidden)


def pair(tie: bool, rows: str, functional: bool = False, materialize: bool = False) -> tuple[Any, Any, list[int]]:
    """Return an attached model with random rows, the edited model, and the row numbers."""
    torch.manual_seed(0)
    model = Model(tie, functional).double()
    dense, indices = copy.deepcopy(model).requires_grad_(False), ROWS[rows]
    targets = ["embed"] if tie else ["embed", "head"]
    attachment = es.attach(model, es.TrainableTokensConfig(indices, target_modules=targets), materialize=materialize)
    with torch.no_grad():
        for part, module in zip(attachment.parameters(), (dense.embed, dense.head), strict=False):
            part.normal_()
            module.weight[indices] = part
    return model, dense, indices


def dual(model: Any, x: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(x=forward_ad.make_dual(x, direction))).tangent


Of = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]
OF_INPUTS: dict[str, Of] = {
    "forward": lambda m, x, t: torch.func.jvp(lambda x: m(x=x), (x,), (t,))[1],
    "a dual tensor": dual,
    "a dual tensor without gradients": torch.no_grad()(dual),
    "linearised": lambda m, x, t: torch.func.linearize(lambda x: m(x=x), x)[1](t),
    "forward over reverse": lambda m, x, t: torch.func.jvp(
        torch.func.grad(lambda x: m(x=x).logsumexp(-1).sum()), (x,), (t,)
    )[1],
    "reverse over forward": lambda m, x, t: torch.func.grad(
        lambda x: torch.func.jvp(lambda x: m(x=x).square(), (x,), (t,))[1].sum()
    )(x),
    "reverse over reverse": lambda m, x, t: torch.func.grad(
        lambda x: (torch.func.grad(lambda x: m(x=x).logsumexp(-1).sum())(x) * t).sum()
    )(x),
    "of each sample": lambda m, x, t: torch.func.vmap(torch.func.grad(lambda x: m(x=x).logsumexp(-1).sum()))(x),
    "a Hessian": lambda m, x, t: torch.func.hessian(lambda x: m(x=x).logsumexp(-1).sum())(x),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning", "ignore:Attempted to insert a get_attr")
@pytest.mark.parametrize("how", [pytest.param(how, marks=SLOW if how == "linearised" else ()) for how in OF_INPUTS])
@pytest.mark.parametrize("rows", [pytest.param(rows, marks=SLOW if rows != "few" else ()) for rows in ROWS])
@pytest.mark.parametrize("tie", [True, False])
def test_derivatives_by_the_embeddings(how: str, rows: str, tie: bool) -> None:
    model, dense, _ = pair(tie, rows)
    x, direction = torch.randn(2, 2, 4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, expected = (OF_INPUTS[how](one, x, direction) for one in (model, dense))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*materialize=True:embedsurgery.errors.EmbedSurgeryWarning")
@pytest.mark.parametrize(("functional", "materialize"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("rows", [pytest.param(rows, marks=SLOW if "spread" in rows else ()) for rows in ROWS])
@pytest.mark.parametrize("tie", [True, False])
def test_derivatives_by_the_rows(rows: str, tie: bool, functional: bool, materialize: bool) -> None:
    model, dense, indices = pair(tie, rows, functional, materialize)
    parts = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    tables = ["embed.weight", "head.weight"][: len(parts)]
    names = dict(zip(parts, tables, strict=True))
    directions = {name: torch.randn_like(part) for name, part in parts.items()}
    ids = torch.tensor(indices)

    def ours(parts: Any) -> torch.Tensor:
        return torch.func.functional_call(model, parts, (IDS,)).logsumexp(-1).square().sum()

    def theirs(parts: Any) -> torch.Tensor:
        weights = {names[n]: dense.get_parameter(names[n]).index_copy(0, ids, part) for n, part in parts.items()}
        return torch.func.functional_call(dense, weights, (IDS,)).logsumexp(-1).square().sum()

    for of in (
        lambda f: torch.func.jvp(f, (parts,), (directions,))[1],
        lambda f: torch.func.grad(f)(parts),
        lambda f: torch.func.jvp(torch.func.grad(f), (parts,), (directions,))[1],
        lambda f: torch.func.grad(lambda p: torch.func.jvp(f, (p,), (directions,))[1])(parts),
    ):
        torch.testing.assert_close(of(ours), of(theirs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("average", [swa_utils.get_ema_multi_avg_fn(0.9), None], ids=["EMA", "mean"])
@pytest.mark.parametrize("rows", ROWS)
def test_an_average_over_parameters_and_buffers_has_the_average_rows(rows: str, average: Any) -> None:
    model, dense, indices = pair(True, rows)
    averaged = swa_utils.AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    part = next(es.get_attachment(model).parameters())
    expected = part.detach().clone()
    averaged.update_parameters(model)
    for step in range(1, 4):
        with torch.no_grad():
            part.add_(0.5)
        averaged.update_parameters(model)
        expected = expected.lerp(part.detach(), 0.1 if average else 1 / (step + 1))
    with torch.no_grad():
        dense.embed.weight[indices] = expected
    torch.testing.assert_close(averaged(IDS), dense(IDS), rtol=0, atol=1e-6)


def test_a_mixed_batch_below_a_transform_is_each_sample_alone() -> None:
    model, dense, _ = pair(True, "few")
    x, direction = torch.randn(2, 2, 4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    attachment = es.get_attachment(model)
    with attachment.per_sample(["default", None]):
        mixed = OF_INPUTS["reverse over forward"](model, x, direction)
    with attachment.disabled():
        base = OF_INPUTS["reverse over forward"](model, x[1:], direction[1:])
    torch.testing.assert_close(mixed[1:], base, rtol=1e-10, atol=1e-10)
    alone = OF_INPUTS["reverse over forward"](dense, x[:1], direction[:1])
    torch.testing.assert_close(mixed[:1], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*searchsorted.*non-contiguous:UserWarning")
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_stacked_models() -> None:
    """An ensemble of attached models: ``torch.func.stack_module_state`` and a vmap over it."""
    models, edited = [], []
    for seed in range(2):
        model = tiny("llama-tied", seed=seed)
        attachment = es.attach(model, es.TrainableTokensConfig([5, 7]))
        with torch.no_grad():
            (rows,) = attachment.parameters()
            rows.add_(seed + 1.0)
            edited.append(tiny("llama-tied", seed=seed))
            edited[-1].model.embed_tokens.weight[[5, 7]] = rows
        models.append(model)
    parameters, buffers = torch.func.stack_module_state(models)
    inputs = {"input_ids": torch.tensor([[5, 9, 7, 3]]), "use_cache": False}

    def run(parameters: Any, buffers: Any) -> torch.Tensor:
        return torch.func.functional_call(models[0], (parameters, buffers), (), inputs).logits

    found = torch.func.vmap(run)(parameters, buffers)
    for logits, one in zip(found, edited, strict=True):
        torch.testing.assert_close(logits, one(**inputs).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("materialize", [False, True])
def test_a_traced_model(materialize: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(40, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 40))
    merged = copy.deepcopy(model)
    attachment = es.attach(model, es.TrainableTokensConfig([5, 7], target_modules=["0", "2"]), materialize=materialize)
    with torch.no_grad():
        for rows, place in zip(attachment.parameters(), (0, 2), strict=True):
            rows.add_(1.0)
            merged[place].weight[[5, 7]] = rows
    ids = torch.tensor([[5, 9, 7, 3]])
    traced = torch.jit.trace(model, (ids,), check_trace=False)
    torch.testing.assert_close(traced(ids.flip(1)), merged(ids.flip(1)))

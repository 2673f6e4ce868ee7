"""Two threads in one attached model: the second one starts at each place of the package's code, one per run."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

from embedsurgery.runtime.calls import ActiveCalls
from tests.support.interleaved import Interleaved
from tests.support.readers import IDS, INDICES, attached, reader
from tests.support.row_models import IDS as WORDS
from tests.support.row_models import RUN, SPREAD, dense_gradients, pair
from tests.support.threads import READS, two_inputs

pytestmark = pytest.mark.filterwarnings("ignore:.*materialize=True:embedsurgery.errors.EmbedSurgeryWarning")

OTHERS = torch.tensor([[4, 3, 1], [2, 2, 8]])
MIDDLES = ["within", "ends after"]
everywhere = pytest.mark.sweep


def test_active_calls() -> None:
    calls: ActiveCalls[int] = ActiveCalls()

    class Notes:
        def enter(self, *_: Any) -> None:
            assert calls.now() is None
            calls.begin(threading.get_ident())
            assert calls.now() == threading.get_ident()

        def leave(self, *_: Any) -> None:
            value = calls.now()
            assert value == threading.get_ident()
            calls.end(value)
            assert calls.now() is None

    module, inner = nn.Sequential(nn.Identity()), nn.Identity()
    module[0] = inner
    module.register_forward_pre_hook(Notes().enter)
    module.register_forward_hook(Notes().leave)

    def run() -> None:
        module(torch.zeros(1))

    for half in (False, True):
        two = Interleaved(run, run, within="runtime/calls.py", opcodes=True)
        if half:
            inner.register_forward_pre_hook(two.wait_half_way)
        assert two.run_at_each_place() > 100


def soft_prompts(kind: str, middle: str, within: str = "") -> None:
    model, check = two_inputs(kind)
    two = Interleaved(lambda: check(0), lambda: check(1), within=within)
    if middle != "within":
        norms = [module for module in model.modules() if "Norm" in type(module).__name__]
        norms[-1].register_forward_pre_hook(two.wait_half_way)
    assert two.run_at_each_place() > 20


@pytest.mark.parametrize("middle", MIDDLES)
@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_soft_prompts_at_each_line_of_calls(kind: str, middle: str) -> None:
    soft_prompts(kind, middle, "runtime/calls.py")


@everywhere
@pytest.mark.parametrize("middle", MIDDLES)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bart"])
def test_soft_prompts(kind: str, middle: str) -> None:
    soft_prompts(kind, middle)


@everywhere
@pytest.mark.parametrize("middle", MIDDLES)
@pytest.mark.parametrize("trains", [(True, False), (True, True)], ids=str)
@pytest.mark.parametrize("materialize", [False, True])
def test_a_weight_that_is_read(materialize: bool, trains: tuple[bool, bool], middle: str) -> None:
    model, edited, (rows,) = attached(reader(""), materialize=materialize)
    model.read = edited.read = READS["both"]
    model(IDS)
    run_both(model, edited, [rows], INDICES, (IDS, OTHERS), trains, None if middle == "within" else model.embed)


@everywhere
@pytest.mark.parametrize("middle", MIDDLES)
@pytest.mark.parametrize("trains", [(True, False), (True, True)], ids=str)
@pytest.mark.parametrize("indices", [RUN, SPREAD], ids=["run", "spread"])
def test_more_rows_than_tokens(indices: list[int], trains: tuple[bool, bool], middle: str) -> None:
    model, dense, rows = pair(indices)
    run_both(model, dense, rows, indices, (WORDS, WORDS + 1), trains, None if middle == "within" else model.body)


def run_both(
    model: Any,
    dense: Any,
    rows: list[Any],
    indices: list[int],
    given: tuple[torch.Tensor, ...],
    trains: tuple[bool, bool],
    half: nn.Module | None,
) -> None:
    """Check the logits and gradients of both threads against the edited model."""
    wanted = []
    for ids in given:
        dense.zero_grad()
        logits = dense(ids)
        logits.square().sum().backward()
        wanted.append((logits.detach(), [gradient.clone() for gradient in dense_gradients(dense, indices)]))

    def check(number: int) -> None:
        logits, gradients = wanted[number]
        with torch.set_grad_enabled(trains[number]):
            found = model(given[number])
        torch.testing.assert_close(found.detach(), logits, rtol=1e-12, atol=1e-12)
        if trains[number]:
            own = torch.autograd.grad(found.square().sum(), rows)
            torch.testing.assert_close(list(own), gradients, rtol=1e-10, atol=1e-10)

    two = Interleaved(lambda: check(0), lambda: check(1), patience=0.005)
    if half is not None:
        half.register_forward_pre_hook(two.wait_half_way)
    assert two.run_at_each_place() > 20

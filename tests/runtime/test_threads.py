"""Several threads in one attached model at once: each gets the numbers that it gets alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.support.prompted import prompted
from tests.support.readers import IDS, INDICES, attached, reader
from tests.support.row_models import IDS as WORDS
from tests.support.row_models import RUN, pair
from tests.support.threads import READS, two_inputs

pytestmark = pytest.mark.filterwarnings("ignore:.*materialize=True:embedsurgery.errors.EmbedSurgeryWarning")

ROUNDS = 60


@pytest.fixture
def _frequent_switches() -> Iterator[None]:
    """Make threads take turns a thousand times more often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(*works: Callable[[], None]) -> list[BaseException]:
    """Run each function in a thread of its own; return the errors."""
    raised: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    return raised


@pytest.mark.usefixtures("_frequent_switches")
@pytest.mark.parametrize("materialize", [False, True])
@pytest.mark.parametrize("how", READS)
def test_one_trains_and_another_evaluates(how: str, materialize: bool) -> None:
    model, edited, (rows,) = attached(reader(""), materialize=materialize)
    model.read = edited.read = READS[how]
    model(IDS)
    edited(IDS).square().sum().backward()
    logits, gradient = edited(IDS).detach(), edited.embed.weight.grad[INDICES]
    wrong: list[str] = []

    def train() -> None:
        for _ in range(ROUNDS):
            found = model(IDS)
            (own,) = torch.autograd.grad(found.square().sum(), [rows])
            if not torch.allclose(found, logits, rtol=1e-12, atol=1e-12):
                wrong.append("logits of the one that trains")
            if not torch.allclose(own, gradient, rtol=1e-10, atol=1e-10):
                wrong.append("gradient")

    def evaluate() -> None:
        for _ in range(ROUNDS):
            with torch.no_grad():
                if not torch.allclose(model(IDS), logits, rtol=1e-12, atol=1e-12):
                    wrong.append("logits of the one that evaluates")

    assert together(train, evaluate, evaluate) == []
    assert wrong == []
    for module in (model.embed, model.head):
        assert "weight" not in module.__dict__


@pytest.mark.parametrize("grad", [False, True])
def test_two_threads_in_the_lookup_then_read_the_weight(grad: bool) -> None:
    model, edited, (rows,) = attached(reader(""))
    model.read = edited.read = READS["reads the weight"]
    model(IDS)
    inside = threading.Barrier(2, timeout=30)

    def wait(*_: Any) -> None:
        inside.wait()

    handle = model.embed.register_forward_pre_hook(wait)
    found: list[torch.Tensor] = []

    def run() -> None:
        with torch.set_grad_enabled(grad):
            found.append(model(IDS))

    assert together(run, run) == []
    handle.remove()
    for one in (*found, model(IDS)):
        torch.testing.assert_close(one, edited(IDS), rtol=1e-12, atol=1e-12)
    if grad:
        edited(IDS).square().sum().backward()
        for one in found:
            (own,) = torch.autograd.grad(one.square().sum(), [rows])
            torch.testing.assert_close(own, edited.embed.weight.grad[INDICES], rtol=1e-10, atol=1e-10)


def test_an_interrupted_lookup_does_not_hide_the_rows_from_later_reads() -> None:
    model, edited, _ = attached(reader(""))
    model.read = edited.read = READS["reads the weight"]
    stop = [True]

    def interrupt(*_: Any) -> None:
        if stop[0]:
            raise KeyboardInterrupt

    model.embed.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(IDS)
    stop[0] = False
    torch.testing.assert_close(model(IDS), edited(IDS), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("materialize", [False, True])
def test_a_forward_that_enables_gradients(materialize: bool) -> None:
    """The weight is covered under no_grad, without gradients; later in the forward they are needed."""

    def read(m: Any, ids: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            return F.linear(m.embed(ids), m.embed.weight)

    model, edited, (rows,) = attached(reader(""), materialize=materialize)
    model.read = edited.read = read
    with torch.no_grad():
        found, wanted = model(IDS), edited(IDS)
    found.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rows.grad, edited.embed.weight.grad[INDICES], rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("_frequent_switches")
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bart"])
def test_soft_prompts(kind: str) -> None:
    _, check = two_inputs(kind)

    def work(number: int) -> None:
        for _ in range(20):
            check(number)

    assert together(lambda: work(0), lambda: work(1)) == []


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bart"])
@pytest.mark.parametrize("labels", [False, True])
def test_a_soft_prompt_after_an_interrupted_forward(kind: str, labels: bool) -> None:
    model, attachment = prompted(kind)
    ids = torch.randint(4, 20, (2, 6))
    more = {"decoder_input_ids": ids} if kind == "bart" else {}
    given = {"input_ids": ids, **more, **({"labels": ids} if labels else {})}
    before = model(**given)
    stop = [True]

    def interrupt(*_: Any) -> None:
        if stop[0]:
            raise KeyboardInterrupt

    norms = [m for m in model.modules() if type(m).__name__.endswith("Norm")]
    handle = norms[-1].register_forward_pre_hook(interrupt)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            model(**given)
    stop[0] = False
    after = model(**given)
    assert torch.equal(after.logits, before.logits)
    assert not labels or torch.equal(after.loss, before.loss)
    handle.remove()
    options = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    told = model.generate(ids, **options)
    with attachment.disabled():
        plain = model(**given)
    assert not torch.equal(plain.logits, before.logits)
    assert torch.equal(
        model.generate(ids, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(ids)), told
    )
    after.logits.sum().backward()
    assert all(parameter.grad.any() for parameter in attachment.parameters())


def test_a_head_sliced_in_one_thread_only() -> None:
    """A thread whose head ran a plain product has its columns replaced, also if another thread's head was sliced."""
    torch.manual_seed(0)

    model, dense, _ = pair(RUN)
    logits = dense(WORDS)
    wrong: list[str] = []

    def work(grad: bool) -> None:
        for _ in range(ROUNDS):
            with torch.set_grad_enabled(grad):
                if not torch.allclose(model(WORDS), logits, rtol=1e-12, atol=1e-12):
                    wrong.append(f"gradients {grad}")

    assert together(lambda: work(True), lambda: work(False)) == []
    assert wrong == []


def test_one_thread_is_interrupted_while_another_runs() -> None:
    """The weight is uncovered when the last running forward has ended."""
    model, edited, _ = attached(reader(""))
    came, go = threading.Event(), threading.Event()

    def read(m: Any, ids: torch.Tensor) -> torch.Tensor:
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        came.set()
        assert go.wait(30)
        return F.linear(m.embed(ids), m.head.weight)

    model.read, edited.read = read, READS["reads the weight"]
    found: list[torch.Tensor] = []
    other = threading.Thread(target=lambda: found.append(model(IDS)))
    other.start()
    assert came.wait(30)
    with pytest.raises(KeyboardInterrupt):
        model(IDS)
    go.set()
    other.join(30)
    torch.testing.assert_close(found[0], edited(IDS), rtol=1e-12, atol=1e-12)
    assert model.head.weight is model.head._parameters["weight"]

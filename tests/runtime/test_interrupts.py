"""A forward, a backward or an attaching that any exception ends leaves the model right, or the next use does."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import embedsurgery as es
from embedsurgery.runtime.attachment import find_attachment
from tests.support.interleaved import interrupt_at_each_line
from tests.support.modules import D, V
from tests.support.prompt_models import tiny
from tests.support.prompted import prompted, randomise
from tests.support.readers import IDS, INDICES, Reader, attached, reader
from tests.support.row_models import IDS as WORDS
from tests.support.row_models import RUN, SPREAD, dense_gradients, pair
from tests.support.row_models import Model as Plain
from tests.support.threads import READS

pytestmark = pytest.mark.filterwarnings("ignore:.*materialize=True:embedsurgery.errors.EmbedSurgeryWarning")


class Body(nn.Module):
    """A part in the middle of a model, which may be called directly."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D, padding_idx=2)
        self.ending: BaseException | None = None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found = self.embed(ids) + F.embedding(ids, self.embed.weight * 2.0)
        if self.ending is not None:
            raise self.ending
        return found


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Body()
        self.head = nn.Linear(D, V, bias=False)
        self.head.weight = self.body.embed.weight
        self.ending: BaseException | None = None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.body(ids)
        if self.ending is not None:
            raise self.ending
        return F.linear(hidden, self.head.weight) + self.head(hidden)

    @property
    def embed(self) -> nn.Embedding:
        return self.body.embed


def interrupted(where: str, ending: BaseException, materialize: bool) -> tuple[Any, Any, Any, torch.Tensor]:
    """Return an attached model after an interrupted forward, the edited model, its rows, and the base's Parameter."""
    torch.manual_seed(0)
    model, edited, (rows,) = attached(Model(), materialize=materialize)
    weight = model.embed.weight
    part = model if where == "root" else model.body
    part.ending = ending
    with pytest.raises(type(ending)):
        model(IDS)
    part.ending = None
    return model, edited, rows, weight


@pytest.mark.parametrize("materialize", [True, False])
@pytest.mark.parametrize("where", ["root", "body"])
@pytest.mark.parametrize("ending", [KeyboardInterrupt(), SystemExit(1), ValueError()], ids=lambda e: type(e).__name__)
def test_the_base_is_unchanged_and_the_next_forward_is_right(
    where: str, ending: BaseException, materialize: bool
) -> None:
    model, edited, rows, weight = interrupted(where, ending, materialize)
    named = dict(model.named_parameters(remove_duplicate=False))
    assert named["head.weight"] is named["body.embed.weight"] is weight
    assert next(model.body.parameters()) is weight
    assert model.state_dict()["head.weight"].data_ptr() == weight.data_ptr()
    with torch.no_grad():
        rows.add_(1.0)
        edited.embed.weight[INDICES] = rows
    torch.testing.assert_close(model(IDS), edited(IDS), rtol=1e-13, atol=1e-13)
    assert model.head.weight is model.embed.weight is weight
    assert model.embed.padding_idx == 2


@pytest.mark.parametrize("materialize", [True, False])
def test_a_later_call_of_a_part_is_right(materialize: bool) -> None:
    model, edited, rows, _ = interrupted("root", KeyboardInterrupt(), materialize)
    with torch.no_grad():
        rows.add_(1.0)
        edited.embed.weight[INDICES] = rows
    torch.testing.assert_close(model.body(IDS), edited.body(IDS), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(model(IDS), edited(IDS), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("materialize", [True, False])
@pytest.mark.parametrize("use", ["attached", "merge", "detach", "disabled"])
def test_every_use_of_the_attachment_uncovers_the_weight(use: str, materialize: bool) -> None:
    model, _, rows, weight = interrupted("body", KeyboardInterrupt(), materialize)
    attachment: Any = next(m for m in model.children() if m not in (model.body, model.head))
    assert model.embed.weight is not weight
    if use == "attached":
        assert es.get_attachment(model) is attachment
    elif use == "merge":
        attachment.merge()
        assert torch.equal(model.embed.weight[INDICES], rows)
    elif use == "detach":
        attachment.detach()
    else:
        with attachment.disabled():
            pass
    assert model.head.weight is model.embed.weight is weight
    assert model.embed.padding_idx == 2


@pytest.mark.parametrize("materialize", [True, False])
def test_using_the_attachment_inside_a_forward_uncovers_nothing(materialize: bool) -> None:
    def read(m: Any, ids: torch.Tensor) -> torch.Tensor:
        assert (es.get_attachment(m) is None) == (m is edited)
        return F.linear(m.embed(ids), m.head.weight)

    model, edited, _ = attached(reader(""), materialize=materialize)
    model.read = edited.read = read
    torch.testing.assert_close(model(IDS), edited(IDS), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("materialize", [True, False])
def test_a_model_that_calls_itself(materialize: bool) -> None:
    def read(m: Any, ids: torch.Tensor) -> torch.Tensor:
        if len(ids) > 1:
            return torch.cat([m(part) for part in ids.split(1)]) + F.linear(m.embed(ids), m.head.weight)
        return F.linear(m.embed(ids), m.head.weight)

    model, edited, _ = attached(reader(""), materialize=materialize)
    model.read = edited.read = read
    torch.testing.assert_close(model(IDS), edited(IDS), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("materialize", [True, False])
def test_two_threads_in_one_model(materialize: bool) -> None:
    """The thread that enters first also leaves first, while the second one runs on."""
    came, go = threading.Event(), threading.Event()

    def read(m: Any, ids: torch.Tensor) -> torch.Tensor:
        if threading.current_thread() is first:
            came.set()
            assert go.wait(20)
        else:
            m.embed(ids)
            go.set()
            first.join(20)
        return F.linear(m.embed(ids), m.head.weight)

    model, edited, _ = attached(reader(""), materialize=materialize)
    edited.read = lambda m, ids: F.linear(m.embed(ids), m.head.weight)
    model.read = read
    found: list[torch.Tensor] = []
    first = threading.Thread(target=lambda: found.append(model(IDS)))
    first.start()
    assert came.wait(20)
    found.append(model(IDS))
    assert len(found) == 2
    for one in found:
        torch.testing.assert_close(one, edited(IDS), rtol=1e-13, atol=1e-13)
    assert type(model.embed.weight) is nn.Parameter


@pytest.mark.parametrize("materialize", [True, False])
def test_an_interrupted_backward(materialize: bool) -> None:
    def stop(gradient: torch.Tensor) -> None:
        raise KeyboardInterrupt

    model, edited, (rows,) = attached(reader("functional head"), materialize=materialize)
    weight = model.embed.weight
    handle = model.embed.register_forward_hook(lambda m, args, out: out.register_hook(stop) and None)
    loss = model(IDS).sum()
    assert model.embed.weight is weight
    with pytest.raises(KeyboardInterrupt):
        loss.backward()
    assert dict(model.named_parameters())["body.embed.weight"] is weight
    handle.remove()
    with torch.no_grad():
        rows.add_(1.0)
        edited.embed.weight[INDICES] = rows
    torch.testing.assert_close(model(IDS), edited(IDS), rtol=1e-13, atol=1e-13)
    assert model.embed.weight is weight


def test_a_copy_after_an_interrupted_forward() -> None:
    model, edited, _, _ = interrupted("root", KeyboardInterrupt(), False)
    assert es.get_attachment(model) is not None
    other = copy.deepcopy(model)
    torch.testing.assert_close(other(IDS), edited(IDS), rtol=1e-13, atol=1e-13)
    assert type(other.embed.weight) is nn.Parameter


def test_an_error_in_a_lookup_restores_the_weight() -> None:
    model, _, _ = attached(Reader(lambda m, ids: m.head(m.embed(ids))), materialize=True)
    weight = model.embed.weight
    with pytest.raises(IndexError):
        model(torch.tensor([[V + 5]]))
    assert model.embed.weight is weight
    assert model.embed.padding_idx == 2


def check_interrupted_steps(model: Any, dense: Any, rows: list[Any], indices: list[int], ids: torch.Tensor) -> None:
    """Check that an interrupt at any line of a forward and backward changes no later result, and leaves no cover."""
    logits = dense(ids)
    logits.square().sum().backward()
    gradients = dense_gradients(dense, indices)

    def step() -> tuple[torch.Tensor, list[torch.Tensor]]:
        found = model(ids)
        return found.detach(), list(torch.autograd.grad(found.square().sum(), rows))

    def check() -> None:
        found, own = step()
        torch.testing.assert_close(found, logits.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(own, gradients, rtol=1e-10, atol=1e-10)
        assert all("weight" not in vars(module) for module in (model.embed, model.head))

    assert interrupt_at_each_line(step, check) > 100


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("materialize", [False, True])
def test_a_step_interrupted_at_each_line(materialize: bool, read: str) -> None:
    model, edited, rows = attached(reader(""), materialize=materialize)
    model.read = edited.read = READS[read]
    check_interrupted_steps(model, edited, rows, INDICES, IDS)


@pytest.mark.parametrize("indices", [RUN, SPREAD], ids=["run", "spread"])
def test_a_step_of_more_rows_than_tokens_interrupted_at_each_line(indices: list[int]) -> None:
    model, dense, rows = pair(indices)
    check_interrupted_steps(model, dense, rows, indices, WORDS)


@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_a_step_of_a_soft_prompt_interrupted_at_each_line(kind: str) -> None:
    model, attachment = prompted(kind)
    ids = torch.randint(4, 20, (2, 5))
    more = {"decoder_input_ids": ids} if kind == "bart" else {}

    def step() -> list[torch.Tensor]:
        found = model(input_ids=ids, labels=ids, **more)
        return [found.logits.detach(), found.loss.detach(), *torch.autograd.grad(found.loss, attachment.parameters())]

    wanted = step()
    assert interrupt_at_each_line(step, lambda: torch.testing.assert_close(step(), wanted)) > 100


@pytest.mark.parametrize(
    ("block", "within"),
    [
        ("disabled", "rows/installation"),
        ("per_sample", "rows/installation"),
        ("materialized", "rows/overlays"),
    ],
)
def test_a_block_interrupted_at_each_line_leaves_the_rows_live(block: str, within: str) -> None:
    model, dense, _ = pair(SPREAD)
    attachment = find_attachment(model)
    assert attachment is not None

    def run() -> None:
        with attachment.per_sample(["default", None]) if block == "per_sample" else getattr(attachment, block)():
            model(WORDS)

    def check() -> None:
        attachment.activate("default")  # refused inside per_sample()
        torch.testing.assert_close(model(WORDS), dense(WORDS), rtol=1e-12, atol=1e-12)
        assert "weight" not in vars(model.head)

    assert interrupt_at_each_line(run, check, f"runtime/{within}.py") > 20


@pytest.mark.parametrize("within", ["attachment", "hooks", "rows/installation", "rows/unchanged", "members"])
@pytest.mark.parametrize("what", ["rows", "prompt"])
def test_attaching_interrupted_at_each_line(what: str, within: str) -> None:
    """Either the model is attached, or nothing has changed: no hook, nothing frozen. It can be attached again."""
    torch.manual_seed(0)
    plain = Plain() if what == "rows" else tiny("llama")
    config = es.TrainableTokensConfig(SPREAD, target_modules=["embed"]) if what == "rows" else es.SoftPromptConfig(3)
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in plain.modules()]
    trained = [parameter.requires_grad for parameter in plain.parameters()]
    made = [copy.deepcopy(plain)]

    def attach() -> None:
        es.attach(made[0], config)

    def check() -> None:
        (model,) = made
        attachment = find_attachment(model)
        if attachment is not None:
            attachment.detach()
        assert [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()] == hooks
        assert [parameter.requires_grad for parameter in model.parameters()] == trained
        assert len(list(es.attach(model, config).parameters())) == 1
        made[:] = [copy.deepcopy(plain)]

    assert interrupt_at_each_line(attach, check, f"runtime/{within}.py") > 5


@pytest.mark.parametrize("within", ["attachment", "hooks", "rows/installation", "rows/unchanged", "members"])
def test_attaching_a_second_adapter_interrupted_at_each_line(within: str) -> None:
    torch.manual_seed(0)
    model = Plain(tie=False)
    attachment = es.attach(model, es.TrainableTokensConfig(SPREAD, target_modules=["embed"]), freeze=False)
    with torch.no_grad():
        attachment.parameters().__next__().normal_()
    wanted = model(WORDS).detach()
    made = [copy.deepcopy(model)]

    def attach() -> None:
        es.attach(made[0], es.TrainableTokensConfig(SPREAD, target_modules=["head"]), name="second")

    def check() -> None:
        one = find_attachment(made[0])
        assert one is not None
        if "second" in one.names:
            one.remove("second")
        else:
            assert all(parameter.requires_grad for parameter in made[0].parameters())
        assert one.active == ("default",)
        assert torch.equal(made[0](WORDS), wanted)
        es.attach(made[0], es.TrainableTokensConfig([3, 5], target_modules=["head"]), name="second")
        assert one.active == ("default", "second")
        made[:] = [copy.deepcopy(model)]

    assert interrupt_at_each_line(attach, check, f"runtime/{within}.py") > 5


@pytest.mark.parametrize("within", ["attachment", "hooks", "members", "prompts/live", "prompts/installation"])
def test_attaching_a_soft_prompt_beside_rows_interrupted_at_each_line(within: str) -> None:
    ids = torch.randint(4, 20, (2, 5))
    model = tiny("llama")
    randomise(es.attach(model, es.TrainableTokensConfig([5, 6])))
    both = copy.deepcopy(model)
    prompt = es.SoftPromptConfig(3)
    randomise(es.attach(both, prompt, name="prompt"))
    alone, wanted = model(input_ids=ids).logits, both(input_ids=ids).logits
    made = [copy.deepcopy(model)]

    def attach() -> None:
        es.attach(made[0], prompt, name="prompt")

    def check() -> None:
        one = find_attachment(made[0])
        assert one is not None
        if "prompt" in one.names:
            one.remove("prompt")
        assert torch.equal(made[0](input_ids=ids).logits, alone)
        randomise(es.attach(made[0], prompt, name="prompt"))
        assert torch.equal(made[0](input_ids=ids).logits, wanted)
        made[:] = [copy.deepcopy(model)]

    assert interrupt_at_each_line(attach, check, f"runtime/{within}.py") > 10


@pytest.mark.parametrize("kind", ["llama", "bart"])
@pytest.mark.parametrize("keep", [False, True])
def test_compiled_after_an_interrupted_eager_forward_of_a_soft_prompt(keep: bool, kind: str) -> None:
    """Compiled code sees the state of an eager call around it, but not of one that was interrupted, with labels."""
    torch.compiler.reset()
    model, _ = prompted(kind, keep_prompt=keep)
    ids = torch.randint(4, 20, (2, 6))
    more = {"decoder_input_ids": ids} if kind == "bart" else {}
    given = {"input_ids": ids, **more}
    norms = [module for module in model.modules() if "Norm" in type(module).__name__]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        wanted = model(**given).logits
        compiled(**given)
    for norm in (norms[0], norms[-1]):
        handle = norm.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**given, labels=ids)
        handle.remove()
        with torch.no_grad():
            found = compiled(**given).logits
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)

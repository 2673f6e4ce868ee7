"""Models that read a weight directly, besides or instead of calling its module: compared with the edited model."""

from __future__ import annotations

import copy
import functools
import types
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import embedsurgery as es
from embedsurgery.errors import EmbedSurgeryWarning, UnsupportedError
from tests.support import readers
from tests.support.errors import raises
from tests.support.models import tiny
from tests.support.modules import Conv1D, D, V
from tests.support.readers import IDS, INDICES, READS, Reader, attached, lm_loss, reader

ROWS_ONLY = {
    "forward of the lookup",
    "functional lookup",
    "functional lookup with padding",
    "indexed",
    "one row",
    "two rows",
    "padding counted from the end",
}
"""Reads that make no copy of the table."""


def gradients(edited: Any) -> list[torch.Tensor]:
    tied = edited.head.weight is edited.embed.weight
    return [w.grad[INDICES] for w in [edited.embed.weight, edited.head.weight][: 1 if tied else 2]]


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("materialize", [True, False])
def test_logits_and_gradients_from_the_first_forward_on(name: str, tie: bool, materialize: bool) -> None:
    if "padding" in name and materialize:
        pytest.skip("the copy is a plain tensor, so F.embedding gives its padding row no gradient")
    model, edited, rows = attached(reader(name, tie=tie), materialize=materialize)
    edited.read = READS["functional lookup" if "padding" in name else name]
    weight = model.embed.weight
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            for part in rows:
                part.grad = None
            found = model(IDS)
            found.square().sum().backward()
    assert all(w.category is EmbedSurgeryWarning and "materialize=True" in str(w.message) for w in seen)
    assert len(seen) == (0 if materialize or name in ROWS_ONLY else 1)
    assert all(w.filename == readers.__file__ for w in seen)
    expected = edited(IDS)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    expected.square().sum().backward()
    for part, gradient in zip(rows, gradients(edited), strict=True):
        torch.testing.assert_close(part.grad, gradient, rtol=1e-12, atol=1e-12)
    assert model.embed.weight is weight
    assert "weight" not in model.embed.__dict__
    with es.get_attachment(model).disabled():
        assert model.embed.padding_idx == 2
        base = copy.deepcopy(model)
        es.get_attachment(base).detach()
        torch.testing.assert_close(model(IDS), base(IDS), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["head", "lookup"])
def test_a_weight_that_is_stored_transposed(kind: str) -> None:
    model = reader("", tie=False, head=Conv1D())
    model.read = (
        (lambda m, ids: m.embed(ids) @ m.head.weight) if kind == "head" else lambda m, ids: m.head(m.embed(ids))
    )
    model.double()
    edited = copy.deepcopy(model)
    attachment = es.attach(model, es.TrainableTokensConfig(INDICES, target_modules=["head"]))
    (rows,) = attachment.parameters()
    with torch.no_grad():
        rows.normal_()
        edited.head.weight[:, INDICES] = rows.t()
    if kind == "head":
        with pytest.warns(EmbedSurgeryWarning, match=r"head\.weight .* 11 x 4.*\bmatmul\b"):
            found = model(IDS)
    else:
        found = model(IDS)
    torch.testing.assert_close(found, edited(IDS), rtol=1e-13, atol=1e-13)
    found.square().sum().backward()
    edited(IDS).square().sum().backward()
    torch.testing.assert_close(rows.grad, edited.head.weight.grad[:, INDICES].t(), rtol=1e-12, atol=1e-12)


def test_calling_modules_costs_no_copy() -> None:
    model, edited, (rows,) = attached(reader(""))
    model.read = edited.read = lambda m, ids: lm_loss(m.head(m.embed(ids)), ids)
    model(IDS).backward()  # a warning would be an error
    edited(IDS).backward()
    torch.testing.assert_close(rows.grad, gradients(edited)[0], rtol=1e-12, atol=1e-12)


def test_describing_a_weight_is_not_a_read() -> None:
    def read(m: Any, ids: torch.Tensor) -> torch.Tensor:
        weight = m.head.weight
        assert (weight.shape, weight.size(0), weight.dim(), weight.ndim, len(weight)) == ((V, D), V, 2, 2, V)
        assert (weight.dtype, weight.device.type, weight.requires_grad) == (torch.float64, "cpu", True)
        assert weight.is_floating_point()
        assert not weight.is_cuda
        assert m.head.weight is m.embed.weight
        assert next(m.parameters()) is dict(m.named_parameters())["body.embed.weight"] is not weight
        assert type(next(m.parameters())) is nn.Parameter
        extra = weight.new_zeros(1, dtype=weight.dtype) + torch.zeros_like(weight)[0, 0]
        assert type(extra) is torch.Tensor
        return m.head(m.embed(ids).to(weight.dtype)) + extra

    model, _, _ = attached(reader(""))
    model.read = read
    model(IDS).sum().backward()


def test_only_a_forward_that_reads_makes_a_copy() -> None:
    rows = 5_000
    model = Reader(lambda m, ids: m.head(m.embed(ids)) if m.training else F.linear(m.embed(ids), m.head.weight))
    model.body["embed"], model.head = nn.Embedding(rows, D), nn.Linear(D, rows, bias=False)
    model.head.weight = model.embed.weight
    es.attach(model, es.TrainableTokensConfig([5], target_modules=["body.embed"]))
    copies = []

    class Copies(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            copies.append(func is torch.ops.aten.clone.default and out.numel() == rows * D)
            return out

    def count(training: bool) -> int:
        copies.clear()
        with Copies():
            model.train(training)(torch.tensor([[5]]))
        return sum(copies)

    assert count(True) == 0
    with pytest.warns(EmbedSurgeryWarning, match=r"body\.embed\.weight .* 5,000 x 4"):
        assert count(False) == 1
    assert [count(True), count(False), count(True)] == [0, 1, 0]


def test_taking_a_pointer_is_a_read() -> None:
    seen = []

    def read(m: Any, ids: torch.Tensor) -> torch.Tensor:
        seen.append(m.head.weight.data_ptr())
        return F.linear(m.embed(ids), m.head.weight)

    model, _, _ = attached(reader(""))
    model.read = read
    with pytest.warns(EmbedSurgeryWarning, match=r"\bdata_ptr\b"):
        model(IDS)
    assert seen[0] != model.head.weight.data_ptr()


@pytest.mark.filterwarnings("ignore:.*materialize=True:embedsurgery.errors.EmbedSurgeryWarning")
@pytest.mark.parametrize(
    ("write", "function"),
    [
        (lambda weight: weight.mul_(0.5), "mul_"),
        (lambda weight: weight.__setitem__(0, 0.0), "__setitem__"),
        (lambda weight: weight.__imul__(2.0), "mul_"),
        (lambda weight: setattr(weight, "data", weight.data / 2), "__set__"),
        (lambda weight: nn.init.zeros_(weight), "zero_"),
    ],
    ids=["in place", "item", "operator", "data", "init"],
)
def test_a_model_that_writes_to_its_table_is_refused(write: Any, function: str) -> None:
    def read(m: Any, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            write(m.embed.weight)
        return m.head(m.embed(ids))

    model, _, _ = attached(reader(""))
    before = model.embed.weight.detach().clone()
    model.read = read
    with raises(UnsupportedError, where="body.embed.weight", found=function):
        model(IDS)
    assert torch.equal(model.embed.weight, before)


def test_a_trained_base_gets_its_own_gradient() -> None:
    model, edited, (rows,) = attached(reader("both ends"), freeze=False)
    edited.read = READS["both ends"]
    for read in ("both ends", "fused loss"):
        model.read = edited.read = READS[read]
        for one in (model, edited):
            one.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EmbedSurgeryWarning)
            model(IDS).sum().backward()
        edited(IDS).sum().backward()
        expected = edited.embed.weight.grad.clone()
        torch.testing.assert_close(rows.grad, expected[INDICES], rtol=1e-12, atol=1e-12)
        expected[INDICES] = 0
        torch.testing.assert_close(model.embed.weight.grad, expected, rtol=1e-12, atol=1e-12)


def test_two_adapters_and_rows_that_change() -> None:
    model, edited, _ = attached(reader("both ends"))
    attachment = es.attach(model, es.TrainableTokensConfig([9], target_modules=["body.embed"]), name="b")
    edited.read = model.read
    for step in range(3):
        with torch.no_grad():
            for part in attachment.parameters():
                part.add_(0.5)
            for name in attachment.names:
                adapter = attachment.adapter(name)
                indices = list(adapter.manifest.tables[0].indices)
                edited.embed.weight[indices] = adapter.tensors["body.embed.weight"]
        with pytest.warns(EmbedSurgeryWarning) if step == 0 else warnings.catch_warnings():
            torch.testing.assert_close(model(IDS), edited(IDS), rtol=1e-13, atol=1e-13)


def test_a_mixed_batch_is_refused_if_the_weight_is_read() -> None:
    model, _, _ = attached(reader("functional head"))
    attachment = es.get_attachment(model)
    with attachment.per_sample(["default", None]):
        with raises(UnsupportedError, where="body.embed.weight", found="linear()"):
            model(IDS)
        model.read = lambda m, ids: m.head(m.embed(ids))
        mixed = model(IDS)
    torch.testing.assert_close(mixed[:1], model(IDS[:1]))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any) -> None:
    model, edited, _ = attached(reader("both ends"))
    edited.read = model.read
    with mode(), pytest.warns(EmbedSurgeryWarning):
        torch.testing.assert_close(model(IDS), edited(IDS), rtol=1e-13, atol=1e-13)


def test_torch_func_over_a_model_that_reads() -> None:
    model, edited, (rows,) = attached(reader("both ends"))
    name = next(n for n, p in model.named_parameters() if p is rows)

    def loss(values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, {name: values}, (IDS,)).square().sum()

    with pytest.warns(EmbedSurgeryWarning):
        found = torch.func.grad(loss)(rows.detach() * 1.0)
    edited.read = model.read
    edited(IDS).square().sum().backward()
    torch.testing.assert_close(found, gradients(edited)[0], rtol=1e-12, atol=1e-12)


class FunctionalLlama:
    """A forward of a tiny Llama with a functional head, as patched models have."""

    def __init__(self, model: Any) -> None:
        self.forward_of = type(model).forward

    def __call__(self, model: Any, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        hidden = model.model(*args, **{k: v for k, v in kwargs.items() if k != "logits_to_keep"})
        logits = F.linear(hidden.last_hidden_state, model.lm_head.weight)
        from transformers.modeling_outputs import CausalLMOutputWithPast

        return CausalLMOutputWithPast(logits=logits, past_key_values=hidden.past_key_values)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("kind", ["llama-tied", "llama-untied"])
def test_generation_from_the_first_token_on(
    kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    ids = torch.tensor([[5, 7, 9, 3], [7, 7, 4, 30]])
    model = tiny(kind)
    targets = ["model.embed_tokens"] if kind == "llama-tied" else ["model.embed_tokens", "lm_head"]
    attachment = es.attach(model, es.TrainableTokensConfig([7, 5, 30], target_modules=targets))
    with torch.no_grad():
        for part in attachment.parameters():
            part.normal_(generator=torch.Generator().manual_seed(1))
    merged = tiny(kind)
    es.merge(merged, attachment.adapter())
    more: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    expected = merged.generate(ids, **more)
    forward = FunctionalLlama(model)
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda self, *a, **k: forward(self, *a, **k))
    with pytest.warns(EmbedSurgeryWarning, match=r"\blinear\b"):
        found = model.generate(ids, **more)
    assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # both are dynamo's own doing
@pytest.mark.parametrize("name", ["functional head", "soft embedding", "functional lookup", "one row", "both ends"])
def test_compiled_after_an_eager_forward_has_read(name: str) -> None:
    from torch._dynamo.testing import CompileCounter

    model, edited, (rows,) = attached(reader(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EmbedSurgeryWarning)
        model(IDS)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=(counter := CompileCounter()), fullgraph=True)
    for shift in range(3):
        ids = (IDS + shift) % V
        torch.testing.assert_close(compiled(ids), edited(ids), rtol=1e-13, atol=1e-13)
        if shift == 0:
            frames = counter.frame_count
    assert counter.frame_count == frames
    compiled(IDS).square().sum().backward()
    edited(IDS).square().sum().backward()
    torch.testing.assert_close(rows.grad, gradients(edited)[0], rtol=1e-12, atol=1e-12)
    assert "weight" not in model.embed.__dict__
    with es.get_attachment(model).disabled():
        base = copy.deepcopy(model)
        es.get_attachment(base).detach()
        torch.testing.assert_close(compiled(IDS), base(IDS))


def hidden_read(m: Any, ids: torch.Tensor) -> torch.Tensor:
    return F.linear(m.embed(ids), m.head.weight)


def helped_read(m: Any, ids: torch.Tensor) -> torch.Tensor:
    return hidden_read(m, ids)


class Direct(Reader):
    """A model whose own forward names the weight."""

    def forward(self, ids: torch.Tensor, past_key_values: Any = None) -> torch.Tensor:
        return F.linear(self.embed(ids), self.head.weight)


class Helped(Reader):
    """A model whose forward calls a method, which calls a function that reads the weight."""

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return helped_read(self, ids)

    def forward(self, ids: torch.Tensor, past_key_values: Any = None) -> torch.Tensor:
        return self.logits(ids)


class Boxed(Reader):
    """A model whose reading function is in a container, so a search of the bytecode does not find it."""

    def forward(self, ids: torch.Tensor, past_key_values: Any = None) -> torch.Tensor:
        return FUNCTIONS["read"](self, ids)


FUNCTIONS = {"read": hidden_read}


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.filterwarnings("ignore:.*materialize=True:embedsurgery.errors.EmbedSurgeryWarning")
@pytest.mark.parametrize("kind", [Direct, Reader, Helped, Boxed])
def test_compiled_before_an_eager_forward_has_read(kind: type[Reader]) -> None:
    torch.manual_seed(0)
    made = kind(hidden_read)
    made.head.weight = made.embed.weight
    model, edited, (rows,) = attached(made)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    first = compiled(IDS)
    if kind is not Boxed:  # found in the bytecode
        torch.testing.assert_close(first, edited(IDS), rtol=1e-13, atol=1e-13)
    model(IDS)  # shows the read, and discards the compiled code
    torch.testing.assert_close(compiled(IDS), edited(IDS), rtol=1e-13, atol=1e-13)
    compiled(IDS).square().sum().backward()
    edited(IDS).square().sum().backward()
    torch.testing.assert_close(rows.grad, gradients(edited)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.filterwarnings("ignore:.*materialize=True:embedsurgery.errors.EmbedSurgeryWarning")
@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize("when", ["before attaching", "after"])
def test_a_replaced_forward_is_searched_when_it_is_traced(when: str, wraps: bool) -> None:
    """TRL replaces the forward of a model by one with a fused loss."""

    def replace(model: Any) -> None:
        def forward(self: Any, ids: torch.Tensor) -> torch.Tensor:
            return F.linear(self.embed(ids), self.head.weight)

        found = functools.wraps(type(model).forward)(forward) if wraps else forward
        model.forward = types.MethodType(found, model)

    torch._dynamo.reset()
    made = reader("")
    made.read = lambda m, ids: m.head(m.embed(ids))
    if when == "before attaching":
        replace(made)
    model, edited, (rows,) = attached(made)
    compiled = torch.compile(model, backend="aot_eager")
    if when == "after":
        replace(model)
    replace(edited)
    torch.testing.assert_close(compiled(IDS), edited(IDS), rtol=1e-13, atol=1e-13)
    compiled(IDS).square().sum().backward()
    edited(IDS).square().sum().backward()
    torch.testing.assert_close(rows.grad, gradients(edited)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_parts_of_an_eager_forward() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    body, loss = CompileCounter(), CompileCounter()
    model, edited, (rows,) = attached(reader(""))
    part = torch.compile(lambda m, ids: m.head(m.embed(ids)), backend=body, fullgraph=True)
    model.read = lambda m, ids: part(m, ids)
    edited.read = lambda m, ids: m.head(m.embed(ids))
    for shift in range(3):
        ids = (IDS + shift) % V
        torch.testing.assert_close(model(ids), edited(ids), rtol=1e-13, atol=1e-13)
    assert body.frame_count == 1
    fused = torch.compile(lambda hidden, weight: F.linear(hidden, weight).logsumexp(-1), backend=loss, fullgraph=True)
    model.read = lambda m, ids: fused(m.embed(ids), m.head.weight)
    edited.read = lambda m, ids: F.linear(m.embed(ids), m.head.weight).logsumexp(-1)
    for shift in range(3):
        ids = (IDS + shift) % V
        torch.testing.assert_close(model(ids), edited(ids), rtol=1e-13, atol=1e-13)
    assert loss.frame_count <= 2  # compiled again once the read is known
    rows.grad = None
    model(IDS).square().sum().backward()
    edited(IDS).square().sum().backward()
    torch.testing.assert_close(rows.grad, gradients(edited)[0], rtol=1e-12, atol=1e-12)


def test_detach_leaves_nothing() -> None:
    model, _, _ = attached(reader("both ends"))
    fresh = reader("both ends").double()
    with pytest.warns(EmbedSurgeryWarning):
        model(IDS)
    es.get_attachment(model).detach()
    for name, module in model.named_modules():
        assert not module._forward_hooks, name
        assert not module._forward_pre_hooks, name
        assert module.__dict__.keys() == fresh.get_submodule(name).__dict__.keys()
    assert torch.equal(model(IDS), fresh(IDS))


def chunked(m: Any, ids: torch.Tensor, reentrant: bool) -> torch.Tensor:
    """Return a loss that keeps no logits: the backward computes each chunk again, from the weight."""
    hidden = m.embed(ids).flatten(0, 1)

    def part(rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(rows, m.head.weight).tanh(), labels, reduction="sum")

    losses = [
        checkpoint(part, *both, use_reentrant=reentrant)
        for both in zip(hidden.chunk(4), ids.flatten().chunk(4), strict=True)
    ]
    return torch.stack(losses).sum()


@pytest.mark.parametrize("materialize", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_gradient_checkpointing(materialize: bool, reentrant: bool, frozen: bool) -> None:
    model, edited, (rows,) = attached(reader(""), materialize=materialize)
    rows.requires_grad_(not frozen)
    gradients_of = []
    for one in (model, edited):
        one.embed.register_forward_hook(lambda m, args, out: out.detach().requires_grad_() if frozen else out)
        seen: list[torch.Tensor] = []
        one.embed.register_forward_hook(lambda m, args, out, seen=seen: seen.append(out))
        one.read = lambda m, ids: chunked(m, ids, reentrant)
        for _ in range(2):
            seen.clear()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", EmbedSurgeryWarning)
                loss = one(IDS)
            if seen[0].requires_grad:
                seen[0].retain_grad()
            one.zero_grad()
            loss.backward()
            assert type(one.head.weight) is nn.Parameter
        gradients_of.append(seen[0].grad)
    torch.testing.assert_close(*gradients_of, rtol=1e-12, atol=1e-12)
    if not frozen:
        torch.testing.assert_close(rows.grad, gradients(edited)[0], rtol=1e-12, atol=1e-12)

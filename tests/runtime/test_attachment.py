"""Attachments on small hand-made models: states, copies, refusals."""

from __future__ import annotations

import copy
import io
import pickle
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import embedsurgery as es
from embedsurgery.errors import (
    AttachmentError,
    BaseMismatchError,
    ConfigError,
    EmbedSurgeryWarning,
    TokenIndexError,
    UnsupportedError,
)
from tests.support.errors import raises
from tests.support.modules import Conv1D, D, Plain, V, tied, transposed_linear

IDS = torch.tensor([[1, 4, 2, 7], [4, 4, 9, 0]])


def config(*indices: int, **more: object) -> es.TrainableTokensConfig:
    return es.TrainableTokensConfig(list(indices) or [4, 2], target_modules=["embed"], **more)


def randomise(attachment: object, seed: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    parameters = list(attachment.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return parameters


def edited(model: nn.Module, rows: torch.Tensor, indices: list[int]) -> nn.Module:
    copied = copy.deepcopy(model)
    if es.get_attachment(copied) is not None:
        es.get_attachment(copied).detach()
    with torch.no_grad():
        copied.embed.weight[indices] = rows.to(copied.embed.weight.dtype)
        if isinstance(getattr(copied, "head", None), Conv1D):  # a deep copy separates two Parameters over one memory
            copied.head.weight.copy_(copied.embed.weight.t())
    return copied


@pytest.mark.parametrize("make", [Plain, tied, transposed_linear])
@pytest.mark.parametrize("materialize", [False, True])
def test_logits_and_gradients_equal_the_edited_model(make: type[nn.Module], materialize: bool) -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)  # .double() afterwards would separate two Parameters over one memory
    try:
        model = make()
    finally:
        torch.set_default_dtype(torch.float32)
    indices = [4, 2]  # 2 is the padding row
    attachment = es.attach(model, config(*indices), materialize=materialize)
    (rows,) = randomise(attachment)
    assert rows.dtype == torch.float64
    reference = edited(model, rows, indices)
    torch.testing.assert_close(model(IDS), reference(IDS), rtol=0, atol=1e-13)
    direction = torch.randn(2, 4, V, dtype=torch.float64)
    (model(IDS) * direction).sum().backward()
    reference.embed.padding_idx = None
    (reference(IDS) * direction).sum().backward()
    expected = reference.embed.weight.grad[indices]
    if make is transposed_linear:  # two Parameters, each with a gradient of its own
        expected = expected + reference.head.weight.grad.t()[indices]
    torch.testing.assert_close(rows.grad, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_fp32_and_rounded_in_the_forward(dtype: torch.dtype) -> None:
    model = tied().to(dtype)
    attachment = es.attach(model, config())
    (rows,) = randomise(attachment)
    assert rows.dtype == torch.float32
    assert torch.equal(model.embed(IDS), edited(model, rows, [4, 2]).embed(IDS))
    attachment.merge()
    assert torch.equal(model.embed.weight[[4, 2]], rows.detach().to(dtype))
    assert model.head.weight.data_ptr() == model.embed.weight.data_ptr()


def test_no_tensor_of_the_size_of_the_table_is_made() -> None:
    rows, width = 200_000, 8
    model = nn.Sequential(nn.Embedding(rows, width), nn.Linear(width, rows, bias=False))
    model[1].weight = model[0].weight
    es.attach(model, es.TrainableTokensConfig([5, 7], target_modules=["0"]))
    largest, table = 0, model[0].weight.data_ptr()

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
        ) -> object:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() != table:
                    largest = max(largest, tensor.numel())
            return out

    with Sizes():
        loss = F.cross_entropy(model(torch.tensor([[5, 6]])).view(-1, rows), torch.tensor([7, 5]))
        loss.backward()
    assert largest == 2 * rows  # the logits of two tokens, and nothing of V x D
    assert model[0].weight.grad is None


def test_state_dict_and_class_are_the_bases() -> None:
    model = tied()
    cls, keys = type(model), list(model.state_dict())
    values = copy.deepcopy(model.state_dict())
    attachment = es.attach(model, config())
    randomise(attachment)
    assert type(model) is cls
    assert list(model.state_dict()) == keys
    assert model.load_state_dict(values, strict=True).missing_keys == []
    assert {n for n, _ in model.named_parameters()} - set(keys) != set()


def test_detach_restores_requires_grad() -> None:
    model = tied()
    model.position.requires_grad_(False)
    attachment = es.attach(model, config())
    assert [p.requires_grad for p in model.parameters() if p not in set(attachment.parameters())] == [False] * 3
    attachment.detach()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {
        "embed.weight": True,
        "position.weight": False,
        "head.bias": True,
    }
    assert es.get_attachment(model) is None
    attachment = es.attach(model, config(), freeze=False)
    assert model.head.bias.requires_grad
    model.requires_grad_(False)
    attachment.unfreeze()
    assert all(p.requires_grad for p in attachment.parameters())


def test_user_hooks_see_the_tensors_of_a_merged_model() -> None:
    torch.manual_seed(0)
    model = tied()
    seen: list[torch.Tensor] = []
    model.embed.register_forward_pre_hook(lambda m, args: (args[0].flip(-1),))
    model.embed.register_forward_hook(lambda m, args, out: seen.append(out) or out * 2)
    model.head.register_forward_hook(lambda m, args, out: seen.append(out) or out + 1)
    attachment = es.attach(model, config())
    randomise(attachment)
    with torch.no_grad():
        live = model(IDS)
        attachment.merge()
        merged = model(IDS)
    torch.testing.assert_close(live, merged)
    torch.testing.assert_close(seen[0], seen[2])
    torch.testing.assert_close(seen[1], seen[3])


def test_an_embedding_subclass_keeps_its_own_forward() -> None:
    class Odd(nn.Embedding):
        def forward(self, ids: torch.Tensor, *, sign: float = 1.0) -> torch.Tensor:
            return super().forward(ids).tanh() * sign

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = Odd(V, D)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.embed(ids, sign=-3.0)

    model = Model()
    attachment = es.attach(model, config())
    (rows,) = randomise(attachment)
    assert torch.equal(model(IDS), edited(model, rows, [4, 2])(IDS))


def test_a_lookup_that_mixes_rows_gets_the_whole_weight() -> None:
    class Normalised(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return F.embedding(ids, self.weight - self.weight.mean(0))

    model = nn.Sequential(Normalised(V, D))
    model.embed = model[0]
    with pytest.warns(EmbedSurgeryWarning, match=r"0\.weight .* 11 x 4,.* 0 \(Normalised\)"):
        attachment = es.attach(model, config())
    (rows,) = randomise(attachment)
    assert torch.equal(model[0](IDS), edited(model, rows, [4, 2])[0](IDS))
    model[0](IDS).sum().backward()
    assert rows.grad is not None


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_an_attached_model_have_their_own_attachment(how: str) -> None:
    model = tied()
    attachment = es.attach(model, config())
    randomise(attachment)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    twin = es.get_attachment(other)
    assert twin is not None
    assert twin is not attachment
    assert twin.model is other
    before = model(IDS)
    assert torch.equal(other(IDS), before)
    randomise(twin, seed=8)
    assert not torch.equal(other(IDS), before)
    assert torch.equal(model(IDS), before)
    twin.merge()
    twin.unmerge()
    twin.detach()
    assert torch.equal(model(IDS), before)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_made_while_disabled_is_the_base_and_can_be_activated(how: str) -> None:
    model = tied()
    attachment = es.attach(model, config())
    randomise(attachment)
    with attachment.disabled():
        copied = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
        base = model(IDS)
    other = es.get_attachment(copied)
    assert other.active == ()
    assert torch.equal(copied(IDS), base)
    other.activate("default")
    assert torch.equal(copied(IDS), model(IDS))
    assert not torch.equal(copied(IDS), base)


def test_moving_and_casting_after_attaching() -> None:
    model = tied()
    attachment = es.attach(model, config())
    (rows,) = randomise(attachment)
    kept = rows.detach().clone()
    model.to(torch.bfloat16)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, kept)
    assert model.embed.weight.dtype == torch.bfloat16
    assert torch.equal(model(IDS), edited(model, rows, [4, 2])(IDS))
    model.double()
    assert rows.dtype == torch.float32
    model.to("meta")
    assert next(attachment.parameters()).device.type == "meta"


def test_several_adapters_by_name() -> None:
    model = tied()
    base = model(IDS)
    a = es.attach(model, config(4), name="a")
    assert es.attach(model, config(2), name="b") is a
    assert a.names == ("a", "b")
    randomise(a)
    both = model(IDS)
    a.activate("a")
    only_a = model(IDS)
    a.activate("b")
    only_b = model(IDS)
    a.activate()
    torch.testing.assert_close(model(IDS), base)
    for one, two in ((both, only_a), (both, only_b), (only_a, only_b)):
        assert not torch.equal(one, two)
    rows = torch.cat([a.adapter("a").tensors["embed.weight"], a.adapter("b").tensors["embed.weight"]])
    torch.testing.assert_close(edited(model, rows, [4, 2])(IDS), both)
    a.activate("a", "b")
    a.remove("b")
    torch.testing.assert_close(model(IDS), only_a)
    a.remove("a")
    assert es.get_attachment(model) is None
    torch.testing.assert_close(model(IDS), base)


def test_overlapping_rows_are_refused_with_the_rows() -> None:
    model = tied()
    attachment = es.attach(model, config(4, 2), name="a")
    with raises(AttachmentError, where="embed.weight", found=("a and b", "4")):
        es.attach(model, config(4, 7), name="b")
    assert attachment.names == ("a",)
    attachment.activate()
    es.attach(model, config(4, 7), name="b")
    with raises(AttachmentError, where="embed.weight", found=("a and b", "4")):
        attachment.activate("a", "b")


def test_merge_is_exact_and_blocks_other_changes() -> None:
    model = tied()
    before = model.embed.weight.detach().clone()
    attachment = es.attach(model, config())
    randomise(attachment)
    live = model(IDS)
    undo = attachment.merge()
    assert attachment.merged
    assert undo.describe() == ["set 2 rows of embed.weight"]
    torch.testing.assert_close(model(IDS), live)
    refused = {
        "merge()": attachment.merge,
        "activate()": lambda: attachment.activate("default"),
        "remove()": lambda: attachment.remove("default"),
        "disabled()": lambda: attachment.disabled().__enter__(),
    }
    for method, call in refused.items():
        with raises(AttachmentError, where=method, hint="unmerge()"):
            call()
    with raises(AttachmentError, hint="unmerge()"):
        es.attach(model, config(9), name="x")
    attachment.unmerge()
    assert torch.equal(model.embed.weight, before)
    with raises(AttachmentError, where=None, expected="merge()"):
        attachment.unmerge()
    attachment.merge()
    attachment.detach()
    torch.testing.assert_close(model(IDS), live)


def test_unmerge_restores_the_rows_at_the_merge() -> None:
    model = tied()
    attachment = es.attach(model, config())
    randomise(attachment)
    with torch.no_grad():
        model.embed.weight[4] = 0.5
    attachment.merge()
    attachment.unmerge()
    assert torch.equal(model.embed.weight[4], torch.full((D,), 0.5))


def test_a_snapshot_is_unaffected_by_training_and_can_be_trained_again() -> None:
    model = tied()
    attachment = es.attach(model, config())
    randomise(attachment)
    adapter = attachment.adapter()
    kept = adapter.tensors["embed.weight"].clone()
    randomise(attachment, seed=9)
    assert torch.equal(adapter.tensors["embed.weight"], kept)
    attachment.detach()
    again = es.attach(model, adapter)
    (rows,) = again.parameters()
    assert torch.equal(rows, kept)
    assert rows.requires_grad


def test_another_base_is_refused_and_nothing_is_attached() -> None:
    model = tied()
    adapter = es.attach(model, config()).adapter()
    other = tied()
    with raises(BaseMismatchError, where=("embed.weight", "rows 4, 2"), expected="sha256"):
        es.attach(other, adapter)
    assert es.get_attachment(other) is None
    assert other.embed.weight.requires_grad


def test_max_norm_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(V, D, max_norm=1.0))
    with raises(UnsupportedError, where="0", expected="max_norm=None", found=1.0):
        es.attach(model, es.TrainableTokensConfig([1], target_modules=["0"]))
    assert model[0].weight.requires_grad


@pytest.mark.parametrize("option", ["sparse", "scale_grad_by_freq"])
def test_other_options_of_a_lookup_are_right(option: str) -> None:
    model = nn.Sequential(nn.Embedding(V, D, **{option: True})).double()
    counts = option == "scale_grad_by_freq"
    with (
        pytest.warns(EmbedSurgeryWarning, match=r"0\.weight.* 0 \(Embedding\).*materialize=True")
        if counts
        else nullcontext()
    ):
        attachment = es.attach(model, es.TrainableTokensConfig([4, 2], target_modules=["0"]))
    (rows,) = attachment.parameters()
    reference = nn.Sequential(nn.Embedding(V, D, **{option: True})).double()
    reference.load_state_dict(model.state_dict())
    direction = torch.randn(2, 4, D, dtype=torch.float64)
    (model(IDS) * direction).sum().backward()
    (reference(IDS) * direction).sum().backward()
    expected = reference[0].weight.grad
    expected = expected.to_dense() if expected.is_sparse else expected
    grad = rows.grad.to_dense() if rows.grad.is_sparse else rows.grad
    torch.testing.assert_close(grad, expected[[4, 2]])


@pytest.mark.parametrize(
    ("indices", "fields"),
    [
        ([], {"expected": "at least one", "found": "none"}),
        ([-1, 3], {"expected": "row numbers", "found": -1}),
        ([3, 3], {"expected": "once", "found": 3}),
        ([1.0], {"expected": "integers", "found": 1.0}),
        ([True], {"expected": "integers", "found": True}),
        (["a"], {"expected": "integers", "found": "'a'", "hint": "convert_tokens_to_ids"}),
        ("12", {"expected": "a list of integers", "found": "'12'"}),
        (5, {"expected": "a list of integers", "found": 5}),
        (np.array([0.5]), {"expected": "integers", "found": 0.5}),
        (torch.tensor(3), {"expected": "axis", "found": "tensor(3)"}),
        (np.array([True, False]), {"expected": "integers", "found": "True, False"}),
        (torch.tensor([-4]), {"expected": "row numbers", "found": -4}),
        ({}, {"expected": "at least one", "found": "none"}),
        ({"embed": [-1]}, {"expected": "row numbers", "found": -1}),
        (None, {"expected": "a list of integers", "found": "None"}),
    ],
)
def test_bad_indices_are_refused_when_the_config_is_made(indices: object, fields: dict[str, object]) -> None:
    with raises(TokenIndexError, **fields):
        es.TrainableTokensConfig(indices)


@pytest.mark.parametrize(
    "indices",
    [
        [4, 2],
        (4, 2),
        range(4, 0, -2),
        np.array([4, 2]),
        torch.tensor([4, 2]),
        [np.int64(4), torch.tensor(2)],
        {4: 0, 2: 0}.keys(),
    ],
)
def test_indices_come_in_any_form(indices: object) -> None:
    assert es.TrainableTokensConfig(indices).token_indices == (4, 2)


def test_indices_out_of_range_are_refused_when_attaching() -> None:
    model = tied()
    with raises(TokenIndexError, where="embed.weight", expected="0 to 10", found="11, 99"):
        es.attach(model, config(1, 11, 99))
    assert es.get_attachment(model) is None


def test_contradictory_configs_are_refused() -> None:
    with raises(ConfigError, expected="target_modules=None", found="target_modules=['embed']"):
        es.TrainableTokensConfig({"embed": [1]}, target_modules=["embed"])
    with raises(ConfigError, what="init_weights", found="'yes'"):
        es.TrainableTokensConfig([1], init_weights="yes")
    with raises(ConfigError, where="head", expected="one list", found="embed.weight"):
        es.attach(tied(), es.TrainableTokensConfig({"embed": [1], "head": [2]}))
    with raises(ConfigError, expected=("TrainableTokensConfig", "SoftPromptConfig"), found="dict"):
        es.attach(tied(), {"token_indices": [1]})
    with raises(ConfigError, found="'a.b'"):
        es.attach(tied(), config(), name="a.b")


def test_different_rows_of_different_tables() -> None:
    model = Plain()
    attachment = es.attach(model, es.TrainableTokensConfig({"embed": [4], "head": [2, 9]}))
    assert {r.name: r.indices for r in attachment.adapter().manifest.tables} == {
        "embed.weight": (4,),
        "head.weight": (2, 9),
    }
    assert [tuple(p.shape) for p in attachment.parameters()] == [(1, D), (2, D)]


def test_warnings_for_half_a_vocabulary_and_for_random_rows() -> None:
    with pytest.warns(EmbedSurgeryWarning, match=r"6 of 11 .*embed\.weight"):
        es.attach(tied(), config(*range(6)))
    model = tied()
    with pytest.warns(EmbedSurgeryWarning, match=r"init_weights=False.*embed\.weight"):
        attachment = es.attach(model, config(4, init_weights=False))
    (rows,) = attachment.parameters()
    assert not torch.equal(rows[0], model.embed.weight[4])
    assert rows.std() < 5 * model.embed.weight.std()


def test_tokens_are_recorded_if_a_tokenizer_is_given() -> None:
    class Tokenizer:
        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [f"<{i}>" for i in ids]

    manifest = es.attach(tied(), config(4, 2), tokenizer=Tokenizer()).adapter().manifest
    assert manifest.tokens == {2: "<2>", 4: "<4>"}


def test_trainable_parameters_are_counted_as_peft_counts(capsys: pytest.CaptureFixture[str]) -> None:
    es.attach(tied(), config()).print_trainable_parameters()
    total = V * D + 5 * D + V + 2 * D
    assert capsys.readouterr().out.startswith(f"trainable params: {2 * D:,} || all params: {total:,} || trainable%: ")


def test_a_transposed_head_is_overridden_and_merged(tmp_path: object) -> None:
    model = Plain(Conv1D())
    attachment = es.attach(model, es.TrainableTokensConfig([3, 5], target_modules=["head"]))
    (rows,) = randomise(attachment)
    live = model(IDS)
    attachment.merge()
    assert torch.equal(model.head.weight[:, [3, 5]], rows.detach().t())
    torch.testing.assert_close(model(IDS), live)


def test_a_detached_attachment_has_no_parameters() -> None:
    model = Plain()
    attachment = es.attach(model, config(4))
    attachment.detach()
    assert list(attachment.parameters()) == []
    with pytest.raises(ValueError, match="empty parameter list"):
        torch.optim.AdamW(attachment.parameters())


def test_a_path_is_neither_a_tokenizer_nor_a_config() -> None:
    import peft

    with raises(ConfigError, where="tokenizer", found="'base'", hint="from_pretrained"):
        es.attach(Plain(), config(4), tokenizer="base")
    with raises(ConfigError, expected="TrainableTokensConfig", found="str", hint="embedsurgery.load("):
        es.attach(Plain(), "my-adapter")
    with raises(ConfigError, found=("peft.", "TrainableTokensConfig"), hint=("peft", "embedsurgery")):
        es.attach(Plain(), peft.TrainableTokensConfig(token_indices=[4]))

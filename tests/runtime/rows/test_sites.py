"""Unusual modules and memory layouts: each compared with the same model with its weight edited."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import embedsurgery as es
from embedsurgery.errors import BaseMismatchError, EmbedSurgeryWarning, OverlapError, PlanError
from tests.support.errors import raises
from tests.support.models import tiny, trained
from tests.support.modules import D, Plain, V, tied

IDS = torch.tensor([[1, 4, 2, 7], [4, 4, 9, 0]])
INDICES = [4, 7]


def live(model: nn.Module, warning: str = "") -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """Return an attached model with random rows, a copy of the base with these rows, and the rows."""
    torch.manual_seed(5)
    edited = copy.deepcopy(model)
    with pytest.warns(EmbedSurgeryWarning, match=warning) if warning else nullcontext() as seen:
        attachment = es.attach(model, es.TrainableTokensConfig(INDICES, target_modules=["embed"]))
    assert all(one.filename == __file__ for one in seen or ())
    (rows,) = attachment.parameters()
    with torch.no_grad():
        rows.normal_()
        edited.embed.weight[INDICES] = rows
    return model, edited, rows


class Doubled(nn.Embedding):
    """A lookup with another scale in training."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * (2.0 if self.training else 1.0)


class Rolled(nn.Embedding):
    """A lookup that mixes each row with its neighbour in the sequence."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = super().forward(ids)
        return rows + 0.5 * rows.roll(1, dims=1)


class Capped(nn.Linear):
    """A head with soft-capped logits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3.0 * torch.tanh(super().forward(x) / 3.0)


def with_embedding(embedding: nn.Embedding) -> Plain:
    model = Plain()
    model.embed = embedding
    model.head.weight = embedding.weight
    return model


def with_head(head: nn.Module) -> Plain:
    model = Plain(head)
    model.head.weight = model.embed.weight
    return model


def with_buffer_bias() -> Plain:
    head = nn.Linear(D, V, bias=False)
    del head.bias
    head.register_buffer("bias", torch.randn(V))
    return with_head(head)


@pytest.mark.parametrize(
    ("make", "warning"),
    [
        (lambda: with_embedding(Doubled(V, D)), ""),
        (lambda: with_embedding(Rolled(V, D)), r"embed\.weight.* embed \(Rolled\)"),
        (lambda: with_head(Capped(D, V)), r"embed\.weight.* head \(Capped\)"),
        (with_buffer_bias, ""),
    ],
    ids=["mode", "mixing", "capped", "bias is a buffer"],
)
def test_in_both_modes(make: type[nn.Module], warning: str) -> None:
    model, edited, _ = live(make(), warning)
    for mode in (True, False, True):
        model.train(mode)
        edited.train(mode)
        torch.testing.assert_close(model(IDS), edited(IDS))


def test_a_table_that_another_module_shares() -> None:
    class Bagged(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(V, D)
            self.bag.weight = self.embed.weight
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids) + self.bag(ids).unsqueeze(1))

    model, edited, _ = live(Bagged(), r"embed\.weight.*\bEmbeddingBag\b")
    torch.testing.assert_close(model(IDS), edited(IDS))


def test_rows_that_were_nan_give_finite_gradients() -> None:
    model = tied()
    with torch.no_grad():
        model.embed.weight[4] = torch.nan
    model, edited, rows = live(model, r"embed\.weight.* head \(Linear\) .*non-finite")
    edited.embed.padding_idx = None
    torch.testing.assert_close(model(IDS), edited(IDS))
    model(IDS).square().sum().backward()
    edited(IDS).square().sum().backward()
    torch.testing.assert_close(rows.grad, edited.embed.weight.grad[INDICES])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_cast_after_attaching_and_then_merged(dtype: torch.dtype) -> None:
    model, _, rows = live(tied())
    attachment = es.get_attachment(model)
    model.to(dtype)
    before = model.embed.weight.detach().clone()
    attachment.merge()
    assert torch.equal(model.embed.weight[INDICES], rows.detach().to(dtype))
    attachment.unmerge()
    assert torch.equal(model.embed.weight, before)


def test_a_buffer_that_shares_part_of_a_table_is_refused() -> None:
    model = tied()
    model.register_buffer("part", model.embed.weight.data[:3])
    with raises(OverlapError, where="embed.weight", expected="[11, 4]", found="[3, 4]"):
        es.walk(model)


def test_different_rows_of_tables_of_different_sizes(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Embedding(100, D), "b": nn.Embedding(50, D)})
    adapter = es.attach(model, es.TrainableTokensConfig({"a": [80], "b": [3]})).adapter()
    assert {t.name: t.indices for t in adapter.manifest.tables} == {"a.weight": (80,), "b.weight": (3,)}
    with raises(es.errors.AdapterError, where="b.weight", found="3, 80"):
        adapter.save(tmp_path / "adapter")


def test_adapters_from_a_generator_are_merged(tmp_path: Path) -> None:
    model = tiny("llama-tied")
    model.save_pretrained(tmp_path / "base")
    adapters = (trained(tiny("llama-tied"), [i]) for i in (3, 5))
    report = es.merge_checkpoint(tmp_path / "base", adapters, tmp_path / "out")
    assert report.rows == {"model.embed_tokens.weight": 2}


def test_a_tie_under_an_unknown_name_is_refused(tmp_path: Path) -> None:
    """Merging one of the tied tables would silently untie the model."""
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(V, D), "classifier": nn.Linear(D, V, bias=False)})
    model["classifier"].weight = model["embed_tokens"].weight
    adapter = es.attach(model, es.TrainableTokensConfig([4], target_modules=["embed_tokens"])).adapter()
    (tmp_path / "base").mkdir()
    save_file(
        {
            n: w.detach().clone()
            for n, w in model.named_parameters(remove_duplicate=False)
            if not n.startswith("embedsurgery.")
        },
        tmp_path / "base/model.safetensors",
    )
    with raises(BaseMismatchError, expected="embed_tokens.weight", found="classifier.weight"):
        es.merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out")


def test_a_merge_that_would_tie_two_tables_is_refused(tmp_path: Path) -> None:
    model = tiny("llama-untied")
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
        model.lm_head.weight[5] += 1
    attachment = es.attach(model, es.TrainableTokensConfig([5]))
    (rows,) = attachment.parameters()
    with torch.no_grad():
        rows.copy_(model.lm_head.weight[5])
    adapter = attachment.adapter()
    attachment.detach()
    model.config.tie_word_embeddings = True
    state = {name: value.clone() for name, value in model.state_dict().items()}
    (tmp_path / "base").mkdir()
    save_file(state, tmp_path / "base/model.safetensors", {"format": "pt"})
    model.config.save_pretrained(tmp_path / "base")
    with raises(PlanError, found="model.embed_tokens.weight, lm_head.weight", hint="tie_word_embeddings"):
        es.merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plain_model_with_one_vocabulary_needs_no_name() -> None:
    attachment = es.attach(tied(), es.TrainableTokensConfig([1]))
    assert attachment.adapter().manifest.tables[0].name == "embed.weight"


def test_unmerging_changed_rows_is_refused() -> None:
    adapter = trained(tiny("llama-tied"), [3])
    model = tiny("llama-tied")
    undo = es.merge(model, adapter)
    with torch.no_grad():
        model.model.embed_tokens.weight[3] += 1
    changed = model.model.embed_tokens.weight.detach().clone()
    with raises(PlanError, where="model.embed_tokens.weight", expected="sha256"):
        es.unmerge(model, undo)
    assert torch.equal(model.model.embed_tokens.weight, changed)

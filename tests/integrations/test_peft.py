"""PEFT's LoRA together with attached rows, wrapped in either order; rows keep the names of the plain base."""

from __future__ import annotations

import copy
import gc
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import embedsurgery as es
from embedsurgery.adapters.adapter import strip_wrapper_names
from embedsurgery.errors import AttachmentError, BaseMismatchError, EmbedSurgeryWarning, TableError, UnsupportedError
from embedsurgery.graph.wrappers import plain_name
from embedsurgery.runtime import peft as beside_peft
from tests.support.comparing import bits, state_bits
from tests.support.errors import raises
from tests.support.integrations import INDICES, batch, rows, trainer
from tests.support.models import logits, save, tiny

pytestmark = [  # PEFT with transformers 5, and LoRA on a tied table
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

CONFIG = es.TrainableTokensConfig(INDICES)
TABLE = "model.embed_tokens.weight"


def lora(*targets: str) -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules=list(targets or ("q_proj", "v_proj")), lora_alpha=8)


def wrapped(order: str, kind: str = "llama-tied", *targets: str) -> tuple[Any, Any]:
    """A model with LoRA, its B not zero, and rows."""
    model = tiny(kind)
    attachment = es.attach(model, CONFIG) if order == "rows first" else None
    torch.manual_seed(5)
    model = peft.get_peft_model(model, lora(*targets))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.3)
    if attachment is None:
        attachment = es.attach(model, CONFIG, freeze=False)
    else:
        assert not any(p.requires_grad for p in attachment.parameters())  # get_peft_model freezes them
        attachment.unfreeze()
    return model, attachment


def lora_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "lora" in name}


@pytest.mark.parametrize("kind", ["llama-tied", "llama-untied"])
@pytest.mark.parametrize("order", ["rows first", "LoRA first"])
@pytest.mark.parametrize("targets", [(), ("q_proj", "embed_tokens", "lm_head")])
def test_both_train_with_the_gradients_of_the_dense_model(kind: str, order: str, targets: tuple[str, ...]) -> None:
    model, attachment = wrapped(order, kind, *targets)
    assert es.get_attachment(model) is attachment
    assert es.get_attachment(model.get_base_model()) is attachment
    row_ids = {id(p) for p in attachment.parameters()}
    trainable = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in row_ids]
    assert sorted(trainable) == sorted(lora_parameters(model))
    with torch.no_grad():
        next(attachment.parameters()).normal_()
    dense = copy.deepcopy(model)
    es.get_attachment(dense).merge()
    es.get_attachment(dense).detach()
    (name,) = (n for n, _ in dense.named_parameters() if plain_name(n) == TABLE)
    weight = dense.get_parameter(name)
    weight.requires_grad_(True)
    for trained in (model, dense):
        trained(**batch()).loss.backward()
    torch.testing.assert_close(next(attachment.parameters()).grad, weight.grad[INDICES], rtol=1e-4, atol=1e-6)
    for name, parameter in lora_parameters(model).items():
        torch.testing.assert_close(parameter.grad, dense.get_parameter(name).grad, rtol=1e-4, atol=1e-6)
        assert parameter.grad.abs().max() > 0


def test_freeze_freezes_lora_and_detach_restores_it() -> None:
    model = peft.get_peft_model(tiny("llama-tied"), lora())
    attachment = es.attach(model, CONFIG)  # freeze=True freezes all that was trainable, LoRA too
    assert [p.requires_grad for p in model.parameters()].count(True) == 1
    attachment.detach()
    assert all(p.requires_grad for p in lora_parameters(model).values())
    assert [p.requires_grad for p in model.parameters()].count(True) == 4


def test_rows_frozen_by_peft_warn_at_the_first_training_forward() -> None:
    base = tiny("llama-tied")
    attachment = es.attach(base, CONFIG)
    model = peft.get_peft_model(base, lora())
    model.eval()(**batch())  # a warning would be an error
    model.train()
    with torch.no_grad():
        model(**batch())
    with pytest.warns(EmbedSurgeryWarning, match=r"attachment\.unfreeze\(\)"):
        model(**batch())
    model(**batch())  # once
    attachment.unfreeze()
    assert any(p.requires_grad for p in attachment.parameters())


@pytest.mark.parametrize("order", ["rows first", "LoRA first"])
@pytest.mark.parametrize("targets", [(), ("q_proj", "embed_tokens", "lm_head")])
def test_both_save_and_load_onto_the_plain_base(order: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    model, attachment = wrapped(order, "llama-tied", *targets)
    with torch.no_grad():
        next(attachment.parameters()).normal_()
    live = logits(model)
    model.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    attachment.adapter().save(tmp_path / "rows")
    adapter = es.load(tmp_path / "rows")
    assert adapter.manifest.tables[0].names == (TABLE, "lm_head.weight")
    assert list(adapter.tensors) == [TABLE]

    plain = tiny("llama-tied")
    es.attach(plain, adapter)
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "lora")
    torch.testing.assert_close(logits(again), live, rtol=0, atol=1e-5)
    es.get_attachment(again).detach()
    es.merge(plain if not targets else again.get_base_model(), adapter)  # LoRA's layers own the table now
    torch.testing.assert_close(logits(again), live, rtol=0, atol=1e-5)


@pytest.mark.parametrize("targets", [(), ("q_proj", "embed_tokens", "lm_head")])
def test_rows_trained_on_a_wrapped_model_merge_into_the_files_of_the_base(
    targets: tuple[str, ...], tmp_path: Path
) -> None:
    base = save(tiny("llama-tied"), tmp_path / "base")
    _, attachment = wrapped("LoRA first", "llama-tied", *targets)
    with torch.no_grad():
        next(attachment.parameters()).normal_()
    attachment.adapter().save(tmp_path / "rows")
    es.merge_checkpoint(base, es.load(tmp_path / "rows"), tmp_path / "merged")
    from safetensors.torch import load_file

    merged, before = load_file(tmp_path / "merged/model.safetensors"), load_file(base / "model.safetensors")
    assert torch.equal(merged[TABLE][INDICES], rows(attachment))
    before[TABLE][INDICES] = rows(attachment)
    assert {n: bits(t) for n, t in merged.items()} == {n: bits(t) for n, t in before.items()}


@pytest.mark.parametrize("targets", [(), ("q_proj", "embed_tokens", "lm_head")])
def test_rows_trained_on_the_plain_base_attach_to_a_wrapped_model(targets: tuple[str, ...]) -> None:
    plain = tiny("llama-tied")
    attachment = es.attach(plain, CONFIG)
    with torch.no_grad():
        next(attachment.parameters()).normal_()
    adapter, live = attachment.adapter(), logits(plain)
    model = peft.get_peft_model(tiny("llama-tied"), lora(*targets))  # LoRA's B is zero: still the base's numbers
    again = es.attach(model, adapter)
    assert torch.equal(rows(again), rows(attachment))
    torch.testing.assert_close(logits(model), live, rtol=0, atol=1e-6)
    with pytest.raises(BaseMismatchError):
        es.attach(peft.get_peft_model(tiny("llama-tied", seed=9), lora(*targets)), adapter)


@pytest.mark.parametrize("order", ["rows first", "LoRA first"])
@pytest.mark.parametrize("targets", [(), ("q_proj", "embed_tokens", "lm_head")])
def test_merging_unmerging_and_unloading_in_any_order(order: str, targets: tuple[str, ...]) -> None:
    model, attachment = wrapped(order, "llama-untied", *targets)
    before = state_bits(model)
    with torch.no_grad():
        next(attachment.parameters()).normal_()
    live = logits(model)
    attachment.merge()
    torch.testing.assert_close(logits(model), live, rtol=0, atol=1e-5)
    attachment.unmerge()
    assert state_bits(model) == before
    torch.testing.assert_close(logits(model), live, rtol=0, atol=1e-6)
    if targets:  # LoRA on the table adds to the logits of the rows too; merged into the base below them it would not
        model.merge_adapter()
        with raises(AttachmentError, found="weight", hint=("attachment.merge()", "merge_adapter()")):
            logits(model)
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model), live, rtol=0, atol=1e-5)
        attachment.merge()
        unloaded = model.merge_and_unload()
        torch.testing.assert_close(logits(unloaded), live, rtol=0, atol=1e-5)
        return
    unloaded = model.merge_and_unload()
    assert es.get_attachment(unloaded) is attachment
    torch.testing.assert_close(logits(unloaded), live, rtol=0, atol=1e-5)
    attachment.merge()
    attachment.detach()
    torch.testing.assert_close(logits(unloaded), live, rtol=0, atol=1e-5)
    assert type(unloaded) is type(tiny("llama-untied"))
    assert unloaded.state_dict().keys() == tiny("llama-untied").state_dict().keys()


@pytest.mark.parametrize("order", ["rows first", "LoRA first"])
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True` and the tied_target_modules:UserWarning")
@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize(
    ("kind", "target"), [("llama-tied", "lm_head"), ("llama-tied", "embed_tokens"), ("llama-untied", "embed_tokens")]
)
def test_unloading_a_layer_of_the_table_itself(order: str, used: bool, kind: str, target: str) -> None:
    for merge in (False, True):
        model, _ = wrapped(order, kind, "q_proj", target)
        if used:
            logits(model)
        elif order == "rows first":
            es.get_attachment(model).requires_grad_(False)  # as PEFT leaves them
        if not merge:
            logits(model.unload())
            continue
        unloaded = model.merge_and_unload()
        with raises(AttachmentError, found="weight", hint=("attachment.merge()", "merge_adapter()")):
            logits(unloaded)
        with es.get_attachment(unloaded).disabled():
            logits(unloaded)


@pytest.mark.parametrize("kind", ["llama-tied", "llama-untied"])
@pytest.mark.parametrize("saved", [["embed_tokens"], ["embed_tokens", "lm_head"]], ids=["input", "both"])
def test_a_table_in_modules_to_save_is_refused(kind: str, saved: list[str]) -> None:
    model = tiny(kind)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved)
    wrapped_model: Any = peft.get_peft_model(model, config)
    before = state_bits(wrapped_model)
    named = es.TrainableTokensConfig(INDICES, target_modules=["embed_tokens.original_module"])
    with raises(UnsupportedError, where="original_module", found="modules_to_save"):
        es.attach(wrapped_model, CONFIG if kind == "llama-tied" else named, freeze=False)
    if kind == "llama-untied":
        with raises(TableError, found="modules_to_save"):  # original and copy: two candidates for the input table
            es.attach(wrapped_model, CONFIG, freeze=False)
    assert es.get_attachment(wrapped_model) is None
    assert state_bits(wrapped_model) == before


def test_a_second_adapter_through_the_wrapper_joins_the_first() -> None:
    plain = tiny("llama-tied")
    attachment = es.attach(plain, CONFIG, name="a")
    model = peft.get_peft_model(plain, lora())
    assert es.attach(model, es.TrainableTokensConfig([9]), name="b", freeze=False) is attachment
    assert attachment.names == ("a", "b")
    assert attachment.model is plain
    assert attachment.adapter("b").manifest.tables[0].name == TABLE
    assert [p.requires_grad for p in attachment.parameters()] == [False, True]
    assert all(p.requires_grad for p in lora_parameters(model).values())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("order", ["rows first", "LoRA first"])
def test_copies_of_the_wrapped_model_are_attached_and_independent(how: str, order: str) -> None:
    model, _ = wrapped(order)
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    twin = es.get_attachment(other)
    before = logits(model)
    assert torch.equal(logits(other), before)
    with torch.no_grad():
        next(twin.parameters()).normal_()
    assert not torch.equal(logits(other), before)
    assert torch.equal(logits(model), before)
    assert twin.model is other.get_base_model()
    twin.merge()
    twin.unmerge()
    assert state_bits(other) == state_bits(model)


def test_the_trainer_saves_and_resumes_both(tmp_path: Path) -> None:
    from embedsurgery.integrations import EmbedSurgeryCallback

    runs = []
    for resume in (None, str(tmp_path / "checkpoint-3")):
        model, attachment = wrapped("LoRA first")
        trainer(model, tmp_path, callbacks=[EmbedSurgeryCallback()]).train(resume_from_checkpoint=resume)
        runs.append((rows(attachment), {n: p.detach().clone() for n, p in lora_parameters(model).items()}))
    files = {
        p.relative_to(tmp_path / "checkpoint-3").as_posix() for p in tmp_path.glob("checkpoint-3/**/*.safetensors")
    }
    assert files == {"adapter_model.safetensors", "embedsurgery/default/adapter_model.safetensors"}
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())
    start = wrapped("LoRA first")
    assert (runs[0][0] - rows(start[1])).abs().max() > 0.05
    assert all((value - lora_parameters(start[0])[name]).abs().max() > 0.01 for name, value in runs[0][1].items())


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("base_model.model.model.embed_tokens.base_layer.weight", "model.embed_tokens.weight"),
        ("_orig_mod.base_model.model.lm_head.base_layer.weight", "lm_head.weight"),
        ("_orig_mod.model._checkpoint_wrapped_module.embed_tokens.weight", "model.embed_tokens.weight"),
        ("base_model.embed.weight", "base_model.embed.weight"),
    ],
)
def test_plain_names(name: str, plain: str) -> None:
    assert plain_name(name) == plain
    assert plain_name(plain) == plain


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_compiled_model_gives_the_names_of_its_base() -> None:
    model = torch.compile(tiny("llama-tied"))
    adapter = es.attach(model, CONFIG).adapter()
    assert adapter.manifest.tables[0].names == (TABLE, "lm_head.weight")
    assert strip_wrapper_names(adapter).raw == adapter.raw


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("order", ["rows first", "LoRA first"])
@pytest.mark.parametrize("compiled", [False, True])
def test_disabling_peft_disables_the_rows(order: str, compiled: bool) -> None:
    """TRL computes its reference this way, and PEFT's own trainable tokens are off as well."""
    model, attachment = wrapped(order)
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.add_(1.0)
    inputs = {"input_ids": batch()["input_ids"]}
    base, run = tiny("llama-tied"), torch.compile(model, backend="eager") if compiled else model
    live = model(**inputs).logits
    for _ in range(2):
        with model.disable_adapter():
            assert torch.equal(run(**inputs).logits, base(**inputs).logits)
            copied = copy.deepcopy(model)
            assert torch.equal(copied(**inputs).logits, base(**inputs).logits)
        torch.testing.assert_close(run(**inputs).logits, live)
    assert attachment.active == ("default",)
    with attachment.disabled():
        assert not torch.equal(model(**inputs).logits, live)


@pytest.mark.parametrize("order", ["prompt first", "LoRA first"])
def test_disabling_peft_disables_a_soft_prompt(order: str) -> None:
    model = tiny("llama-tied")
    if order == "prompt first":
        es.attach(model, es.SoftPromptConfig(3))
    model = peft.get_peft_model(model, lora())
    if order == "LoRA first":
        es.attach(model, es.SoftPromptConfig(3), freeze=False)
    inputs = {"input_ids": batch()["input_ids"]}
    base = tiny("llama-tied")
    assert not torch.allclose(model(**inputs).logits, base(**inputs).logits)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, base(**inputs).logits)
    assert not torch.allclose(model(**inputs).logits, base(**inputs).logits)


@pytest.mark.filterwarnings("ignore:.*materialize=True:embedsurgery.errors.EmbedSurgeryWarning")
@pytest.mark.parametrize("order", ["rows first", "PEFT first"])
@pytest.mark.parametrize("tokens", [[INDICES[0], 4], [3, 4]])
@pytest.mark.parametrize("kind", ["llama-tied", "llama-untied"])
def test_tokens_that_peft_also_trains(kind: str, tokens: list[int], order: str) -> None:
    model = tiny(kind)
    if order == "rows first":
        es.attach(model, CONFIG)
    model = peft.get_peft_model(model, peft.TrainableTokensConfig(token_indices=tokens))
    if order == "PEFT first":
        es.attach(model, CONFIG, freeze=False)
    es.get_attachment(model).unfreeze()
    if tokens == [3, 4]:
        assert model(**batch()).loss.isfinite()
        return
    with raises(AttachmentError, where=("model.embed_tokens", "rows 5")):
        model(**batch())


@pytest.mark.filterwarnings("ignore:.*materialize=True:embedsurgery.errors.EmbedSurgeryWarning")
def test_peft_state_is_read_first_whatever_was_attached_in_between() -> None:
    """A later adapter that needs a full copy reinstalls its table's hooks, after those of a prompt."""
    model = tiny("llama-untied")
    with torch.no_grad():
        model.lm_head.weight[9] = 1e6
    base = copy.deepcopy(model)
    model = peft.get_peft_model(model, lora())
    es.attach(model, es.TrainableTokensConfig({"lm_head": [5, 6]}), freeze=False)
    attachment = es.attach(model, es.SoftPromptConfig(3), name="prompt", freeze=False)
    es.attach(model, es.TrainableTokensConfig({"lm_head": [9]}), name="more", freeze=False)
    assert set(attachment.active) == {"default", "prompt", "more"}
    inputs = {name: value for name, value in batch().items() if name != "attention_mask"}
    live = model(**inputs)
    for _ in range(2):
        with model.disable_adapter():
            off = model(**inputs)
        plain = base(**inputs)
        assert torch.equal(off.logits, plain.logits)
        assert torch.equal(off.loss, plain.loss)
        again = model(**inputs)
        assert torch.equal(again.logits, live.logits)
        assert torch.equal(again.loss, live.loss)
    attachment.detach()
    for module in model.modules():
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        assert not any("embedsurgery" in type(getattr(hook, "__self__", hook)).__module__ for hook in hooks)


@pytest.mark.parametrize("config", [CONFIG, es.SoftPromptConfig(3)], ids=["rows", "prompt"])
def test_one_graph_with_both_disabled(config: Any) -> None:
    """PEFT's switch alone breaks the graph, which fullgraph=True refuses."""
    torch._dynamo.reset()
    model = tiny("llama-tied").eval()
    attachment = es.attach(model, config)
    model = peft.get_peft_model(model, lora()).eval()
    inputs = {"input_ids": batch()["input_ids"], "use_cache": False}
    base, run = tiny("llama-tied").eval(), torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.add_(1.0)
        live = model(**inputs).logits
        for _ in range(2):
            torch.testing.assert_close(run(**inputs).logits, live)
            with attachment.disabled(), model.disable_adapter():
                torch.testing.assert_close(run(**inputs).logits, base(**inputs).logits)


def test_a_later_lora_is_found_when_only_the_body_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop may call only the body; and no forward searches an unchanged model."""
    model = tiny("llama-tied").eval()
    attachment = es.attach(model, CONFIG)
    ids = batch()["input_ids"]
    model.model(ids)
    searched: list[Any] = []
    monkeypatch.setattr(beside_peft, "_is_layer", lambda module: searched.append(module))
    model(ids)
    model.model(ids)
    assert all(module is not model for module in searched)  # transformers lists the layers in each forward
    monkeypatch.undo()
    wrapped = peft.get_peft_model(model, lora())
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.add_(1.0)
    live, plain = model.model(ids)[0], tiny("llama-tied").eval().model(ids)[0]
    assert not torch.equal(live, plain)
    with wrapped.disable_adapter():
        assert torch.equal(model.model(ids)[0], plain)
    assert torch.equal(model.model(ids)[0], live)
    wrapped.unload()
    gc.collect()
    assert torch.equal(model.model(ids)[0], live)

"""Checks that need no integration: a resume without the rows, and a state dict of another base."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import embedsurgery as es
from embedsurgery.errors import AttachmentError, BaseMismatchError, CheckpointError, EmbedSurgeryWarning
from embedsurgery.integrations import EmbedSurgeryCallback
from embedsurgery.integrations.saved_rows import restore_rows, save_rows
from tests.support.comparing import state_bits
from tests.support.errors import raises
from tests.support.integrations import INDICES, attach_tiny, batch, rows, trainer
from tests.support.models import INPUT, tiny, trained, write_tokenizer

TABLE = "model.embed_tokens.weight"
MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
}


def steps(model: Any, optimizer: torch.optim.Optimizer, count: int, *, closure: bool = False) -> None:
    def gradients() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        return loss

    for _ in range(count):
        if closure:
            optimizer.step(gradients)
        else:
            gradients()
            optimizer.step()


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("before", [1, 2])
def test_an_optimizer_that_has_trained_other_rows_is_refused(kind: str, closure: bool, before: int) -> None:
    model, attachment = attach_tiny()
    optimizer = MAKERS[kind](attachment.parameters())
    steps(model, optimizer, before)
    saved, state = attachment.adapter(), copy.deepcopy(optimizer.state_dict())
    steps(model, optimizer, 2)

    model, resumed = attach_tiny()
    start = rows(resumed)
    optimizer = MAKERS[kind](resumed.parameters())
    optimizer.load_state_dict(state)
    for _ in range(2):  # refused every time
        with raises(AttachmentError, found="moments", where="default", hint="attachment.restore("):
            steps(model, optimizer, 1, closure=closure)
    assert torch.equal(rows(resumed), start)
    (parameter,) = resumed.parameters()
    resumed.restore(saved)
    assert next(resumed.parameters()) is parameter
    steps(model, optimizer, 2, closure=closure)
    assert torch.equal(rows(resumed), rows(attachment))


@pytest.mark.parametrize("kind", ["AdamW", "SGD with momentum"])
def test_a_step_that_only_creates_optimizer_state_does_not_count(kind: str) -> None:
    def make_state(model: Any, optimizer: torch.optim.Optimizer) -> None:
        """As torch.distributed.checkpoint does, to have optimizer state to load into."""
        (group,) = optimizer.param_groups
        rate, group["lr"] = group["lr"], 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        group["lr"] = rate
        optimizer.zero_grad()

    model, attachment = attach_tiny()
    optimizer = MAKERS[kind](attachment.parameters())
    make_state(model, optimizer)
    steps(model, optimizer, 1)  # the first step of a run
    state = copy.deepcopy(optimizer.state_dict())
    model, attachment = attach_tiny()
    optimizer = MAKERS[kind](attachment.parameters())
    make_state(model, optimizer)
    optimizer.load_state_dict(state)
    with raises(AttachmentError, found="moments", where="default"):
        steps(model, optimizer, 1)


def test_a_first_step_at_a_rate_of_0_passes() -> None:
    model, attachment = attach_tiny()
    optimizer = torch.optim.AdamW(attachment.parameters(), lr=0.0)  # as in a warm-up
    steps(model, optimizer, 1)
    optimizer.param_groups[0]["lr"] = 0.1
    start = rows(attachment)
    steps(model, optimizer, 1)
    assert not torch.equal(rows(attachment), start)


def test_copies_and_restored_rows_pass() -> None:
    model, attachment = attach_tiny()
    optimizer = MAKERS["AdamW"](attachment.parameters())
    optimizer.param_groups[0]["lr"] = 0.0  # a warm-up: stepped, rows unchanged
    start = rows(attachment)
    steps(model, optimizer, 2, closure=True)
    assert torch.equal(rows(attachment), start)
    optimizer.param_groups[0]["lr"] = 0.1
    steps(model, optimizer, 1)
    saved, state = attachment.adapter(), copy.deepcopy(optimizer.state_dict())

    twin = copy.deepcopy((model, optimizer))  # model and optimizer copied together
    steps(*twin, 1)
    reread = pickle.loads(pickle.dumps((model, optimizer)))
    steps(*reread, 1)
    steps(model, optimizer, 1)
    for other in (twin[0], reread[0]):
        assert torch.equal(rows(es.get_attachment(other)), rows(attachment))

    model = tiny("llama-tied")  # attached with the saved rows, or set by hand
    from_adapter = es.attach(model, saved)
    optimizer = MAKERS["AdamW"](from_adapter.parameters())
    optimizer.load_state_dict(copy.deepcopy(state))
    steps(model, optimizer, 1)
    assert torch.equal(rows(from_adapter), rows(attachment))
    model, by_hand = attach_tiny()
    with torch.no_grad():
        next(by_hand.parameters()).copy_(saved.tensors[TABLE])
    optimizer = MAKERS["AdamW"](by_hand.parameters())
    optimizer.load_state_dict(copy.deepcopy(state))
    steps(model, optimizer, 1)
    assert torch.equal(rows(by_hand), rows(attachment))


def test_a_copy_that_was_never_stepped_is_checked_as_well() -> None:
    model, attachment = attach_tiny()
    optimizer = MAKERS["AdamW"](attachment.parameters())
    steps(model, optimizer, 1)
    fresh, _ = attach_tiny()
    for other in (copy.deepcopy(fresh), pickle.loads(pickle.dumps(fresh))):
        late = MAKERS["AdamW"](es.get_attachment(other).parameters())
        late.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        with raises(AttachmentError, found="moments", where="default"):
            steps(other, late, 1)


def test_restore_checks_rows_tables_base_and_state() -> None:
    _, attachment = attach_tiny()
    start = rows(attachment)
    reordered = trained(tiny("llama-tied"), INDICES[::-1])
    attachment.restore(reordered)
    assert torch.equal(rows(attachment), reordered.tensors[TABLE].flip(0))
    attachment.restore(es.attach(tiny("llama-tied"), es.TrainableTokensConfig(INDICES)).adapter(), name="default")
    assert torch.equal(rows(attachment), start)
    with raises(AttachmentError, where=("default", TABLE), expected="5, 7", found="5, 8"):
        attachment.restore(trained(tiny("llama-tied"), [5, 8]))
    with pytest.raises(BaseMismatchError):
        attachment.restore(trained(tiny("llama-tied", seed=4), INDICES))
    with raises(AttachmentError, where="other", found="default"):
        attachment.restore(reordered, name="other")
    attachment.merge()
    with raises(AttachmentError, hint="unmerge()"):
        attachment.restore(reordered)
    attachment.unmerge()
    assert torch.equal(rows(attachment), start)

    untied = tiny("llama-untied")
    both = es.attach(untied, es.TrainableTokensConfig(INDICES, target_modules=["embed_tokens", "lm_head"]))
    kept = [p.detach().clone() for p in both.parameters()]
    with raises(AttachmentError, where="default", expected=f"lm_head.weight, {TABLE}", found=TABLE):
        both.restore(trained(tiny("llama-untied"), INDICES))
    assert all(torch.equal(a, b) for a, b in zip(kept, both.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["llama-tied", "llama-untied", "gpt2", "bert"])
def test_a_state_dict_of_another_base_is_refused_before_it_is_loaded(kind: str) -> None:
    model = tiny(kind)
    adapter = trained(tiny(kind), INDICES)
    same, merged = tiny(kind).state_dict(), tiny(kind)
    es.merge(merged, adapter)
    attachment = es.attach(model, es.TrainableTokensConfig(INDICES))
    before = state_bits(model)
    model.load_state_dict(same)
    model.load_state_dict(
        {n: t for n, t in tiny(kind, seed=4).state_dict().items() if "norm" in n.lower()}, strict=False
    )
    for other in (merged, tiny(kind, seed=4)):
        held = state_bits(model)
        with raises(BaseMismatchError, where=(INPUT[kind], "rows 5, 7"), expected="sha256", hint="detach()"):
            model.load_state_dict(other.state_dict())
        assert state_bits(model) == held
    model.load_state_dict(same)
    assert state_bits(model) == before
    attachment.detach()
    model.load_state_dict(merged.state_dict())
    assert state_bits(model) == state_bits(merged)


def test_a_trainable_table_may_be_loaded() -> None:
    model = tiny("llama-tied")
    es.attach(model, es.TrainableTokensConfig(INDICES), freeze=False)
    other = tiny("llama-tied", seed=4)
    model.load_state_dict(other.state_dict())
    assert state_bits(model) == state_bits(other)


def test_a_state_dict_loaded_over_trained_rows_warns() -> None:
    model, attachment = attach_tiny()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(base)
    steps(model, MAKERS["AdamW"](attachment.parameters()), 1)
    kept = rows(attachment)
    with pytest.warns(EmbedSurgeryWarning, match=r"attachment\.restore\(\)"):
        model.load_state_dict(base)
    assert torch.equal(rows(attachment), kept)
    attachment.saved_beside = True
    model.load_state_dict(base)
    attachment.detach()
    model.load_state_dict(base)
    assert not model._load_state_dict_pre_hooks


def ordered(names: Sequence[str], indices: Mapping[str, list[int]]) -> tuple[Any, Any]:
    """A model with adapters attached in this order."""
    model = tiny("llama-tied")
    for name in names:
        attachment = es.attach(model, es.TrainableTokensConfig(indices[name]), name=name)
    return model, attachment


@pytest.mark.parametrize("what", ["rows", "adapters"])
def test_another_order_of_rows_or_adapters_is_refused(what: str, tmp_path: Path) -> None:
    _, saved = ordered("ab", {"a": [5, 7, 9], "b": [8]})
    save_rows(saved, tmp_path / "rows")
    names, rows_of = ("ab", {"a": [5, 9, 7], "b": [8]}) if what == "rows" else ("ba", {"a": [5, 7, 9], "b": [8]})
    _, other = ordered(names, rows_of)
    kept = [p.detach().clone() for p in other.parameters()]
    with torch.no_grad():
        for part in saved.parameters():
            part.add_(1.0)
    fields = {
        "rows": {"where": (f"a: {TABLE}", "1, 2"), "expected": "9, 7", "found": "7, 9"},
        "adapters": {"where": tmp_path / "rows", "expected": "b, a", "found": "a, b"},
    }
    with raises(AttachmentError, **fields[what]):
        restore_rows(other, tmp_path / "rows")
    assert all(torch.equal(a, b) for a, b in zip(kept, other.parameters(), strict=True))


@pytest.mark.parametrize("text", ["[]", "{"])
def test_an_order_file_that_is_not_an_object_is_refused(text: str, tmp_path: Path) -> None:
    _, attachment = attach_tiny()
    save_rows(attachment, tmp_path)
    (tmp_path / "order.json").write_text(text)
    with raises(CheckpointError, where="order.json"):
        restore_rows(attachment, tmp_path)


@pytest.mark.parametrize("text", ['{"adapters": 5}', '{"adapters": {}}', "{}"])
def test_an_order_file_without_names_is_refused(text: str, tmp_path: Path) -> None:
    _, attachment = attach_tiny()
    save_rows(attachment, tmp_path)
    (tmp_path / "order.json").write_text(text)
    with raises(AttachmentError, where=tmp_path, expected="default", found="none"):
        restore_rows(attachment, tmp_path)


def test_a_user_function_named_like_a_librarys_is_not_a_resume() -> None:
    model, attachment = attach_tiny()

    def restore_model() -> None:
        model.load_state_dict(tiny("llama-tied").state_dict())

    start = rows(attachment)
    restore_model()
    steps(model, torch.optim.SGD(attachment.parameters(), lr=0.1), 1)
    assert not torch.equal(rows(attachment), start)


def test_a_trainer_resumed_with_its_rows_in_another_order_is_refused(tmp_path: Path) -> None:
    model, _ = attach_tiny()
    trainer(model, tmp_path, callbacks=[EmbedSurgeryCallback()], max_steps=3).train()
    model = tiny("llama-tied")
    turned = es.attach(model, es.TrainableTokensConfig(INDICES[::-1]))
    start = rows(turned)
    with raises(AttachmentError, where=("default", TABLE), expected="7, 5", found="5, 7", hint="token_indices"):
        trainer(model, tmp_path, callbacks=[EmbedSurgeryCallback()]).train(resume_from_checkpoint=True)
    assert torch.equal(rows(turned), start)


def with_new_tokens(folder: Path, spare: int, kind: str = "llama-tied") -> tuple[Any, Any, Any]:
    """A model, its attachment and the ids of two new tokens; ``spare`` rows are unused before they are added."""
    import transformers as tr

    write_tokenizer(folder)
    tokenizer = tr.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="t0", eos_token="t2"
    )
    model = tiny(kind)
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer) + spare, mean_resizing=False)
    ids = es.add_tokens(model, tokenizer, ["<a>", "<b>"], init="mean")
    return model, es.attach(model, es.TrainableTokensConfig(ids), tokenizer=tokenizer), ids


@pytest.mark.parametrize("kind", ["llama-tied", "llama-untied"])
@pytest.mark.parametrize("spare", [0, 8])
def test_new_tokens_resume_and_get_their_best_rows_back(spare: int, kind: str, tmp_path: Path) -> None:
    """A checkpoint has the new tokens' initial rows, which the base's fingerprint does not cover."""
    runs = []
    for resume in (None, str(tmp_path / "out/checkpoint-3")):
        model, attachment, ids = with_new_tokens(tmp_path, spare, kind)
        model.load_state_dict(model.state_dict())
        more = {
            "eval_strategy": "steps",
            "eval_steps": 3,
            "load_best_model_at_end": True,
            "metric_for_best_model": "loss",
        }
        trained = trainer(model, tmp_path / "out", callbacks=[EmbedSurgeryCallback()], **more)
        for example in trained.train_dataset:
            example["input_ids"][2] = example["labels"][2] = ids[0]
        trained.train(resume_from_checkpoint=resume)
        runs.append([parameter.detach().clone() for parameter in attachment.parameters()])
    assert all(map(torch.equal, *runs))
    other, again, _ = with_new_tokens(tmp_path, spare, kind)
    assert not torch.equal(next(again.parameters()), runs[0][0])
    with torch.no_grad():
        other.model.embed_tokens.weight[4] += 1.0
    with raises(BaseMismatchError, where=TABLE, expected="sha256", hint="detach()"):
        again.model.load_state_dict(other.state_dict())


def test_an_interrupted_training_no_longer_saves_the_rows(tmp_path: Path) -> None:
    model, attachment = attach_tiny()
    trained = trainer(model, tmp_path, callbacks=[EmbedSurgeryCallback()])
    step = trained.training_step

    def interrupted(*given: Any, **more: Any) -> Any:
        assert attachment.saved_beside
        assert not copy.deepcopy(attachment).saved_beside
        if trained.state.global_step == 2:
            raise KeyboardInterrupt
        return step(*given, **more)

    trained.training_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        trained.train()
    assert not attachment.saved_beside
    with pytest.warns(EmbedSurgeryWarning, match=r"\bdefault\b.*attachment\.merge\(\)"):
        model.save_pretrained(tmp_path / "saved")
    with pytest.warns(EmbedSurgeryWarning, match=r"attachment\.restore\(\)"):
        model.load_state_dict(model.state_dict())

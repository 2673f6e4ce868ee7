"""transformers' Trainer: a model with an attachment trains, saves and resumes like any other."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import embedsurgery as es
from embedsurgery.errors import AttachmentError, EmbedSurgeryWarning
from embedsurgery.integrations import EmbedSurgeryCallback
from tests.support.comparing import state_bits
from tests.support.errors import raises
from tests.support.integrations import INDICES, attach_tiny, batch, losses, rows, trainer
from tests.support.models import tiny
from tests.support.processes import python


@pytest.mark.parametrize("kind", ["llama-tied", "llama-untied", "bert"])
def test_only_the_rows_train_and_a_resumed_run_matches_an_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    model, attachment = attach_tiny(kind)
    before, start = state_bits(model), rows(attachment)
    whole = trainer(model, tmp_path, kind=kind, callbacks=[EmbedSurgeryCallback()], num_train_epochs=1)
    first = whole.evaluate()["eval_loss"]
    whole.train()
    assert whole.evaluate()["eval_loss"] < first - 0.01
    assert state_bits(model) == before
    moved = (rows(attachment) - start).abs().amax(dim=1)
    assert (moved > 0.05).all()

    model, resumed = attach_tiny(kind)
    again = trainer(model, tmp_path, kind=kind, callbacks=[EmbedSurgeryCallback()])
    (parameter,) = resumed.parameters()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert next(resumed.parameters()) is parameter
    assert torch.equal(rows(resumed), rows(attachment))
    assert losses(again) == losses(whole)
    assert len(losses(again)) == 6
    assert state_bits(model) == before


def test_the_numbers_match_a_hand_written_loop_on_the_dense_model(tmp_path: Path) -> None:
    model, attachment = attach_tiny()
    trained = trainer(model, tmp_path, callbacks=[EmbedSurgeryCallback()], optim="sgd", lr_scheduler_type="constant")
    seen: list[dict[str, torch.Tensor]] = []
    collate = trained.data_collator
    trained.data_collator = lambda items: seen.append(collate(items)) or seen[-1]
    trained.train()
    dense = tiny("llama-tied").train()
    weight = dense.get_input_embeddings().weight
    for inputs in seen[:6]:
        loss = dense(**inputs).loss
        (gradient,) = torch.autograd.grad(loss, [weight])
        norm = gradient[INDICES].norm()
        with torch.no_grad():
            weight[INDICES] -= 3e-2 * gradient[INDICES] * min(1.0, 1.0 / (float(norm) + 1e-6))
    torch.testing.assert_close(rows(attachment), weight.detach()[INDICES], rtol=0, atol=1e-6)


def test_every_adapter_is_saved_active_or_not_and_restored_under_its_name(tmp_path: Path) -> None:
    def two(name: str = "a") -> tuple[Any, Any]:
        model = tiny("llama-tied")
        attachment = es.attach(model, es.TrainableTokensConfig([5]), name=name)
        es.attach(model, es.TrainableTokensConfig([7]), name="/b")  # a name is not a path
        attachment.activate(name)
        return model, attachment

    model, attachment = two()
    with torch.no_grad():
        list(attachment.parameters())[1].fill_(0.25)
    trainer(model, tmp_path, callbacks=[EmbedSurgeryCallback()], max_steps=3).train()
    saved = sorted(p.parent.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("adapter_model.safetensors"))
    assert saved == ["checkpoint-3/embedsurgery/%2Fb", "checkpoint-3/embedsurgery/a"]
    adapter = es.load(tmp_path / "checkpoint-3/embedsurgery/a")
    assert torch.equal(
        adapter.tensors["model.embed_tokens.weight"], attachment.adapter("a").tensors["model.embed_tokens.weight"]
    )
    model, again = two()
    trainer(model, tmp_path, callbacks=[EmbedSurgeryCallback()], max_steps=3).train(resume_from_checkpoint=True)
    assert all(torch.equal(a, b) for a, b in zip(attachment.parameters(), again.parameters(), strict=True))

    model, _ = two("c")
    with raises(AttachmentError, expected="/b, c", found="/b, a"):
        trainer(model, tmp_path, callbacks=[EmbedSurgeryCallback()]).train(resume_from_checkpoint=True)


def test_the_best_rows_come_back_at_the_end_and_the_limit_keeps_them(tmp_path: Path) -> None:
    model, attachment = attach_tiny()
    kept: dict[int, torch.Tensor] = {}

    class Worsen(transformers.TrainerCallback):
        """Worsens the rows from the third step on, so that an earlier step is the best."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step > 2:
                with torch.no_grad():
                    next(attachment.parameters()).add_(3.0)
            kept[state.global_step] = rows(attachment)

    trained = trainer(
        model,
        tmp_path,
        callbacks=[EmbedSurgeryCallback(), Worsen()],
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        save_total_limit=2,
        max_steps=4,
    )
    trained.train()
    best = int(trained.state.best_model_checkpoint.rpartition("-")[2])
    assert best in (1, 2)
    assert torch.equal(rows(attachment), kept[best])
    assert not torch.equal(rows(attachment), kept[4])
    assert trained.evaluate()["eval_loss"] == pytest.approx(trained.state.best_metric, abs=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"checkpoint-{best}", "checkpoint-4"]
    assert (tmp_path / f"checkpoint-{best}/embedsurgery/default/adapter_model.safetensors").exists()


def test_without_the_callback_a_resume_raises_at_the_first_step(tmp_path: Path) -> None:
    model, attachment = attach_tiny()
    with pytest.warns(EmbedSurgeryWarning, match=r"\bdefault\b.*attachment\.merge\(\)"):
        trainer(model, tmp_path, max_steps=3).train()
    model, attachment = attach_tiny()
    start = rows(attachment)
    with raises(AttachmentError, found="moments", where="default", hint="EmbedSurgeryCallback()"):
        trainer(model, tmp_path).train(resume_from_checkpoint=True)
    assert torch.equal(rows(attachment), start)
    with raises(AttachmentError, where="step 3", found="EmbedSurgeryCallback"):
        trainer(model, tmp_path, callbacks=[EmbedSurgeryCallback()]).train(resume_from_checkpoint=True)


@pytest.mark.filterwarnings(r"ignore:.*attachment\.merge\(\):embedsurgery.errors.EmbedSurgeryWarning")
@pytest.mark.parametrize("options", [{"optim": "sgd"}, {"save_only_model": True}], ids=str)
def test_without_the_callback_a_resume_raises_where_there_are_no_moments(options: Any, tmp_path: Path) -> None:
    model, attachment = attach_tiny()
    trainer(model, tmp_path, max_steps=3, **options).train()
    saved = attachment.adapter()
    model, attachment = attach_tiny()
    start = rows(attachment)
    with raises(AttachmentError, found="state dict was loaded", where="default", hint="EmbedSurgeryCallback()"):
        trainer(model, tmp_path, **options).train(resume_from_checkpoint=True)
    assert torch.equal(rows(attachment), start)
    for by_hand in (True, False):  # rows restored in another way are accepted
        model = tiny("llama-tied")
        attachment = es.attach(model, es.TrainableTokensConfig(INDICES) if by_hand else saved)
        if by_hand:
            attachment.restore(saved)
        trainer(model, tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert not torch.equal(rows(attachment), start)


def test_with_the_callback_a_resume_without_moments_has_the_rows(tmp_path: Path) -> None:
    found = []
    for resume in (None, str(tmp_path / "checkpoint-3")):
        model, attachment = attach_tiny()
        trained = trainer(model, tmp_path, callbacks=[EmbedSurgeryCallback()], optim="sgd")
        trained.train(resume_from_checkpoint=resume)
        found.append((rows(attachment), losses(trained)))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@pytest.mark.filterwarnings(r"ignore:.*attachment\.merge\(\):embedsurgery.errors.EmbedSurgeryWarning")
def test_without_the_callback_loading_the_best_model_warns(tmp_path: Path) -> None:
    model, _ = attach_tiny()
    trained = trainer(
        model, tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1, save_steps=1, max_steps=2
    )
    with pytest.warns(EmbedSurgeryWarning, match=r"attachment\.restore\(\)"):
        trained.train()


def test_a_checkpoint_elsewhere_is_found_by_run_id_or_argument(tmp_path: Path) -> None:
    model, attachment = attach_tiny()
    trainer(model, tmp_path / "one", callbacks=[EmbedSurgeryCallback()], max_steps=3, save_steps=3).train()
    wanted = rows(attachment)
    moved = tmp_path / "moved" / "checkpoint-3"
    shutil.copytree(tmp_path / "one" / "checkpoint-3", moved)
    model, other = attach_tiny()  # another run with a checkpoint-3 of its own
    trainer(model, tmp_path / "two", callbacks=[EmbedSurgeryCallback()], max_steps=3, seed=9, learning_rate=0.5).train()
    assert not torch.equal(rows(other), wanted)

    model, resumed = attach_tiny()
    searched = (
        tmp_path / "two" / "checkpoint-3"
    )  # the Trainer does not tell a callback of the directory it resumes from
    with raises(AttachmentError, where=searched, expected="step 3", hint="resume_from_checkpoint="):
        trainer(model, tmp_path / "two", callbacks=[EmbedSurgeryCallback()], max_steps=3).train(
            resume_from_checkpoint=str(moved)
        )
    named = EmbedSurgeryCallback(resume_from_checkpoint=str(moved))
    trainer(model, tmp_path / "two", callbacks=[named], max_steps=3).train(resume_from_checkpoint=str(moved))
    assert torch.equal(rows(resumed), wanted)


def test_a_checkpoint_with_unfinished_rows_is_refused(tmp_path: Path) -> None:
    model, _ = attach_tiny()
    trainer(model, tmp_path, callbacks=[EmbedSurgeryCallback()], max_steps=3).train()
    (tmp_path / "checkpoint-3/embedsurgery/run.json").unlink()
    model, attachment = attach_tiny()
    start = rows(attachment)
    with raises(AttachmentError, where=tmp_path / "checkpoint-3", expected=("run.json", "step 3")):
        trainer(model, tmp_path, callbacks=[EmbedSurgeryCallback()]).train(resume_from_checkpoint=True)
    assert torch.equal(rows(attachment), start)


def test_a_state_that_restores_its_callbacks_restores_the_rows(tmp_path: Path) -> None:
    model, attachment = attach_tiny()
    trainer(model, tmp_path, callbacks=[EmbedSurgeryCallback()]).train()
    model, again = attach_tiny()
    trained = trainer(model, tmp_path, callbacks=[EmbedSurgeryCallback()], restore_callback_states_from_checkpoint=True)
    trained.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(rows(again), rows(attachment))
    marks = [json.loads((tmp_path / f"checkpoint-{n}/embedsurgery/run.json").read_text()) for n in (3, 6)]
    assert [mark["step"] for mark in marks] == [3, 6]
    assert marks[0]["run"] != marks[1]["run"]


def test_in_a_search_the_rows_go_to_the_trial_that_wrote_the_checkpoint(tmp_path: Path) -> None:
    model, attachment = attach_tiny()
    callback = EmbedSurgeryCallback()
    trained = trainer(model, tmp_path / "run-0", callbacks=[callback], max_steps=3)
    trained.train()
    shutil.rmtree(tmp_path / "run-0/checkpoint-3/embedsurgery")
    shutil.copytree(tmp_path / "run-0", tmp_path / "run-1")
    other = tmp_path / "run-1/checkpoint-3/trainer_state.json"
    other.write_text(other.read_text().replace(callback.run, "0" * 32))
    trained.args.output_dir, trained.state.is_hyper_param_search = str(tmp_path), True
    callback.on_save(trained.args, trained.state, trained.control, model=model)
    (saved,) = tmp_path.rglob("adapter_model.safetensors")
    assert saved.relative_to(tmp_path).parts[:2] == ("run-0", "checkpoint-3")
    assert torch.equal(es.load(saved.parent).tensors["model.embed_tokens.weight"], rows(attachment))


def test_no_attachment_raises_and_frozen_rows_warn(tmp_path: Path) -> None:
    with raises(AttachmentError, where="LlamaForCausalLM", hint="embedsurgery.attach("):
        trainer(tiny("llama-tied"), tmp_path, callbacks=[EmbedSurgeryCallback()]).train()
    model, attachment = attach_tiny()
    attachment.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    with pytest.warns(EmbedSurgeryWarning, match=r"attachment\.unfreeze\(\)"):
        trainer(model, tmp_path, callbacks=[EmbedSurgeryCallback()], max_steps=1).train()


@pytest.mark.filterwarnings(r"ignore:.*attachment\.merge\(\):embedsurgery.errors.EmbedSurgeryWarning")
def test_a_resume_in_the_same_process_warns_when_rows_are_not_restored(tmp_path: Path) -> None:
    model, attachment = attach_tiny()
    kept = trainer(model, tmp_path, callbacks=[EmbedSurgeryCallback()])
    kept.train()
    last = rows(attachment)
    kept.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))  # a warning would be an error here
    assert torch.equal(rows(attachment), last)
    forgot = trainer(model, tmp_path)
    with pytest.warns(EmbedSurgeryWarning, match=r"attachment\.restore\(\)"):
        forgot.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_merged_rows_are_not_trained(tmp_path: Path) -> None:
    model, attachment = attach_tiny()
    attachment.merge()
    with raises(AttachmentError, where="trainer.train()", hint="attachment.unmerge()"):
        trainer(model, tmp_path, callbacks=[EmbedSurgeryCallback()]).train()


def test_gradients_accumulate_over_batches(tmp_path: Path) -> None:
    found = []
    for options in (
        {"per_device_train_batch_size": 4},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    ):
        model, attachment = attach_tiny()
        trainer(model, tmp_path, max_steps=3, save_strategy="no", **options).train()
        found.append(rows(attachment))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")  # the name that every version has
@pytest.mark.parametrize("kind", ["llama-tied", "bert"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(kind: str, reentrant: bool, tmp_path: Path) -> None:
    found = []
    for more in ({}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}):
        model, attachment = attach_tiny(kind)
        if kind == "bert":  # dropout would make the runs differ
            model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
        out: list[torch.Tensor] = []
        handle = model.get_input_embeddings().register_forward_hook(lambda m, a, o, out=out: out.append(o))
        trained = trainer(model, tmp_path, kind=kind, max_steps=3, save_strategy="no", **more)
        trained.train()
        handle.remove()
        assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules()) == bool(more)
        assert all(o.requires_grad for o in out[:3])
        found.append((rows(attachment), losses(trained)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-6)
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-6)


def test_bf16_autocast_keeps_fp32_rows(tmp_path: Path) -> None:
    model, attachment = attach_tiny()
    before = state_bits(model)
    trained = trainer(model, tmp_path, callbacks=[EmbedSurgeryCallback()], bf16=True)
    first = trained.evaluate()["eval_loss"]
    trained.train()
    assert trained.evaluate()["eval_loss"] < first - 0.01
    assert rows(attachment).dtype == torch.float32
    assert not torch.equal(rows(attachment), rows(attachment).bfloat16().float())
    assert state_bits(model) == before
    model, exact = attach_tiny()
    trainer(model, tmp_path / "fp32", callbacks=[EmbedSurgeryCallback()]).train()
    assert (rows(exact) - rows(attachment)).abs().max() < 0.1  # a few sign flips of Adam's small gradients
    assert rows(exact).mean() == pytest.approx(float(rows(attachment).mean()), abs=2e-2)


def test_a_plain_loop_under_autocast() -> None:
    model, attachment = attach_tiny()
    dense = tiny("llama-tied").train()
    inputs = batch()
    for trained in (model.train(), dense):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = trained(**inputs).loss
        loss.backward()
    (parameter,) = attachment.parameters()
    expected = dense.get_input_embeddings().weight.grad[INDICES]
    assert parameter.grad.dtype == torch.float32
    error = (parameter.grad - expected).norm() / expected.norm()
    assert error < 0.02, error  # bf16 products, 8 bits of mantissa
    optimizer = torch.optim.AdamW(attachment.parameters(), lr=1e-2)
    seen = []
    for _ in range(8):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < seen[0] - 0.02


def test_copies_made_after_training_are_independent(tmp_path: Path) -> None:
    model, attachment = attach_tiny()
    trained = trainer(model, tmp_path, max_steps=2, save_strategy="no")
    trained.train()
    twin = copy.deepcopy(trained.model)
    other = es.get_attachment(twin)
    assert torch.equal(rows(other), rows(attachment))
    trainer(twin, tmp_path, max_steps=2, save_strategy="no").train()
    assert not torch.equal(rows(other), rows(attachment))
    other.detach()
    assert state_bits(twin) == state_bits(tiny("llama-tied"))


def test_importing_the_integrations_loads_neither_transformers_nor_accelerate() -> None:
    loaded = "any(m in sys.modules for m in ('transformers', 'accelerate', 'lightning', 'torch'))"
    done = python(f"import sys, embedsurgery.integrations as i; print(i.__all__, {loaded})")
    assert done.stdout == "['EmbedSurgeryCallback', 'LightningCallback', 'keep_rows'] False\n"

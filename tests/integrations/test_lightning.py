"""Lightning: a LightningModule with an attached model trains, saves and resumes as any does."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import embedsurgery as es
from embedsurgery.errors import AttachmentError, EmbedSurgeryWarning
from tests.support.comparing import state_bits
from tests.support.errors import raises
from tests.support.integrations import INDICES, examples, rows
from tests.support.models import tiny

lightning = pytest.importorskip("lightning.pytorch")
from embedsurgery.integrations.lightning import LightningCallback, adapters  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*eval mode at the start of training"),
    pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]


class Module(lightning.LightningModule):  # type: ignore[misc]
    """A language model that records its training losses."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, torch.Tensor], number: int) -> torch.Tensor:
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def test_step(self, batch: dict[str, torch.Tensor], number: int) -> None:
        self.log("loss", self.model(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=3e-2)


def module(kind: str = "llama-tied", **options: Any) -> tuple[Module, Any]:
    made = Module(tiny(kind))
    return made, es.attach(made.model, es.TrainableTokensConfig(INDICES), **options)


def trainer(folder: Path, *callbacks: Any, epochs: int = 2, **options: Any) -> Any:
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": epochs,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(folder),
        "enable_checkpointing": False,
    } | options
    return lightning.Trainer(callbacks=list(callbacks), **settings)


def saved(folder: Path, made: Module, *callbacks: Any) -> Path:
    """The checkpoint of a run of one epoch."""
    run = trainer(folder, *callbacks, epochs=1)
    run.fit(made, loader())
    run.save_checkpoint(folder / "first.ckpt")
    return folder / "first.ckpt"


def loader() -> DataLoader[Any]:
    """An epoch of three steps."""
    return DataLoader(examples(count=6), batch_size=2)


@pytest.mark.parametrize("kind", ["llama-tied", "llama-untied"])
@pytest.mark.parametrize("weights_only", [True, False])
def test_only_the_rows_train_and_a_resumed_run_matches_an_uninterrupted_one(
    kind: str, weights_only: bool, tmp_path: Path
) -> None:
    whole, attachment = module(kind)
    before, start = state_bits(whole.model), rows(attachment)
    trainer(tmp_path, LightningCallback()).fit(whole, loader())
    assert state_bits(whole.model) == before
    assert ((rows(attachment) - start).abs().amax(dim=1) > 0.05).all()
    assert sum(whole.losses[3:]) < sum(whole.losses[:3]) - 0.05

    checkpoint = saved(tmp_path, module(kind)[0], LightningCallback())
    again, resumed = module(kind)
    (parameter,) = resumed.parameters()
    run = trainer(tmp_path, LightningCallback())
    takes_weights_only = "weights_only" in inspect.signature(run.fit).parameters  # since Lightning 2.6
    run.fit(
        again, loader(), ckpt_path=str(checkpoint), **({"weights_only": weights_only} if takes_weights_only else {})
    )
    assert next(resumed.parameters()) is parameter
    assert torch.equal(rows(resumed), rows(attachment))
    assert again.losses == whole.losses[3:]
    assert len(again.losses) == 3


def test_the_numbers_match_a_hand_written_loop(tmp_path: Path) -> None:
    made, attachment = module()
    trainer(tmp_path, LightningCallback(), epochs=1).fit(made, loader())
    plain = tiny("llama-tied").train()
    reference = es.attach(plain, es.TrainableTokensConfig(INDICES))
    optimizer = torch.optim.AdamW(reference.parameters(), lr=3e-2)
    for inputs in loader():
        optimizer.zero_grad()
        plain(**inputs).loss.backward()
        optimizer.step()
    assert torch.equal(rows(attachment), rows(reference))


def test_testing_a_checkpoint_uses_its_rows_and_adapters_reads_them(tmp_path: Path) -> None:
    made, attachment = module()
    checkpoint = saved(tmp_path, made, LightningCallback())
    first = rows(attachment)
    run = trainer(tmp_path, LightningCallback())
    run.fit(made, loader())
    assert not torch.equal(rows(attachment), first)
    run.test(made, loader(), ckpt_path=str(checkpoint), verbose=False)
    assert torch.equal(rows(attachment), first)
    held = torch.load(checkpoint, weights_only=True)
    assert not any("embedsurgery" in name for name in held["state_dict"])
    (adapter,) = adapters(held).values()
    assert torch.equal(adapter.tensors["model.embed_tokens.weight"], first)
    es.attach(tiny("llama-tied"), adapters(held, "model")["default"])
    with raises(AttachmentError, where="other", found="model"):
        adapters(held, "other")


def test_every_adapter_of_every_model_is_saved_and_others_are_refused(tmp_path: Path) -> None:
    def two(name: str = "a") -> Any:
        made, first = module(name=name)
        es.attach(made.model, es.TrainableTokensConfig([9]), name="/b")
        made.second = tiny("llama-untied", seed=4)
        es.attach(made.second, es.TrainableTokensConfig([3]))
        first.activate(name)
        return made

    made, again = two(), two()
    checkpoint = str(saved(tmp_path, made, LightningCallback()))
    trainer(tmp_path, LightningCallback(), epochs=1).fit(again, loader(), ckpt_path=checkpoint)
    for one, other in ((made.model, again.model), (made.second, again.second)):
        for name in es.get_attachment(one).names:
            left, right = (es.get_attachment(model).adapter(name).tensors for model in (one, other))
            assert all(torch.equal(left[tensor], right[tensor]) for tensor in left)
    expected, found = "model: /b, c; second: default", "model: /b, a; second: default"
    with raises(AttachmentError, expected=expected, found=found):
        trainer(tmp_path, LightningCallback()).fit(two("c"), loader(), ckpt_path=checkpoint)


class Stateless(Module):
    """Trained by an optimizer without state."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=3e-2)


def test_without_the_callback_a_resume_without_moments_raises(tmp_path: Path) -> None:
    made = Stateless(tiny("llama-tied"))
    es.attach(made.model, es.TrainableTokensConfig(INDICES))
    path = saved(tmp_path, made)
    made = Stateless(tiny("llama-tied"))
    es.attach(made.model, es.TrainableTokensConfig(INDICES))
    with raises(AttachmentError, found="state dict was loaded", where="default", hint="attachment.restore("):
        trainer(tmp_path).fit(made, loader(), ckpt_path=path, weights_only=False)


def test_losing_the_rows_raises_or_warns(tmp_path: Path) -> None:
    made, _ = module()
    checkpoint = str(saved(tmp_path, made))  # without the callback
    again, attachment = module()
    start = rows(attachment)
    with raises(AttachmentError, expected="model: default", found="none", hint="LightningCallback"):
        trainer(tmp_path, LightningCallback()).fit(again, loader(), ckpt_path=checkpoint)
    with raises(AttachmentError, found="moments", where="default", hint="attachment.restore("):
        trainer(tmp_path).fit(again, loader(), ckpt_path=checkpoint)
    assert torch.equal(rows(attachment), start)
    with raises(AttachmentError, where="Module", hint="embedsurgery.attach("):
        trainer(tmp_path, LightningCallback()).fit(Module(tiny("llama-tied")), loader())
    weights = lightning.callbacks.ModelCheckpoint(tmp_path / "weights", save_weights_only=True)
    with pytest.warns(EmbedSurgeryWarning, match="save_weights_only=True"):
        trainer(tmp_path, LightningCallback(), weights, enable_checkpointing=True).fit(module()[0], loader())


def test_bf16_and_accumulation(tmp_path: Path) -> None:
    made, attachment = module()
    before, start = copy.deepcopy(made.model.state_dict()), rows(attachment)
    run = trainer(tmp_path, LightningCallback(), epochs=1, precision="bf16-mixed", accumulate_grad_batches=3)
    run.fit(made, loader())
    assert rows(attachment).dtype == torch.float32
    assert (rows(attachment) - start).abs().max().item() == pytest.approx(3e-2, rel=0.05)  # one step of Adam
    assert all(torch.equal(value, before[name]) for name, value in made.model.state_dict().items())


def test_under_the_older_package_name(tmp_path: Path) -> None:
    older = pytest.importorskip("pytorch_lightning")
    made, attachment = module()

    class Older(older.LightningModule):  # type: ignore[misc, name-defined]
        training_step, configure_optimizers = Module.training_step, Module.configure_optimizers

    old = Older()
    old.model, old.losses = made.model, []
    run = older.Trainer(
        accelerator="cpu",
        max_steps=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(tmp_path),
        callbacks=[LightningCallback()],
    )
    run.fit(old, loader())
    run.save_checkpoint(tmp_path / "old.ckpt")
    (adapter,) = adapters(torch.load(tmp_path / "old.ckpt", weights_only=True)).values()
    assert torch.equal(adapter.tensors["model.embed_tokens.weight"], rows(attachment))


def test_an_interrupted_training_no_longer_saves_the_rows(tmp_path: Path) -> None:
    made, attachment = module()
    step = made.training_step

    def interrupted(*given: Any) -> Any:
        assert attachment.saved_beside
        raise KeyboardInterrupt

    made.training_step = interrupted
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(tmp_path, LightningCallback()).fit(made, loader())
    made.training_step = step
    assert not attachment.saved_beside

"""Accelerate: prepare, backward, gather, and what save_state and load_state do to the rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.utils.data import DataLoader

import embedsurgery as es
from embedsurgery.errors import AttachmentError, ConfigError, EmbedSurgeryWarning, UnsupportedError
from embedsurgery.integrations import keep_rows
from tests.support.comparing import state_bits
from tests.support.errors import raises
from tests.support.integrations import INDICES, attach_tiny, batch, examples, rows
from tests.support.models import tiny


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Accelerate keeps its settings per process."""
    yield
    for kind in (AcceleratorState, PartialState, GradientState):
        kind._reset_state()


def prepared(make: Any = torch.optim.AdamW, **options: Any) -> tuple[Accelerator, Any, Any, Any, Any]:
    model, attachment = attach_tiny()
    accelerator = Accelerator(cpu=True, **options)
    optimizer = make(attachment.parameters(), lr=3e-2)
    loader = DataLoader(examples(), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    return accelerator, model, attachment, optimizer, loader


def run(
    accelerator: Accelerator, model: Any, optimizer: Any, loader: Any, *, skip: int = 0, count: int = 3
) -> list[float]:
    seen = []
    model.train()
    for number, inputs in enumerate(loader):
        if skip <= number < skip + count:
            with accelerator.accumulate(model):
                loss = model(**inputs).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            seen.append(accelerator.gather(loss.detach()).mean().item())
    return seen


def test_a_prepared_model_trains_like_a_plain_one() -> None:
    accelerator, model, attachment, optimizer, loader = prepared()
    assert es.get_attachment(model) is attachment
    before = state_bits(accelerator.unwrap_model(model))
    seen = run(accelerator, model, optimizer, loader)

    plain, reference = attach_tiny()
    plain.train()
    by_hand = torch.optim.AdamW(reference.parameters(), lr=3e-2)
    expected = []
    for inputs in list(DataLoader(examples(), batch_size=2))[:3]:
        by_hand.zero_grad()
        loss = plain(**inputs).loss
        loss.backward()
        by_hand.step()
        expected.append(loss.item())
    assert seen == expected
    assert torch.equal(rows(attachment), rows(reference))
    assert state_bits(accelerator.unwrap_model(model)) == before == state_bits(tiny("llama-tied"))


def test_bf16_and_gradient_accumulation() -> None:
    accelerator, model, attachment, optimizer, loader = prepared(mixed_precision="bf16", gradient_accumulation_steps=3)
    start = rows(attachment)
    run(accelerator, model, optimizer, loader, count=2)
    assert torch.equal(rows(attachment), start)
    run(accelerator, model, optimizer, loader, skip=2, count=1)
    assert rows(attachment).dtype == torch.float32
    assert (rows(attachment) - start).abs().max().item() == pytest.approx(3e-2, rel=0.05)  # one step of Adam


def test_a_state_with_the_rows_resumes_to_the_same_bits(tmp_path: Path) -> None:
    accelerator, model, attachment, optimizer, loader = prepared()
    keep_rows(accelerator)
    run(accelerator, model, optimizer, loader)
    accelerator.save_state(str(tmp_path / "state"))
    middle = rows(attachment)
    expected = run(accelerator, model, optimizer, loader, skip=3)
    files = {p.relative_to(tmp_path).as_posix() for p in (tmp_path / "state").rglob("*.safetensors")}
    assert files == {"state/model.safetensors", "state/embedsurgery/default/adapter_model.safetensors"}

    accelerator.load_state(str(tmp_path / "state"))  # in the same process, without a warning
    assert torch.equal(rows(attachment), middle)
    assert run(accelerator, model, optimizer, loader, skip=3) == expected
    final = rows(attachment)

    accelerator, model, resumed, optimizer, loader = prepared()
    keep_rows(accelerator)
    (parameter,) = resumed.parameters()
    accelerator.load_state(str(tmp_path / "state"))
    assert next(resumed.parameters()) is parameter
    assert run(accelerator, model, optimizer, loader, skip=3) == expected
    assert torch.equal(rows(resumed), final)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_a_state_without_the_rows_is_refused(make: Any, tmp_path: Path) -> None:
    accelerator, model, _, optimizer, loader = prepared(make)
    run(accelerator, model, optimizer, loader)
    accelerator.save_state(str(tmp_path / "state"))
    assert not (tmp_path / "state" / "embedsurgery").exists()

    accelerator, model, resumed, optimizer, loader = prepared(make)
    accelerator.load_state(str(tmp_path / "state"))
    with raises(AttachmentError, where="default", hint="attachment.restore("):
        run(accelerator, model, optimizer, loader)
    keep_rows(accelerator)
    with raises(AttachmentError, where=tmp_path / "state" / "embedsurgery", expected="default", found="none"):
        accelerator.load_state(str(tmp_path / "state"))
    assert torch.equal(rows(resumed), tiny("llama-tied").get_input_embeddings().weight[INDICES])


def test_writing_a_state_dict_warns_that_it_has_no_rows(tmp_path: Path) -> None:
    accelerator, model, _, _, _ = prepared()
    for write in (accelerator.get_state_dict, lambda one: accelerator.save_model(one, tmp_path / "model")):
        with pytest.warns(EmbedSurgeryWarning, match=r"\bdefault\b.*attachment\.merge\(\)"):
            write(model)
    accelerator.save_state(str(tmp_path / "state"))  # no warning: a resume from it without the rows is refused


def test_only_an_accelerator_keeps_rows() -> None:
    with raises(ConfigError, where="keep_rows", expected="accelerate.Accelerator", found="LlamaForCausalLM"):
        keep_rows(tiny("llama-tied"))


@pytest.mark.parametrize("kind", ["llama-tied", "llama-untied"])
@pytest.mark.parametrize("first", ["attach", "offload"])
def test_an_offloaded_table_is_refused(first: str, kind: str) -> None:
    from accelerate import cpu_offload

    model = tiny(kind)
    config = es.TrainableTokensConfig(INDICES)
    if first == "offload":
        cpu_offload(model, execution_device=torch.device("cpu"))
        with raises(UnsupportedError, where="embed_tokens.weight", expected=None, found="meta tensor"):
            es.attach(model, config)
        return
    es.attach(model, config)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with raises(UnsupportedError, where="embed_tokens.weight", found="meta tensor", hint="device_map"):
        model(**batch(kind))


def test_layers_may_be_offloaded(tmp_path: Path) -> None:
    from accelerate import dispatch_model

    model, attachment = attach_tiny()
    expected = model(**batch()).logits
    here = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "embedsurgery")
    places = {**dict.fromkeys(here, "cpu"), "model.layers": "disk"}
    dispatch_model(model, places, offload_dir=str(tmp_path), main_device="cpu")
    found = model(**batch()).logits
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in attachment.parameters())

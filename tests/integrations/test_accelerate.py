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
from tests.support.integrations import INDICES, attached, batch, examples, rows
from tests.support.models import tiny


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Accelerate holds its settings in one place for the whole process."""
    yield
    for kind in (AcceleratorState, PartialState, GradientState):
        kind._reset_state()


def prepared(make: Any = torch.optim.AdamW, **options: Any) -> tuple[Accelerator, Any, Any, Any, Any]:
    model, attachment = attached()
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


def test_a_prepared_model_trains_as_a_plain_one() -> None:
    accelerator, model, attachment, optimizer, loader = prepared()
    assert es.get_attachment(model) is attachment
    before = state_bits(accelerator.unwrap_model(model))
    seen = run(accelerator, model, optimizer, loader)

    plain, reference = attached()
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

    accelerator.load_state(str(tmp_path / "state"))  # in the same process: back to the middle, without a warning
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
    with pytest.raises(AttachmentError, match="these rows"):
        run(accelerator, model, optimizer, loader)
    keep_rows(accelerator)
    with pytest.raises(AttachmentError, match="expected default, found none"):
        accelerator.load_state(str(tmp_path / "state"))
    assert torch.equal(rows(resumed), tiny("llama-tied").get_input_embeddings().weight[INDICES])


def test_a_state_dict_that_is_to_be_written_is_said_to_be_the_bases(tmp_path: Path) -> None:
    accelerator, model, _, _, _ = prepared()
    for write in (accelerator.get_state_dict, lambda one: accelerator.save_model(one, tmp_path / "model")):
        with pytest.warns(EmbedSurgeryWarning, match="the base's, without the rows of default"):
            write(model)
    accelerator.save_state(str(tmp_path / "state"))  # a resume from it without the rows is seen


def test_only_an_accelerator_keeps_rows() -> None:
    with pytest.raises(ConfigError, match=r"not an Accelerator.*found LlamaForCausalLM"):
        keep_rows(tiny("llama-tied"))


@pytest.mark.parametrize("kind", ["llama-tied", "llama-untied"])
@pytest.mark.parametrize("first", ["attach", "offload"])
def test_a_table_that_is_offloaded_is_refused_by_name(first: str, kind: str) -> None:
    from accelerate import cpu_offload

    model = tiny(kind)
    config = es.TrainableTokensConfig(INDICES)
    if first == "offload":
        cpu_offload(model, execution_device=torch.device("cpu"))
        with pytest.raises(UnsupportedError, match=r"no values.*keep the table on a device where a model is offloaded"):
            es.attach(model, config)
        return
    es.attach(model, config)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedError, match=r"was offloaded.*embed_tokens.*keep the table, and offload layers"):
        model(**batch(kind))


def test_layers_may_be_offloaded(tmp_path: Path) -> None:
    from accelerate import dispatch_model

    model, attachment = attached()
    expected = model(**batch()).logits
    here = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "embedsurgery")
    places = {**dict.fromkeys(here, "cpu"), "model.layers": "disk"}
    dispatch_model(model, places, offload_dir=str(tmp_path), main_device="cpu")
    found = model(**batch()).logits
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in attachment.parameters())

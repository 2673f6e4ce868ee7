"""``attach(..., active=False)``: an attached adapter that changes nothing until it is activated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import embedsurgery as es
from embedsurgery.errors import AttachmentError
from tests.support.errors import raises
from tests.support.models import KINDS, logits, tiny

CONFIGS: dict[str, Any] = {
    "rows": lambda: es.TrainableTokensConfig([5, 7]),
    "prompt": lambda: es.SoftPromptConfig(3),
}


def randomise(attachment: es.Attachment, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("what", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_changes_nothing_until_it_is_activated(kind: str, what: str) -> None:
    model, other = tiny(kind), tiny(kind)
    before = logits(model)
    attachment = es.attach(model, CONFIGS[what](), name="a", active=False)
    randomise(attachment)
    assert attachment.names == ("a",)
    assert attachment.active == ()
    assert torch.equal(logits(model), before)
    attachment.activate("a")
    randomise(es.attach(other, CONFIGS[what](), name="a"))
    assert torch.equal(logits(model), logits(other))
    assert not torch.equal(logits(model), before)
    attachment.activate()
    assert torch.equal(logits(model), before)


def test_active_adapters_stay_active() -> None:
    model = tiny("llama-tied")
    attachment = es.attach(model, es.TrainableTokensConfig([5, 7]), name="a")
    randomise(attachment)
    live = logits(model)
    es.attach(
        model, es.TrainableTokensConfig([7, 9]), name="b", active=False
    )  # shares row 7 with a, so only one of them can be active
    prompt = es.attach(model, es.SoftPromptConfig(3), name="p")
    randomise(prompt, 2)
    es.attach(model, es.SoftPromptConfig(2), name="q", active=False)
    assert attachment.active == ("a", "p")
    with raises(AttachmentError, where="model.embed_tokens.weight", found=("a and b", "7")):
        attachment.activate("a", "b")
    attachment.activate("a")
    attachment.restore(attachment.adapter("a"), "a")
    assert attachment.active == ("a",)
    attachment.remove("p")
    attachment.remove("q")
    attachment.remove("b")
    assert attachment.names == ("a",)
    assert live.shape == logits(model).shape


def test_the_model_is_frozen_at_once_and_the_rows_train_once_active() -> None:
    model = tiny("llama-tied")
    attachment = es.attach(model, es.TrainableTokensConfig([5]), name="a", active=False)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        name for name, _ in model.named_parameters() if name.startswith("embedsurgery")
    ]
    attachment.activate("a")
    model(input_ids=torch.tensor([[5, 6]])).logits.sum().backward()
    (rows,) = attachment.parameters()
    assert rows.grad is not None
    attachment.detach()
    assert all(p.requires_grad for p in model.parameters())


def test_save_pretrained_is_save(tmp_path: Path) -> None:
    model = tiny("llama-tied")
    attachment = es.attach(model, es.TrainableTokensConfig([5, 7]))
    randomise(attachment)
    assert attachment.save_pretrained(tmp_path / "one") == tmp_path / "one"
    attachment.save(tmp_path / "two")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()

"""In one process: modules whose forward was replaced on the instance, and tensor hooks on overridden outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import embedsurgery as es
from tests.support.distributed.cases import ROWS, attached, targets
from tests.support.models import logits, tiny


@pytest.mark.parametrize("kind", ["llama-tied", "llama-untied", "bert"])
def test_under_accelerates_hooks_the_rows_are_used(kind: str) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = tiny(kind)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu"))
        assert "forward" in module.__dict__
    attachment = es.attach(model, es.TrainableTokensConfig(ROWS, **targets(kind)))
    want = attached(kind)
    attachment.restore(es.get_attachment(want).adapter())
    torch.testing.assert_close(logits(model), logits(want), rtol=0, atol=1e-6)
    assert not torch.allclose(logits(model), logits(tiny(kind)), atol=1e-3)


@pytest.mark.filterwarnings("ignore::embedsurgery.errors.EmbedSurgeryWarning")
def test_a_forward_of_the_users_own_is_overridden_right() -> None:
    model = tiny("llama-untied")
    lookup = model.get_input_embeddings()
    lookup.forward = lambda ids: 3 * torch.nn.functional.embedding(ids, lookup.weight)
    attachment = es.attach(model, es.TrainableTokensConfig(ROWS))
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.add_(0.25)
    live = logits(model)
    attachment.merge()
    torch.testing.assert_close(live, logits(model), rtol=0, atol=1e-5)


def test_a_tensor_hook_on_the_logits_of_a_head_with_a_bias() -> None:
    model: Any = attached("bert")
    output = model(input_ids=torch.tensor([[5, 7, 9]])).logits
    seen = []
    output.register_hook(lambda grad: seen.append(grad.shape))  # torch 2.13 crashed here
    output.sum().backward()
    assert seen == [output.shape]

"""Models with a soft prompt of large values, and their expected outputs, computed without embedsurgery."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

import embedsurgery as es
from tests.support.prompt_models import D, tiny

N = 4


def randomise(attachment: Any, seed: int = 1) -> Any:
    """Set an attachment's virtual tokens to random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return attachment


def prompted(kind: str, count: int = N, seed: int = 1, **options: Any) -> tuple[Any, Any]:
    """Return a model of a kind, and its attachment."""
    model = tiny(kind)
    torch.manual_seed(0)
    return model, randomise(es.attach(model, es.SoftPromptConfig(count, **options)), seed)


@cache
def shared(kind: str, count: int = N) -> tuple[Any, Any, Any]:
    """Return the same for tests that change nothing, and the plain model."""
    return (*prompted(kind, count), tiny(kind))


def vectors(attachment: Any, name: str | None = None) -> torch.Tensor:
    """Return the prompt of an attachment's adapter, (n, D)."""
    return attachment.adapter(name).tensors["prompt_embeddings"]


def embedded(plain: Any, prompt: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return prompt and sample as ``inputs_embeds`` of a plain model, (1, n + L, D)."""
    lookup = plain.get_input_embeddings()
    return torch.cat([prompt, lookup(ids)])[None].to(lookup.weight.dtype)


def alone(plain: Any, prompt: torch.Tensor, ids: torch.Tensor, **more: Any) -> Any:
    """Return the outputs of a plain model for prompt and sample, without padding."""
    with torch.no_grad():
        return plain(inputs_embeds=embedded(plain, prompt, ids), **more)


def close(found: torch.Tensor, expected: torch.Tensor, at_most: float = 1e-5) -> None:
    """Check that two tensors have one shape, and are equal up to the order of sums."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max().item() < at_most


assert D == 16

"""Models with a soft prompt that is far from nothing, and what they should give, computed without any of our code."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

import embedsurgery as es
from tests.support.prompt_models import D, tiny

N = 4


def randomise(attachment: Any, seed: int = 1) -> Any:
    """Virtual tokens with values of their own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return attachment


def prompted(kind: str, count: int = N, seed: int = 1, **options: Any) -> tuple[Any, Any]:
    """A model of a kind, and its attachment."""
    model = tiny(kind)
    torch.manual_seed(0)
    return model, randomise(es.attach(model, es.SoftPromptConfig(count, **options)), seed)


@cache
def shared(kind: str, count: int = N) -> tuple[Any, Any, Any]:
    """The same for tests that change nothing, with the plain model beside it."""
    return (*prompted(kind, count), tiny(kind))


def vectors(attachment: Any, name: str | None = None) -> torch.Tensor:
    """The prompt of an attachment's adapter, (n, D)."""
    return attachment.adapter(name).tensors["prompt_embeddings"]


def embedded(plain: Any, prompt: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """One sample behind a prompt, (1, n + L, D), as a plain model takes it by ``inputs_embeds``."""
    lookup = plain.get_input_embeddings()
    return torch.cat([prompt, lookup(ids)])[None].to(lookup.weight.dtype)


def alone(plain: Any, prompt: torch.Tensor, ids: torch.Tensor, **more: Any) -> Any:
    """What a plain model gives for one sample behind a prompt, without padding."""
    with torch.no_grad():
        return plain(inputs_embeds=embedded(plain, prompt, ids), **more)


def close(found: torch.Tensor, expected: torch.Tensor, at_most: float = 1e-5) -> None:
    """Two tensors of one shape, equal up to the order of sums."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max().item() < at_most


assert D == 16

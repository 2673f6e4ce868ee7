"""What a call was given, as the hooks of a soft prompt see it: sizes, where texts begin, labels, places in front."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch

from embedsurgery.errors import UnsupportedError
from embedsurgery.runtime.prompts.masks import first_real

IGNORED = -100
"""The label that no loss counts."""


def has_input(given: dict[str, Any]) -> bool:
    """Whether there are tokens, or their embeddings."""
    return given.get("input_ids") is not None or given.get("inputs_embeds") is not None


def size_of(given: dict[str, Any]) -> tuple[int, int]:
    """B and L of what is given."""
    tokens = given.get("input_ids")
    tokens = given["inputs_embeds"] if tokens is None else tokens
    return tokens.shape[0], tokens.shape[1]


def first_of(mask: Any) -> torch.Tensor | None:
    """Where the text of each sample begins; None where a glance says that all begin at once."""
    if isinstance(mask, dict):
        mask = next((part for part in mask.values() if isinstance(part, torch.Tensor)), None)
    if not isinstance(mask, torch.Tensor) or mask.dim() not in (2, 4):
        return None
    first = first_real(mask)
    if first.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(first.any()):
        return None
    return first


def is_by_token(labels: Any, batch: int, length: int) -> TypeGuard[torch.Tensor]:
    """Whether labels are classes, one for each token."""
    return isinstance(labels, torch.Tensor) and labels.shape == (batch, length) and not labels.is_floating_point()


def refuse_packed(positions: torch.Tensor, mask: Any) -> None:
    """Refuse several texts in one row, told apart by their positions: the prompt would stand before the first alone."""
    if mask is not None or positions.dim() != 2 or torch.compiler.is_compiling():
        return
    if bool((positions.diff(dim=1) != 1).any()):
        raise UnsupportedError(
            "a soft prompt cannot stand before each of several texts in one row",
            where="position_ids",
            expected="positions that count up",
            hint="pad the texts instead of packing them",
        )


def with_front(given: dict[str, Any], count: int, filler: int, batch: int, length: int) -> dict[str, Any]:
    """A head's inputs with places for the prompt, whose outputs it is going to get."""
    out = dict(given)
    for name, value in (("input_ids", filler + 1), ("attention_mask", 1), ("labels", IGNORED)):
        part = given.get(name)
        if not isinstance(part, torch.Tensor) or part.shape != (batch, length):
            continue
        if name != "labels" or not part.is_floating_point():
            out[name] = torch.cat([part.new_full((batch, count), value), part], dim=1)
    embeds = given.get("inputs_embeds")
    if embeds is not None:
        out["inputs_embeds"] = torch.cat([embeds.new_zeros(batch, count, embeds.shape[2]), embeds], dim=1)
    for name in ("start_positions", "end_positions"):
        if isinstance(given.get(name), torch.Tensor):
            out[name] = given[name] + count
    return out


def without_front(given: dict[str, Any], count: int) -> dict[str, Any]:
    """What `with_front` put in is taken out again where the tokens are read."""
    out = dict(given)
    for name in ("input_ids", "attention_mask", "inputs_embeds"):
        part = given.get(name)
        if isinstance(part, torch.Tensor) and part.dim() in (2, 3):
            out[name] = part[:, count:]
    return out

"""Reads the arguments of a call for the hooks: sizes, where texts start, labels, and entries for a kept prompt."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch

from embedsurgery.errors import UnsupportedError
from embedsurgery.runtime.prompts.masks import first_real

IGNORED = -100
"""The label that losses ignore."""


def has_input(given: dict[str, Any]) -> bool:
    """Whether a call got tokens or their embeddings."""
    return given.get("input_ids") is not None or given.get("inputs_embeds") is not None


def input_size(given: dict[str, Any]) -> tuple[int, int]:
    """Return B and L of a call's input."""
    tokens = given.get("input_ids")
    tokens = given["inputs_embeds"] if tokens is None else tokens
    return tokens.shape[0], tokens.shape[1]


def text_starts(mask: Any) -> torch.Tensor | None:
    """Return the index of each sample's first real token, int64 (B,); None if it is known to be 0 in every sample.

    Args:
        mask: An attention mask, 2-D or 4-D, a dict of them by the kind of attention, or anything else.
    """
    if isinstance(mask, dict):
        mask = next((part for part in mask.values() if isinstance(part, torch.Tensor)), None)
    if not isinstance(mask, torch.Tensor) or mask.dim() not in (2, 4):
        return None
    first = first_real(mask)
    # Only on a CPU the values can be read without waiting. Elsewhere an even batch takes the general way.
    if first.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(first.any()):
        return None
    return first


def are_token_labels(labels: Any, batch: int, length: int) -> TypeGuard[torch.Tensor]:
    """Whether labels are classes, one for each token."""
    return isinstance(labels, torch.Tensor) and labels.shape == (batch, length) and not labels.is_floating_point()


def refuse_packed(positions: torch.Tensor, mask: Any) -> None:
    """Refuse several texts packed into one row, which only their positions tell apart.

    The prompt would be inserted before the first text alone. A 4-D mask separates them, and each of them then attends
    to the prompt.

    Raises:
        UnsupportedError: The positions of a row do not increase by 1, and there is no mask.
    """
    if mask is not None or positions.dim() != 2 or torch.compiler.is_compiling():
        return
    if bool((positions.diff(dim=1) != 1).any()):
        raise UnsupportedError(
            "a soft prompt does not support several texts packed into one row",
            where="position_ids",
            expected="positions that increase by 1",
            hint="pad the texts instead of packing them",
        )


def add_prompt_room(given: dict[str, Any], count: int, filler: int, batch: int, length: int) -> dict[str, Any]:
    """Return a head's arguments with N entries for the prompt in front, as its outputs keep them.

    A head reads its inputs beside the hidden states: a pooler searches the last token that is not padding, a loss needs
    labels of the outputs' length. `remove_prompt_room` removes the entries again before the tokens are read.

    Args:
        given: The head's arguments by name.
        count: N.
        filler: The padding id.
        batch: B.
        length: L.
    """
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


def remove_prompt_room(given: dict[str, Any], count: int) -> dict[str, Any]:
    """Return the arguments of a stack without the entries that `add_prompt_room` gave its head."""
    out = dict(given)
    for name in ("input_ids", "attention_mask", "inputs_embeds"):
        part = given.get(name)
        if isinstance(part, torch.Tensor) and part.dim() in (2, 3):
            out[name] = part[:, count:]
    return out

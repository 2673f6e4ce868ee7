"""Removes the prompt's entries from the outputs of a model, which then have the length and order of its input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from embedsurgery.runtime.prompts.layout import (
    PromptLayout,
    move_last_before_text,
    restore_order,
    restore_order_with_extra,
)

_STATES = ("last_hidden_state", "logits", "start_logits", "end_logits", "prediction_logits", "prediction_scores")
_LAYERS = ("hidden_states",)
_ATTENTIONS = ("attentions",)
_CROSS = ("cross_attentions",)


def remove_prompt(output: Any, layout: PromptLayout, *, keep: bool, extra_entry: bool) -> Any:
    """Remove the prompt's entries from the outputs of a module that reads tokens.

    Args:
        output: A ModelOutput, a tuple that begins with the hidden states, or a tensor. A ModelOutput is changed.
        layout: The layout.
        keep: Leave the prompt's entries, before those of the input.
        extra_entry: Leave an extra entry in front of the last hidden states, which predicts the input's first token.
    """
    size = layout.count + layout.length

    def states(value: Any, last: bool = False) -> Any:
        if not isinstance(value, torch.Tensor) or value.dim() < 2 or value.shape[1] != size:
            return value
        if last and extra_entry and keep:
            return _flat_with_extra(value, layout)
        with_extra = last and extra_entry
        found = restore_order_with_extra(value, layout) if with_extra else restore_order(value, layout, 1, keep)
        # A head multiplies its weight with each sample separately unless the states are contiguous.
        return found.contiguous() if last else found

    def attention(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dim() != 4 or value.shape[2] != size:
            return value
        rows = restore_order(value, layout, 2, keep)
        return restore_order(rows, layout, 3, keep) if value.shape[3] == size else rows

    def cross(value: Any) -> Any:
        fits = isinstance(value, torch.Tensor) and value.dim() == 4 and value.shape[2] == size
        return restore_order(value, layout, 2, keep) if fits else value

    if isinstance(output, torch.Tensor):
        return states(output, last=True)
    if isinstance(output, Mapping):
        kinds: list[tuple[tuple[str, ...], Callable[[Any], Any]]] = [
            (_STATES, lambda v: states(v, last=True)),
            (_LAYERS, states),
            (_ATTENTIONS, attention),
            (_CROSS, cross),
        ]
        return _apply_changes(output, {name: change for names, change in kinds for name in names})
    if isinstance(output, tuple):
        first, *others = output

        def other(value: Any) -> Any:  # a tuple has no names: four axes are attentions
            return attention(value) if getattr(value, "dim", int)() == 4 else states(value)

        return (states(first, last=True), *(_map_tensors(value, other) for value in others))
    return output


def _flat_with_extra(value: torch.Tensor, layout: PromptLayout) -> torch.Tensor:
    """Return the flat order, in which the entry before the first real token is the prompt's last one."""
    flat = restore_order(value, layout, 1, keep=True)
    if layout.first is None:
        return flat
    place = torch.arange(flat.shape[1], device=flat.device).expand(layout.batch, -1)
    index = move_last_before_text(layout, place)
    return flat.gather(1, index.reshape(*index.shape, *[1] * (flat.dim() - 2)).expand_as(flat))


def remove_encoder_prompt(output: Any, layout_of: Callable[[int, int], PromptLayout]) -> Any:
    """Remove the entries of the encoder's prompt from the outputs of an encoder-decoder model.

    Args:
        output: A ModelOutput, which is changed; or a tuple, which does not name the encoder's outputs and stays as it
            is.
        layout_of: Called with the number of samples and of the encoder's entries; returns the layout.
    """
    if not isinstance(output, Mapping):
        return output
    states = output.get("encoder_last_hidden_state")
    if not isinstance(states, torch.Tensor):
        return output
    layout = layout_of(states.shape[0], states.shape[1])
    size = states.shape[1]

    def along(dim: int) -> Callable[[Any], Any]:
        def change(value: Any) -> Any:
            fits = isinstance(value, torch.Tensor) and value.dim() > dim and value.shape[dim] == size
            return restore_order(value, layout, dim) if fits else value

        return change

    def both(value: Any) -> Any:
        return along(3)(along(2)(value))

    return _apply_changes(
        output,
        {
            "encoder_last_hidden_state": along(1),
            "encoder_hidden_states": along(1),
            "encoder_attentions": both,
            "cross_attentions": along(3),
        },
    )


def keep_logits(output: Any, places: Any) -> Any:
    """Keep the logits of some entries, as ``logits_to_keep`` asks for them.

    Args:
        output: A ModelOutput, which is changed, or a tuple; its logits are (B, length, V).
        places: How many of the last entries, or int64 (k,) indices.
    """
    which = places if isinstance(places, torch.Tensor) else slice(-places, None)

    def change(value: Any) -> Any:
        return value[:, which] if isinstance(value, torch.Tensor) and value.dim() == 3 else value

    if isinstance(output, Mapping):
        return _apply_changes(output, {"logits": change})
    if not isinstance(output, tuple):
        return change(output)
    logits = next((n for n, value in enumerate(output) if getattr(value, "dim", int)() == 3), len(output))
    return (*output[:logits], *map(change, output[logits : logits + 1]), *output[logits + 1 :])


def remove_extra_entry(output: Any, length: int) -> Any:
    """Remove from a head's outputs the extra entry in front, which predicts the input's first token.

    Args:
        output: A ModelOutput, which is changed, or a tuple.
        length: Number of entries, the extra one included.
    """

    def change(value: Any) -> Any:
        fits = isinstance(value, torch.Tensor) and value.dim() == 3 and value.shape[1] == length
        return value[:, 1:] if fits else value

    if isinstance(output, Mapping):
        return _apply_changes(output, dict.fromkeys(_STATES, change))
    return tuple(change(value) for value in output) if isinstance(output, tuple) else output


def caches_in(output: Any) -> Iterator[Any]:
    """Yield the caches of keys and values in an output."""
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
    for value in values:
        if hasattr(value, "get_seq_length") and hasattr(value, "update"):
            yield value


def _apply_changes(output: Any, changes: Mapping[str, Callable[[Any], Any]]) -> Any:
    for name, change in changes.items():
        if output.get(name) is not None:
            output[name] = _map_tensors(output[name], change)
    return output


def _map_tensors(value: Any, change: Callable[[Any], Any]) -> Any:
    """Apply a change to one tensor, or to each in a tuple of them."""
    return tuple(change(part) for part in value) if isinstance(value, (tuple, list)) else change(value)

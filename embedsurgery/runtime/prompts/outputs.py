"""What a model gives under a soft prompt, as long as its input and in its order: the prompt's entries are cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from embedsurgery.runtime.prompts.layout import Layout, back, back_with_one_more, before_text

_STATES = ("last_hidden_state", "logits", "start_logits", "end_logits", "prediction_logits", "prediction_scores")
_LAYERS = ("hidden_states",)
_ATTENTIONS = ("attentions",)
_CROSS = ("cross_attentions",)


def cut(output: Any, layout: Layout, *, keep: bool, one_more: bool) -> Any:
    """The outputs of what reads tokens without the prompt's entries.

    Args:
        output: A ModelOutput, a tuple that begins with the hidden states, or a tensor.
        layout: Where the prompt stands.
        keep: Leave the prompt's entries, in front of those of the input.
        one_more: The last hidden states get one entry more in front, which says the input's first token.
    """
    size = layout.count + layout.length

    def states(value: Any, last: bool = False) -> Any:
        if not isinstance(value, torch.Tensor) or value.dim() < 2 or value.shape[1] != size:
            return value
        if last and one_more and keep:
            return _with_first(value, layout)
        found = back_with_one_more(value, layout) if last and one_more else back(value, layout, 1, keep)
        return found.contiguous() if last else found  # else a head multiplies its weight with each sample by itself

    def attention(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dim() != 4 or value.shape[2] != size:
            return value
        rows = back(value, layout, 2, keep)
        return back(rows, layout, 3, keep) if value.shape[3] == size else rows

    def cross(value: Any) -> Any:
        fits = isinstance(value, torch.Tensor) and value.dim() == 4 and value.shape[2] == size
        return back(value, layout, 2, keep) if fits else value

    if isinstance(output, torch.Tensor):
        return states(output, last=True)
    if isinstance(output, Mapping):
        kinds: list[tuple[tuple[str, ...], Callable[[Any], Any]]] = [
            (_STATES, lambda v: states(v, last=True)),
            (_LAYERS, states),
            (_ATTENTIONS, attention),
            (_CROSS, cross),
        ]
        return _changed(output, {name: change for names, change in kinds for name in names})
    if isinstance(output, tuple):
        first, *others = output
        rest = (
            _each(value, lambda v: attention(v) if getattr(v, "dim", int)() == 4 else states(v)) for value in others
        )
        return (states(first, last=True), *rest)
    return output


def _with_first(value: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The flat order, in which the entry before the first real token is the prompt's last one."""
    flat = back(value, layout, 1, keep=True)
    if layout.first is None:
        return flat
    place = torch.arange(flat.shape[1], device=flat.device).expand(layout.batch, -1)
    index = before_text(layout, place)
    return flat.gather(1, index.reshape(*index.shape, *[1] * (flat.dim() - 2)).expand_as(flat))


def cut_encoder(output: Any, layout_of: Callable[[int, int], Layout]) -> Any:
    """The outputs of encoder and decoder together without the entries of the encoder's prompt.

    Args:
        output: A ModelOutput, or a tuple, which does not say what is the encoder's and is left as it is.
        layout_of: Gives the layout for B samples and so many entries.
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
            return back(value, layout, dim) if fits else value

        return change

    def both(value: Any) -> Any:
        return along(3)(along(2)(value))

    return _changed(
        output,
        {
            "encoder_last_hidden_state": along(1),
            "encoder_hidden_states": along(1),
            "encoder_attentions": both,
            "cross_attentions": along(3),
        },
    )


def kept(output: Any, places: Any) -> Any:
    """Outputs with the logits of some places alone, as ``logits_to_keep`` asks for them.

    Args:
        output: A ModelOutput, or a tuple, whose logits are (B, length, V).
        places: How many of the last ones; or int64 (k,), which.
    """
    which = places if isinstance(places, torch.Tensor) else slice(-places, None)

    def change(value: Any) -> Any:
        return value[:, which] if isinstance(value, torch.Tensor) and value.dim() == 3 else value

    if isinstance(output, Mapping):
        return _changed(output, {"logits": change})
    if not isinstance(output, tuple):
        return change(output)
    logits = next((n for n, value in enumerate(output) if getattr(value, "dim", int)() == 3), len(output))
    return (*output[:logits], *map(change, output[logits : logits + 1]), *output[logits + 1 :])


def trimmed(output: Any, length: int) -> Any:
    """A head's outputs without the entry in front that says the input's first token.

    Args:
        output: A ModelOutput, or a tuple.
        length: Entries with that one.
    """

    def change(value: Any) -> Any:
        fits = isinstance(value, torch.Tensor) and value.dim() == 3 and value.shape[1] == length
        return value[:, 1:] if fits else value

    if isinstance(output, Mapping):
        return _changed(output, dict.fromkeys(_STATES, change))
    return tuple(change(value) for value in output) if isinstance(output, tuple) else output


def caches_in(output: Any) -> Iterator[Any]:
    """The caches of keys and values in an output."""
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
    for value in values:
        if hasattr(value, "get_seq_length") and hasattr(value, "update"):
            yield value


def _changed(output: Any, changes: Mapping[str, Callable[[Any], Any]]) -> Any:
    for name, change in changes.items():
        if output.get(name) is not None:
            output[name] = _each(output[name], change)
    return output


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """A change of one tensor, or of each in a tuple of them."""
    return tuple(change(part) for part in value) if isinstance(value, (tuple, list)) else change(value)

"""Heads for classes and answers, which start from random values for each task: a soft prompt is saved with its own.

PEFT trains such a head beside the prompt and saves both. Here the user trains it (``freeze=False``). It is saved all
the same, so that PEFT can load the file, and so that a prompt is not used with a head that it was not trained with.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from embedsurgery.adapters.adapter import Adapter
from embedsurgery.errors import BaseMismatchError
from embedsurgery.surgeries.soft_prompt.peft_files import ANSWERS, CLASSIFIERS, HEADS, is_head
from embedsurgery.tensors.convert import to_raw
from embedsurgery.tensors.raw import EDITABLE, RawArray
from embedsurgery.tensors.sharded import is_sharded


def heads_of(model: nn.Module) -> dict[str, RawArray]:
    """Return parameter name -> values of a model's heads for classes and answers, without those that are sharded."""
    ends = (*CLASSIFIERS, *ANSWERS)
    found = {}
    for name, parameter in model.named_parameters():
        in_head = any(part.endswith(ends) for part in name.split(".")[:-1])
        if in_head and parameter.is_floating_point() and not is_sharded(parameter) and not parameter.is_meta:
            raw = to_raw(parameter.detach())
            if raw.dtype in EDITABLE:
                found[name] = raw
    return found


def with_current_heads(adapter: Adapter, model: nn.Module) -> Adapter:
    """Return an adapter in which the heads of its file have the model's current values."""
    names = [name for name in adapter.raw if is_head(name)]
    if not names:
        return adapter
    current = heads_of(model)
    heads = {name: current[name.removeprefix(HEADS)] for name in names if name.removeprefix(HEADS) in current}
    return replace(adapter, raw={**adapter.raw, **heads})


def refuse_other_head(model: nn.Module, adapter: Adapter) -> None:
    """Refuse a soft prompt whose file holds a head with other values than the model's.

    Raises:
        BaseMismatchError: It lists the tensors, and says how to load them.
    """
    names = [name for name in adapter.raw if is_head(name)]
    current = heads_of(model) if names else {}
    other = []
    for name in names:
        values = current.get(name.removeprefix(HEADS))
        if values is None or values.to("F32") != adapter.raw[name].to("F32"):
            other.append(name.removeprefix(HEADS))
    if other:
        raise BaseMismatchError(
            "the soft prompt was trained with another head",
            where=", ".join(other[:4]),
            expected="the values in the adapter's file",
            found="other values",
            hint=f"load adapter.tensors into the model first: their names without {HEADS!r}, strict=False",
        )

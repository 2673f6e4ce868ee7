"""Heads for classes and answers, which begin anew for each task: a soft prompt's file holds that it was trained with.

PEFT trains such a head beside the prompt and saves both. Here it is the user's to train (``freeze=False``); it is saved
all the same, so that PEFT can load the file, and so that a prompt is not used with a head that it never saw.
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
    """Parameter's name -> its values, of all heads of those kinds; one that is sharded is left out."""
    ends = (*CLASSIFIERS, *ANSWERS)
    found = {}
    for name, parameter in model.named_parameters():
        is_one = any(part.endswith(ends) for part in name.split(".")[:-1])
        if is_one and parameter.is_floating_point() and not is_sharded(parameter) and not parameter.is_meta:
            raw = to_raw(parameter.detach())
            if raw.dtype in EDITABLE:
                found[name] = raw
    return found


def with_heads(adapter: Adapter, model: nn.Module) -> Adapter:
    """A snapshot of an adapter with the heads that its file holds as they are now."""
    names = [name for name in adapter.raw if is_head(name)]
    if not names:
        return adapter
    held = heads_of(model)
    now = {name: held[name.removeprefix(HEADS)] for name in names if name.removeprefix(HEADS) in held}
    return replace(adapter, raw={**adapter.raw, **now})


def refuse_other_head(model: nn.Module, adapter: Adapter) -> None:
    """Refuse a soft prompt that was trained with a head of its own where the model has another.

    Raises:
        BaseMismatchError: It names the tensors, and how they get into the model.
    """
    names = [name for name in adapter.raw if is_head(name)]
    held = heads_of(model) if names else {}
    other = []
    for name in names:
        values = held.get(name.removeprefix(HEADS))
        if values is None or values.to("F32") != adapter.raw[name].to("F32"):
            other.append(name.removeprefix(HEADS))
    if other:
        raise BaseMismatchError(
            "the soft prompt was trained with another head, which its file holds",
            found="another",
            where=", ".join(other[:4]),
            expected="the file's values in the model",
            hint=f"load_state_dict of adapter.tensors, names without {HEADS!r}, strict=False, puts them there",
        )

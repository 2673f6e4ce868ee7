"""What says in a live model whether its head is tied: flags in its configs, and transformers' own list."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from embedsurgery.graph.config import FLAG, TEXT_SECTIONS

FLAGS = "ties.json"
"""Key in the ``saved`` of an untying's undo: what was said where."""

_LISTED = "all_tied_weights_keys"

States = Mapping[str, tuple[list[bool], dict[str, str] | None]]
"""Path of a module -> the flags of its configs, and transformers' list of its ties, None where it has none."""


def tie_states(model: nn.Module) -> States:
    """What is said now."""
    found = {}
    for path, module, configs in _places(model):
        listed = vars(module).get(_LISTED)
        found[path] = [getattr(c, FLAG) for c in configs], dict(listed) if isinstance(listed, dict) else None
    return found


def untie_states(model: nn.Module) -> None:
    """Say everywhere that the head is not tied."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    names = {f"{path}.weight" for path, module in model.named_modules() if module is head}
    for _, module, configs in _places(model):
        for config in configs:
            setattr(config, FLAG, False)
        listed = vars(module).get(_LISTED)
        if isinstance(listed, dict):
            setattr(module, _LISTED, {a: b for a, b in listed.items() if not names & {a, b}})


def restore_states(model: nn.Module, states: States) -> None:
    """Say what was said before; places that are no longer there are passed over."""
    for path, module, configs in _places(model):
        flags, listed = states.get(path, ([], None))
        for config, flag in zip(configs, flags, strict=False):
            setattr(config, FLAG, flag)
        if listed is not None:
            setattr(module, _LISTED, dict(listed))


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[Any]]]:
    """Modules that say something of ties, with their configs, each config once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        configs = [c for c in _configs(getattr(module, "config", None)) if id(c) not in seen]
        seen.update(map(id, configs))
        if configs or isinstance(vars(module).get(_LISTED), dict):
            yield path, module, configs


def _configs(config: Any) -> Iterator[Any]:
    """A config and those of its language model that have the flag; none that takes it for more than a tie (T5's)."""
    if hasattr(config, "d_kv"):
        return
    for part in (config, *(getattr(config, key, None) for key in TEXT_SECTIONS)):
        if isinstance(getattr(part, FLAG, None), bool):
            yield part

"""Reads and writes the flags that say whether the head of a live model is tied.

They are ``tie_word_embeddings`` in its configs, and the list of tied weights that transformers keeps in its modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from embedsurgery.graph.config import TEXT_SECTIONS, TIE_FLAG

TIES_KEY = "ties.json"
"""Key in `Untie.saved` of an undo: the flags before untying."""

_TIED_KEYS = "all_tied_weights_keys"

TieStates = Mapping[str, tuple[list[bool], dict[str, str] | None]]
"""Path of a module -> the flags of its configs, and transformers' list of its tied weights or None."""


def read_tie_states(model: nn.Module) -> TieStates:
    """Read the current flags of all modules."""
    found = {}
    for path, module, configs in _modules_with_ties(model):
        listed = vars(module).get(_TIED_KEYS)
        found[path] = [getattr(c, TIE_FLAG) for c in configs], dict(listed) if isinstance(listed, dict) else None
    return found


def clear_tie_states(model: nn.Module) -> None:
    """Mark the head as untied everywhere."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    names = {f"{path}.weight" for path, module in model.named_modules() if module is head}
    for _, module, configs in _modules_with_ties(model):
        for config in configs:
            setattr(config, TIE_FLAG, False)
        listed = vars(module).get(_TIED_KEYS)
        if isinstance(listed, dict):
            setattr(module, _TIED_KEYS, {a: b for a, b in listed.items() if not names & {a, b}})


def restore_tie_states(model: nn.Module, states: TieStates) -> None:
    """Restore flags; modules that no longer exist are ignored."""
    for path, module, configs in _modules_with_ties(model):
        flags, listed = states.get(path, ([], None))
        for config, flag in zip(configs, flags, strict=False):
            setattr(config, TIE_FLAG, flag)
        if listed is not None:
            setattr(module, _TIED_KEYS, dict(listed))


def _modules_with_ties(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[Any]]]:
    """Yield (path, module, configs) of the modules with such flags. A config that several share comes once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        configs = [c for c in _configs_with_flag(getattr(module, "config", None)) if id(c) not in seen]
        seen.update(map(id, configs))
        if configs or isinstance(vars(module).get(_TIED_KEYS), dict):
            yield path, module, configs


def _configs_with_flag(config: Any) -> Iterator[Any]:
    """Yield a config and the configs of its language model, if they have the flag."""
    # T5 reads the flag also as "scale the hidden states before the head", so changing it would change the output.
    if hasattr(config, "d_kv"):
        return
    for part in (config, *(getattr(config, key, None) for key in TEXT_SECTIONS)):
        if isinstance(getattr(part, TIE_FLAG, None), bool):
            yield part

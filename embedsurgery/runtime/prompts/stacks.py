"""Finds the modules of a model that get a soft prompt: those that are given token ids or their embeddings."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from embedsurgery.errors import UnsupportedError
from embedsurgery.graph import EmbeddingGraph
from embedsurgery.graph.wrappers import submodule

_STREAMS = frozenset({"ProphetNetDecoder"})
"""Modules that compute more streams of predictions beside the tokens, so that outputs have no entry for each token."""

_REFUSED = {
    "blt": "reads bytes in patches, and hashes them",
    "gemma3n": "looks ids up in a table for each layer as well",
    "gemma3n_text": "looks ids up in a table for each layer as well",
    "gemma4": "looks ids up in a table for each layer as well",
    "gemma4_text": "looks ids up in a table for each layer as well",
    "cpmant": "finds padding by the number of ids, and has a prompt of its own",
    "ibert": "has a lookup that returns scales with its vectors",
    "instructblip": "reads its text twice",
    "instructblipvideo": "reads its text twice",
    "fsmt": "makes its own masks",
    "speecht5": "has its lookups before the modules that read tokens",
}
"""``model_type`` -> why virtual tokens among its ids would not act like real ones."""


@dataclass(frozen=True)
class Stack:
    """A transformer without its head, which reads tokens.

    Attributes:
        name: "model", "encoder" or "decoder".
        levels: Path of each module that is given ids, from the outermost inwards, with the names of its forward's
            parameters; "" is the root. A head may call any of them.
        lookups: Paths of the lookups in it.
    """

    name: str
    levels: tuple[tuple[str, tuple[str, ...]], ...]
    lookups: tuple[str, ...]

    @property
    def path(self) -> str:
        """Path of the outermost module."""
        return self.levels[0][0]


def find_stacks(model: nn.Module, graph: EmbeddingGraph) -> tuple[Stack, ...]:
    """Find the stacks of a model, an encoder before a decoder.

    Args:
        model: The root module.
        graph: Its graph.
    """
    sites = [s.module for t in graph.tables if t.kind == "vocabulary" for s in t.sites if s.role == "input"]
    if not sites:
        sites = [s.module for t in graph.tables if t.name == graph.input for s in t.sites if s.role == "input"]
    lookups = {id(submodule(model, path)) for path in sites}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        parts = [("encoder", _call_getter(model, "get_encoder")), ("decoder", _call_getter(model, "get_decoder"))]
    else:
        parts = [("model", _without_head(model))]
    found = (_make_stack(name, model, part, lookups) for name, part in parts if part is not None)
    return tuple(stack for stack in found if stack is not None)


def _make_stack(name: str, model: nn.Module, part: nn.Module, lookups: set[int]) -> Stack | None:
    """Return the modules from a part inwards that are given ids; None if there are none, or no lookup in them."""
    outer = next((path for path, module in model.named_modules() if module is part), None)
    mine = [path for path, module in part.named_modules(remove_duplicate=False) if id(module) in lookups]
    if outer is None or not mine or (name != "model" and part is model):
        return None
    levels: list[tuple[str, tuple[str, ...]]] = []
    for parts in (path.split(".") for path in mine):
        for count in range(len(parts)):
            path = ".".join((*([outer] if outer else ()), *parts[:count]))
            names = tuple(inspect.signature(submodule(model, path).forward).parameters)
            if "input_ids" in names and ("inputs_embeds" in names or not levels):
                levels.append((path, names))
        if levels:
            break
    inside = tuple(f"{outer}.{one}" if outer else one for one in mine)
    return Stack(name, tuple(levels), inside) if levels else None


def _without_head(model: nn.Module) -> nn.Module:
    """Return transformers' ``base_model`` of a model, or the model itself."""
    base = getattr(model, "base_model", model)
    return base if isinstance(base, nn.Module) else model


def _call_getter(model: Any, method: str) -> nn.Module | None:
    try:
        answer = getattr(model, method)()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    if not isinstance(answer, nn.Module):
        return None
    # the decoder of EncoderDecoderModel has a head of its own
    return _without_head(answer) if answer is not model else answer


def can_generate(model: Any) -> bool:
    """Whether a model generates text, so that its head predicts the next token."""
    method = getattr(model, "can_generate", None)
    return bool(method()) if callable(method) else False


def select_stacks(stacks: tuple[Stack, ...], names: tuple[str, ...], model: nn.Module) -> tuple[Stack, ...]:
    """Select the stacks that a soft prompt is for.

    A prompt for "model" fits the only stack of any model, and one for "encoder" or "decoder" the only stack "model",
    because PEFT's files do not say which it is.

    Args:
        stacks: The model's stacks.
        names: The adapter's submodules.
        model: The root module.

    Raises:
        UnsupportedError: The model lacks one of them, or virtual tokens would not act like real ones in it.
    """
    if not stacks:
        raise UnsupportedError(
            "a soft prompt needs a module that reads tokens",
            where=type(model).__name__,
            expected="a module whose forward takes input_ids, with a lookup in it",
            found="none",
            hint="attach to a model that reads tokens",
        )
    kind = getattr(getattr(model, "config", None), "model_type", "")
    if kind in _REFUSED:
        raise UnsupportedError(
            "this model does not support soft prompts",
            where=type(model).__name__,
            found=f"{kind}, which {_REFUSED[kind]}",
        )
    chosen = _stacks_by_name(stacks, names, model)
    for stack in chosen:
        inside = {type(module).__name__ for module in submodule(model, stack.path).modules()}
        if inside & _STREAMS:
            raise UnsupportedError(
                "this part of the model does not support soft prompts",
                where=stack.path,
                found=", ".join(sorted(inside & _STREAMS)),
            )
    return chosen


def _stacks_by_name(stacks: tuple[Stack, ...], names: tuple[str, ...], model: nn.Module) -> tuple[Stack, ...]:
    by_name = {stack.name: stack for stack in stacks}
    if len(stacks) == 1 and len(names) == 1 and "model" in (names[0], stacks[0].name):
        return stacks
    missing = [name for name in names if name not in by_name]
    if missing:
        raise UnsupportedError(
            "the soft prompt is for a part of the model that reads no tokens",
            where=type(model).__name__,
            expected=" and ".join(by_name),
            found=", ".join(missing),
        )
    return tuple(by_name[name] for name in names)

"""Finds what of a model a soft prompt stands in front of: the modules that are given token ids or their embeddings."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from embedsurgery.errors import UnsupportedError
from embedsurgery.graph import EmbeddingGraph
from embedsurgery.graph.wrappers import submodule

_STREAMS = frozenset({"ProphetNetDecoder"})
"""What lays further streams of predictions beside the tokens, so that its outputs have no entry for each."""

_REFUSED = {
    "blt": "reads bytes in patches, and hashes them",
    "gemma3n": "looks each id up in a table for each layer as well",
    "gemma3n_text": "looks each id up in a table for each layer as well",
    "gemma4": "looks each id up in a table for each layer as well",
    "gemma4_text": "looks each id up in a table for each layer as well",
    "cpmant": "tells padding by how many ids there are, and has a prompt of its own",
    "ibert": "has a lookup that gives scales with its vectors",
    "instructblip": "reads its text twice",
    "instructblipvideo": "reads its text twice",
    "fsmt": "makes its masks by itself",
    "speecht5": "has lookups of its own before what reads them",
}
"""``model_type`` -> why virtual tokens among its ids would not be what real ones are."""


@dataclass(frozen=True)
class Stack:
    """A transformer without its head.

    Attributes:
        name: "model", or "encoder" or "decoder".
        levels: Path of each module that is given ids, one inside the other, with the names of its forward's parameters;
            "" is the root. A head may call any of them.
        lookups: Paths of the lookups in it.
    """

    name: str
    levels: tuple[tuple[str, tuple[str, ...]], ...]
    lookups: tuple[str, ...]

    @property
    def path(self) -> str:
        """Of the outermost module."""
        return self.levels[0][0]


def stacks_of(model: nn.Module, graph: EmbeddingGraph) -> tuple[Stack, ...]:
    """What of a model reads tokens, an encoder before a decoder.

    Args:
        model: Its root.
        graph: Of it.
    """
    sites = [s.module for t in graph.tables if t.kind == "vocabulary" for s in t.sites if s.role == "input"]
    if not sites:
        sites = [s.module for t in graph.tables if t.name == graph.input for s in t.sites if s.role == "input"]
    lookups = {id(submodule(model, path)) for path in sites}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        parts = [("encoder", _ask(model, "get_encoder")), ("decoder", _ask(model, "get_decoder"))]
    else:
        parts = [("model", _base(model))]
    found = (_stack(name, model, part, lookups) for name, part in parts if part is not None)
    return tuple(stack for stack in found if stack is not None)


def _stack(name: str, model: nn.Module, part: nn.Module, lookups: set[int]) -> Stack | None:
    """The modules from a part on inwards that are given ids; None where none is, or nothing looks them up."""
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


def _base(model: nn.Module) -> nn.Module:
    """A model without its head, as transformers calls it; any other model itself."""
    base = getattr(model, "base_model", model)
    return base if isinstance(base, nn.Module) else model


def _ask(model: Any, method: str) -> nn.Module | None:
    try:
        answer = getattr(model, method)()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    if not isinstance(answer, nn.Module):
        return None
    # a decoder with a head of its own, as EncoderDecoderModel has
    return _base(answer) if answer is not model else answer


def can_generate(model: Any) -> bool:
    """Whether a model says that it generates text, so that its head says the next token."""
    says = getattr(model, "can_generate", None)
    return bool(says()) if callable(says) else False


def need(stacks: tuple[Stack, ...], names: tuple[str, ...], model: nn.Module) -> tuple[Stack, ...]:
    """The stacks of these names.

    A prompt for "model" is one for the only stack there is, and the other way round: files of PEFT's say less.

    Raises:
        UnsupportedError: The model has none of them.
    """
    if not stacks:
        raise UnsupportedError(
            "a soft prompt has nothing to stand in front of",
            where=type(model).__name__,
            expected="a module whose forward takes input_ids, with a lookup in it",
            found="none",
            hint="attach to a model that reads tokens",
        )
    why = _REFUSED.get(getattr(getattr(model, "config", None), "model_type", ""))
    if why is not None:
        raise UnsupportedError(
            "a soft prompt cannot stand in front of this model", where=type(model).__name__, found=f"a model that {why}"
        )
    chosen = _chosen(stacks, names, model)
    for stack in chosen:
        inside = {type(module).__name__ for module in submodule(model, stack.path).modules()}
        if inside & _STREAMS:
            raise UnsupportedError(
                "a soft prompt cannot stand in front of this part of the model",
                where=stack.path,
                found=", ".join(sorted(inside & _STREAMS)),
            )
    return chosen


def _chosen(stacks: tuple[Stack, ...], names: tuple[str, ...], model: nn.Module) -> tuple[Stack, ...]:
    there = {stack.name: stack for stack in stacks}
    if len(stacks) == 1 and len(names) == 1 and "model" in (names[0], stacks[0].name):
        return stacks
    missing = [name for name in names if name not in there]
    if missing:
        raise UnsupportedError(
            "the soft prompt is for a part that reads no tokens here",
            where=type(model).__name__,
            expected=" and ".join(there),
            found=", ".join(missing),
        )
    return tuple(there[name] for name in names)

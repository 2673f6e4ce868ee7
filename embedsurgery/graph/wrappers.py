"""How other libraries wrap a model, and the names that its parts have without them. Needs neither torch nor them.

An adapter made on a wrapped model must fit the plain base, on disk as well, and the other way round.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

_PREFIXES = ("base_model.model.",)
_PARTS = frozenset({"base_layer", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Path components that PEFT's layers, torch.compile, FSDP and activation checkpointing put in."""


def plain_name(name: str) -> str:
    """A tensor's or module's name as it is in the model without wrappers.

    PEFT's "base_model.model.model.embed_tokens.base_layer.weight" is "model.embed_tokens.weight".
    """
    name = ".".join(part for part in name.split(".") if part not in _PARTS)
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def base_layer(module: nn.Module) -> nn.Module:
    """The layer of the base inside a PEFT layer; any other module itself."""
    while (inside := _inside(module)) is not None:
        module = inside
    return module


def _inside(module: nn.Module) -> nn.Module | None:
    return module._modules.get("base_layer") if hasattr(type(module), "get_base_layer") else None


def submodule(model: nn.Module, path: str) -> nn.Module:
    """As ``model.get_submodule``, for a path from before or after PEFT put its layers in.

    Raises:
        AttributeError: There is none.
    """
    module = base_layer(model)
    for part in path.split("."):
        if part and part != "base_layer":
            module = base_layer(module.get_submodule(part))
    return module


def merged_layer(model: nn.Module, path: str) -> bool | None:
    """Whether the PEFT layer around a module is merged into it; None where there is no such layer.

    Args:
        model: A model, or a wrapper of it.
        path: Of the module, from before or after PEFT put its layers in.
    """
    *above, leaf = [part for part in path.split(".") if part and part != "base_layer"] or [""]
    try:
        module = submodule(model, ".".join(above)).get_submodule(leaf)
    except AttributeError:
        return None
    return None if _inside(module) is None else bool(getattr(module, "merged", False))


def beside_base_layer(module: nn.Module) -> list[str]:
    """Names of a PEFT layer's children that are no part of the base, such as ``lora_A``."""
    return [] if _inside(module) is None else [name for name in module._modules if name != "base_layer"]


def base_of(model: nn.Module) -> nn.Module:
    """The model inside a ``PeftModel``, which keeps its class there and outlives it, or inside what ``torch.compile``
    gave, which runs it; any other model itself.
    """
    peft = sys.modules.get("peft")
    while True:
        if peft is not None and isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
            model = model.get_base_model()
        elif type(model).__name__ == "OptimizedModule" and (inside := model._modules.get("_orig_mod")) is not None:
            model = inside
        else:
            return model

"""Unwraps models that other libraries wrapped, and gives tensors the names that they have without the wrappers.

An adapter that was created on a wrapped model must fit the plain base, on disk too, and the other way round. Imports
neither torch nor the libraries.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

_PREFIXES = ("base_model.model.",)
_PARTS = frozenset({"base_layer", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Path components that PEFT's layers, torch.compile, FSDP and activation checkpointing insert."""


def plain_name(name: str) -> str:
    """Return the name that a tensor or module has in the model without wrappers.

    PEFT's "base_model.model.model.embed_tokens.base_layer.weight" is "model.embed_tokens.weight".
    """
    name = ".".join(part for part in name.split(".") if part not in _PARTS)
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def base_layer(module: nn.Module) -> nn.Module:
    """Return the base's layer inside a PEFT layer, or the module itself if it is not a PEFT layer."""
    while (inside := _wrapped_layer(module)) is not None:
        module = inside
    return module


def _wrapped_layer(module: nn.Module) -> nn.Module | None:
    return module._modules.get("base_layer") if hasattr(type(module), "get_base_layer") else None


def submodule(model: nn.Module, path: str) -> nn.Module:
    """Return a submodule as ``model.get_submodule`` does, with or without the components of PEFT's layers in the path.

    Raises:
        AttributeError: There is no such module.
    """
    module = base_layer(model)
    for part in path.split("."):
        if part and part != "base_layer":
            module = base_layer(module.get_submodule(part))
    return module


def is_layer_merged(model: nn.Module, path: str) -> bool | None:
    """Return whether the PEFT layer around a module is merged into it, None without such a layer.

    Args:
        model: A model, or a wrapper of it.
        path: Path of the module, with or without the components of PEFT's layers.
    """
    *above, leaf = [part for part in path.split(".") if part and part != "base_layer"] or [""]
    try:
        module = submodule(model, ".".join(above)).get_submodule(leaf)
    except AttributeError:
        return None
    return None if _wrapped_layer(module) is None else bool(getattr(module, "merged", False))


def added_children_of(module: nn.Module) -> list[str]:
    """Return the names of the children that a PEFT layer adds to the base's, such as ``lora_A``."""
    return [] if _wrapped_layer(module) is None else [name for name in module._modules if name != "base_layer"]


def base_of(model: nn.Module) -> nn.Module:
    """Return the model inside a ``PeftModel`` or a compiled model, or the model itself if it is neither.

    PEFT changes the inner model in place and keeps its class, and the inner model stays when the ``PeftModel`` is gone.
    A compiled model runs its inner model.
    """
    peft = sys.modules.get("peft")
    while True:
        if peft is not None and isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
            model = model.get_base_model()
        elif type(model).__name__ == "OptimizedModule" and (inside := model._modules.get("_orig_mod")) is not None:
            model = inside
        else:
            return model

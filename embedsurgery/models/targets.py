"""A model or a state dict as a store, and what every change of one refuses."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from embedsurgery.adapters.adapter import Adapter
from embedsurgery.errors import AttachmentError, ConfigError, EmbedSurgeryWarning
from embedsurgery.plugins.current import registry
from embedsurgery.stores.store import Store

if TYPE_CHECKING:
    import torch
    from torch import nn

    Target = nn.Module | Mapping[str, torch.Tensor]


def texts_of(adapters: Sequence[Adapter], tokenizer: Any) -> Mapping[int, str] | None:
    """Id -> text of a tokenizer's tokens; without one, a word to whom an adapter brings new tokens."""
    from embedsurgery.tokenizer.live import texts

    if tokenizer is not None:
        return texts(tokenizer)
    new = [token for a in adapters if a.manifest.new_tokens is not None for token in a.manifest.new_tokens.tokens]
    if new:
        named = ", ".join(repr(token.content) for token in new[:4])
        warnings.warn(
            f"the adapter brings new tokens ({named}): give tokenizer=, or it does not know them",
            EmbedSurgeryWarning,
            stacklevel=4,
        )
    return None


def refuse_attached(target: Target, verb: str) -> None:
    """An edit behind an attachment's back would leave its rows, and what it restores, wrong."""
    from torch import nn

    from embedsurgery.runtime.attachment import find

    own = f", or use its own {verb}()" if verb.isalpha() else ""
    if isinstance(target, nn.Module) and find(target) is not None:
        raise AttachmentError(
            f"cannot {verb} a model that has an attachment from outside",
            where=type(target).__name__,
            hint=f"detach() it first{own}",
        )


def refuse_other(model: object) -> None:
    """Refuse what is no model."""
    from torch import nn

    if not isinstance(model, nn.Module):
        raise ConfigError(
            "not a model",
            expected="an nn.Module",
            found=type(model).__name__,
            hint="load the model first; merge_checkpoint() takes a directory",
        )


def store_of(target: Target, tokenizer: Any = None) -> Store:
    """The store over a model or a state dict, with the tokenizer that goes with it."""
    from torch import nn

    from embedsurgery.stores.modules import module_store
    from embedsurgery.stores.state_dicts import state_dict_store

    if isinstance(target, nn.Module):
        return module_store(target, tokenizer=tokenizer, classify=registry().classify)
    if isinstance(target, Mapping):
        return state_dict_store(target, tokenizer=tokenizer)
    raise ConfigError(
        "not a model or a state dict", expected="nn.Module or mapping of tensors", found=type(target).__name__
    )

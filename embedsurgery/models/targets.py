"""What all changes of a model in memory share: its store, the texts of its tokens, and what they refuse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from embedsurgery.adapters.adapter import Adapter
from embedsurgery.errors import AttachmentError, ConfigError, warn
from embedsurgery.plugins.current import registry
from embedsurgery.stores.store import Store

if TYPE_CHECKING:
    import torch
    from torch import nn

    Target = nn.Module | Mapping[str, torch.Tensor]


def texts_by_id(adapters: Sequence[Adapter], tokenizer: Any) -> Mapping[int, str] | None:
    """Return id -> text of a tokenizer's tokens.

    Without a tokenizer, return None, and warn if an adapter brings new tokens that the tokenizer would have to know.
    """
    from embedsurgery.tokenizer.live import token_texts_of

    if tokenizer is not None:
        return token_texts_of(tokenizer)
    new = [token for a in adapters if a.manifest.new_tokens is not None for token in a.manifest.new_tokens.tokens]
    if new:
        listed = ", ".join(repr(token.content) for token in new[:4])
        warn(f"the adapter brings new tokens, give tokenizer= to add them to a tokenizer: {listed}")
    return None


def refuse_attached(target: Target, verb: str) -> None:
    """Refuse a model that has an attachment.

    A change that the attachment does not know of would make its live rows, and what it restores, wrong.

    Args:
        target: A model; a state dict is never refused.
        verb: What is refused. If the attachment has a method of this name, the error suggests it.

    Raises:
        AttachmentError: The model has an attachment.
    """
    from torch import nn

    from embedsurgery.runtime.attachment import find_attachment

    own = f", or use its {verb}()" if verb.isalpha() else ""
    if isinstance(target, nn.Module) and find_attachment(target) is not None:
        raise AttachmentError(
            f"cannot {verb} a model that has an attachment",
            where=type(target).__name__,
            hint=f"detach() it first{own}",
        )


def check_model(model: object) -> None:
    """Refuse anything that is not an ``nn.Module``.

    Raises:
        ConfigError: It is not one.
    """
    from torch import nn

    if not isinstance(model, nn.Module):
        raise ConfigError(
            "not a model",
            expected="an nn.Module",
            found=type(model).__name__,
            hint="load the model first; merge_checkpoint() takes a directory",
        )


def store_of(target: Target, tokenizer: Any = None) -> Store:
    """Return the store of a model or a state dict, with the tokenizer that changes along with it.

    Raises:
        ConfigError: The target is neither.
    """
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

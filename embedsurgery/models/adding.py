"""New tokens in a model in memory, with the rows that they need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from embedsurgery.adapters.carried_tokens import NewTokens
from embedsurgery.adapters.new_tokens import AddedTokens, Init, plan_tokens
from embedsurgery.graph.wrappers import base_of
from embedsurgery.models.targets import refuse_attached, refuse_other, store_of
from embedsurgery.plugins.current import registry
from embedsurgery.stores.apply import apply

if TYPE_CHECKING:
    from torch import nn


_ADDED = "_embedsurgery_added"
"""Attribute of a model: `NewTokens` of each call, so that an adapter carries them in whatever list their ids come."""


def add_tokens(
    model: nn.Module,
    tokenizer: Any,
    tokens: str | Sequence[str],
    init: Init = "mean",
    special: bool = False,
    *,
    reserved: bool = False,
    pad_to_multiple_of: int | None = None,
    seed: int = 0,
) -> AddedTokens:
    """Add tokens to a tokenizer and rows for them to its model, in place.

    Rows that the table has to spare are used first; else every table and per-token vector of the vocabulary grows, tied
    ones stay tied, and the config follows. `TrainableTokensConfig(token_indices=ids)` then trains the rows of all
    these tables, and its adapter carries the tokens; so it does where the ids come in another list, with others.

    Args:
        model: Any ``nn.Module`` whose vocabulary is known, without an attachment.
        tokenizer: A transformers tokenizer.
        tokens: Texts. Those that exist are found, not added twice.
        init: How rows start: NAME or NAME:ARGUMENT as `embedsurgery plugins` lists them ("mean", "subtokens",
            "description:a hammer", "copy:<s>"), for all tokens or for each in a dict by its text. Head rows and
            biases start in the same way in their own space.
        special: Whether they are special tokens.
        reserved: Take the ids of reserved tokens ("[unused7]") first.
        pad_to_multiple_of: Where the table must grow, grow it to a multiple.
        seed: For initialisers that draw.

    Returns:
        The ids, a sequence of int, with ``.undo()``.

    Raises:
        ConfigError: A token that is empty, named twice, or that the tokenizer would not give back as one id; one that
            exists and is not special where that is asked; one that would break a token that is there.
        BaseMismatchError: The tokenizer has more tokens than the model has rows, or far fewer.
        UnsupportedError: A table that cannot grow: quantised, or sharded over devices.
        AttachmentError: The model has an attachment.
    """
    from embedsurgery.tokenizer.live import known_tokens

    refuse_other(model)
    refuse_attached(model, "add tokens to")
    base = base_of(model)
    store = store_of(base, tokenizer)
    asked = plan_tokens(
        store,
        known_tokens(tokenizer),
        tokens,
        initializers=registry().initializers,
        init=init,
        special=special,
        reserved=reserved,
        pad_to_multiple_of=pad_to_multiple_of,
        seed=seed,
    )
    undo = apply(asked.plan, store)
    if asked.new is not None:
        _remember(base, (*_added(base), asked.new))

    def take_out() -> None:
        refuse_attached(model, "take tokens out of")
        apply(undo, store_of(base, tokenizer))
        _remember(base, tuple(new for new in _added(base) if new is not asked.new))

    return AddedTokens(asked.ids, asked.new, take_out)


def _added(model: nn.Module) -> tuple[NewTokens, ...]:
    """What `add_tokens` gave a model, call by call, also after deepcopy and pickling."""
    found: tuple[NewTokens, ...] = vars(model).get(_ADDED, ())
    return found


def _remember(model: nn.Module, added: tuple[NewTokens, ...]) -> None:
    vars(model).pop(_ADDED, None)
    if added:
        vars(model)[_ADDED] = added

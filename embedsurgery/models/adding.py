"""Adds tokens to a tokenizer and rows for them to its model. ``adapters/new_tokens.py`` plans ids and rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from embedsurgery.adapters.carried_tokens import NewTokens
from embedsurgery.adapters.new_tokens import AddedTokens, Init, plan_tokens
from embedsurgery.graph.wrappers import base_of
from embedsurgery.models.targets import check_model, refuse_attached, store_of
from embedsurgery.plugins.current import registry
from embedsurgery.stores.apply import apply

if TYPE_CHECKING:
    from torch import nn


_ADDED = "_embedsurgery_added"
"""Attribute of a model: the `NewTokens` of each call, for adapters that train their rows to carry."""


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

    Spare rows of the table are used first. If there are too few, every table and per-token vector of the vocabulary
    grows, tied tables stay tied, and the model's config is updated. `TrainableTokensConfig(token_indices=ids)` then
    trains the rows in all these tables, and its adapter carries the tokens, also if ``token_indices`` lists other ids
    beside these.

    Args:
        model: Any ``nn.Module`` whose vocabulary is known, without an attachment.
        tokenizer: A transformers tokenizer.
        tokens: Their texts. Those that the tokenizer has already are not added twice.
        init: How rows start: NAME or NAME:ARGUMENT as `embedsurgery plugins` lists them ("mean", "subtokens",
            "description:a hammer", "copy:<s>"), for all tokens, or a dict from text to init. Rows and biases of an
            untied head start in the same way, from the head's own rows.
        special: Whether they are special tokens.
        reserved: Take the ids of reserved tokens ("[unused7]") first.
        pad_to_multiple_of: If the table must grow, grow it to a multiple of this.
        seed: For initialisers that draw random numbers.

    Returns:
        The ids, a sequence of int; its ``undo()`` removes the tokens again.

    Raises:
        ConfigError: A token is empty or given twice, or the tokenizer would not encode it as one id; it exists and is
            not special although ``special`` is set; or it would break a token that exists.
        BaseMismatchError: The tokenizer has more tokens than the model has rows, or far fewer.
        UnsupportedError: A table cannot grow, because it is quantised or sharded over devices.
        AttachmentError: The model has an attachment.
    """
    from embedsurgery.tokenizer.live import known_tokens_of

    check_model(model)
    refuse_attached(model, "add tokens to")
    base = base_of(model)
    store = store_of(base, tokenizer)
    planned = plan_tokens(
        store,
        known_tokens_of(tokenizer),
        tokens,
        initializers=registry().initializers,
        init=init,
        special=special,
        reserved=reserved,
        pad_to_multiple_of=pad_to_multiple_of,
        seed=seed,
    )
    undo = apply(planned.plan, store)
    if planned.new is not None:
        _set_added_tokens(base, (*added_tokens_of(base), planned.new))

    def remove_tokens() -> None:
        refuse_attached(model, "remove tokens from")
        apply(undo, store_of(base, tokenizer))
        _set_added_tokens(base, tuple(new for new in added_tokens_of(base) if new is not planned.new))

    return AddedTokens(planned.ids, planned.new, remove_tokens)


def added_tokens_of(model: nn.Module) -> tuple[NewTokens, ...]:
    """Return the tokens that `add_tokens` gave a model, one entry per call. They survive deepcopy and pickling."""
    added: tuple[NewTokens, ...] = vars(model).get(_ADDED, ())
    return added


def _set_added_tokens(model: nn.Module, added: tuple[NewTokens, ...]) -> None:
    vars(model).pop(_ADDED, None)
    if added:
        vars(model)[_ADDED] = added

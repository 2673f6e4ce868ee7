"""Attachments and new tokens in memory: the public functions that put model, tokenizer and adapter together.

What an attachment is, ``runtime/`` says; which ids and rows new tokens get, ``new_tokens.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedsurgery.adapter import Adapter, plainly_named
from embedsurgery.api import refuse_attached, refuse_other, store_of, texts_of
from embedsurgery.errors import AttachmentError, ConfigError, EmbedSurgeryError
from embedsurgery.graph import EmbeddingGraph
from embedsurgery.locate import locate
from embedsurgery.new_tokens import AddedTokens, Init, plan_tokens
from embedsurgery.plan import Plan, SetRows, Undo
from embedsurgery.planning import extend
from embedsurgery.registry import registry
from embedsurgery.stores.base import apply
from embedsurgery.surgeries.answers import planned, started
from embedsurgery.surgeries.base import Base, Tokenizer
from embedsurgery.vocabulary import NewTokens, State
from embedsurgery.wrappers import base_of

if TYPE_CHECKING:
    from torch import nn

    from embedsurgery.runtime.attach import Attachment

_ADDED = "_embedsurgery_added"
"""Attribute of a model: `NewTokens` of each call, so that an adapter carries them in whatever list their ids come."""


def attach(
    model: nn.Module,
    config: Any,
    *,
    name: str = "default",
    tokenizer: Tokenizer | None = None,
    freeze: bool = True,
    materialize: bool = False,
) -> Attachment:
    """Make an adapter live on a model: trainable, mergeable, removable. The model keeps its class and state dict.

    Args:
        model: Any ``nn.Module``.
        config: A config (training starts), or an `Adapter` (training goes on, or it is just used).
        name: The adapter's name on this model.
        tokenizer: Where given, the adapter carries the texts of its tokens; one that brings new tokens adds them.
        freeze: Freeze everything that was trainable; `detach` restores it.
        materialize: Override by a full copy of the table in each forward, for code that reads ``module.weight``
            by itself. Slower, and chosen by itself where it is seen to be needed.

    Returns:
        The model's one attachment; a second call adds a named adapter to it.

    Raises:
        TokenIndexError, TableError, ConfigError: The config does not fit the model, or is none.
        BaseMismatchError: The adapter was made from another base.
        UnsupportedError: A table that cannot be overridden.
        AttachmentError: The name is taken, or rows overlap another active adapter's.
    """
    from embedsurgery.runtime.attach import attach_adapter, find
    from embedsurgery.stores.tensors import module_store

    refuse_other(model)
    if tokenizer is not None and not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise ConfigError("not a tokenizer", where="tokenizer", expected="a tokenizer of transformers",
                          found=f"{type(tokenizer).__name__} {str(tokenizer)[:80]!r}",
                          hint="AutoTokenizer.from_pretrained(...) gives one")  # fmt: skip
    known = find(model)
    base = base_of(model) if known is None else known.model
    if known is not None and known.merged:
        raise AttachmentError("cannot attach another adapter while the rows are merged into the weights",
                              hint="unmerge() first")  # fmt: skip
    classify = registry().classify
    store = module_store(base, known.graph if known is not None else None, classify=classify)
    fresh = not isinstance(config, Adapter)
    extended = None
    if isinstance(config, Adapter):
        adapter, record = config, registry().named(config.manifest.surgery)
        extended = _extend(base, adapter, tokenizer, known)
        if extended is not None:
            store = module_store(base, classify=classify)
    else:
        record = registry().for_config(config)
        known_base = _base(base, store.graph, tokenizer)
        adapter = _with_disk_names(plainly_named(started(record.surgery, config, store, known_base)), known_base)
    try:
        attachment = attach_adapter(base, adapter, record, graph=store.graph, name=name,
                                    freeze=model if freeze else None, materialize=materialize, fresh=fresh,
                                    given=model, classify=classify)  # fmt: skip
    except BaseException:
        if extended is not None:
            apply(extended, store_of(base, tokenizer))
        raise
    if extended is not None:
        attachment.extended.append((extended, tokenizer))
    return attachment


def _extend(model: nn.Module, adapter: Adapter, tokenizer: Tokenizer | None, known: Attachment | None) -> Undo | None:
    """Give a model the tokens that an adapter brings and it lacks, with their rows; None where it has them all."""
    if adapter.manifest.new_tokens is None:
        return None
    store = store_of(model, tokenizer)
    located = locate(adapter, store)
    edits = extend(adapter, located, store, State.of(store.graph, texts_of([adapter], tokenizer)))
    if not edits:
        return None
    if known is not None:
        raise AttachmentError("this adapter brings new tokens, and the model has an attachment already",
                              found=", ".join(known.names), hint="attach it first, or detach() the others")  # fmt: skip
    surgery = registry().named(adapter.manifest.surgery).surgery
    new = set(adapter.manifest.new_tokens.ids)
    rows = (_only(edit, new) for edit in planned(surgery, adapter, located).edits if isinstance(edit, SetRows))
    return apply(Plan((*edits, *(edit for edit in rows if edit.indices))), store)


def _only(edit: SetRows, indices: set[int]) -> SetRows:
    places = [n for n, index in enumerate(edit.indices) if index in indices]
    return SetRows(edit.table, tuple(edit.indices[n] for n in places), edit.rows.take(places))


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
    from embedsurgery.live_tokenizer import known_tokens

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


def attached(model: nn.Module) -> Attachment | None:
    """The model's one attachment, also after deepcopy, pickling or wrapping; None without."""
    from embedsurgery.runtime.attach import find

    return find(model)


def _with_disk_names(adapter: Adapter, base: Base) -> Adapter:
    """The adapter with its tables' names on disk, where the model was loaded from a directory that still holds them."""
    if base.name is None or not Path(base.name).is_dir():
        return adapter
    try:
        located = locate(adapter, registry().open_store(Path(base.name)))
    except EmbedSurgeryError:  # a name is a hint: without it the rows decide
        return adapter
    tables = tuple(
        replace(table, disk_names=tuple(name for name, _ in located[table.name].files))
        for table in adapter.manifest.tables
    )
    return replace(adapter, manifest=replace(adapter.manifest, tables=tables))


def _base(model: nn.Module, graph: EmbeddingGraph, tokenizer: Tokenizer | None) -> Base:
    from embedsurgery.runtime.prompt_heads import heads_of
    from embedsurgery.runtime.prompt_stacks import stacks_of

    name = getattr(model, "name_or_path", None) or None
    config = getattr(model, "config", None)
    revision = getattr(config, "_commit_hash", None)
    return Base(
        name=name if isinstance(name, str) else None,
        revision=revision if isinstance(revision, str) else None,
        tokenizer=tokenizer,
        architecture=type(model).__name__,
        config=config,
        submodules=tuple(stack.name for stack in stacks_of(model, graph)),
        heads=heads_of(model),
        new_tokens=_added(model),
    )

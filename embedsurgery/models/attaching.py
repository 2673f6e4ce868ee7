"""Attachments and new tokens in memory: the public functions that put model, tokenizer and adapter together.

What an attachment is, ``runtime/`` says; which ids and rows new tokens get, ``new_tokens.py``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedsurgery.adapters.adapter import Adapter, plainly_named
from embedsurgery.adapters.carried_tokens import State
from embedsurgery.adapters.locate import locate
from embedsurgery.combining.single import extend
from embedsurgery.errors import AttachmentError, ConfigError, EmbedSurgeryError
from embedsurgery.graph import EmbeddingGraph
from embedsurgery.graph.wrappers import base_of
from embedsurgery.models.adding import _added
from embedsurgery.models.targets import refuse_other, store_of, texts_of
from embedsurgery.plan import Plan, Undo
from embedsurgery.plugins.current import registry
from embedsurgery.stores.apply import apply
from embedsurgery.surgeries.checked import planned, started
from embedsurgery.surgeries.surgery import Base, Tokenizer

if TYPE_CHECKING:
    from torch import nn

    from embedsurgery.runtime.attachment import Attachment


def attach(
    model: nn.Module,
    config: Any,
    *,
    name: str = "default",
    tokenizer: Tokenizer | None = None,
    freeze: bool = True,
    active: bool = True,
    materialize: bool = False,
) -> Attachment:
    """Make an adapter live on a model: trainable, mergeable, removable. The model keeps its class and state dict.

    Args:
        model: Any ``nn.Module``.
        config: A config (training starts), or an `Adapter` (training goes on, or it is just used).
        name: The adapter's name on this model.
        tokenizer: Where given, the adapter carries the texts of its tokens; one that brings new tokens adds them.
        freeze: Freeze everything that was trainable; `detach` restores it.
        active: Make it live at once. With False the model computes as before, until ``activate(name)``.
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
    from embedsurgery.runtime.attachment import attach_adapter, find
    from embedsurgery.stores.modules import module_store

    refuse_other(model)
    if tokenizer is not None and not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise ConfigError(
            "not a tokenizer",
            where="tokenizer",
            expected="a tokenizer of transformers",
            found=f"{type(tokenizer).__name__} {str(tokenizer)[:80]!r}",
            hint="AutoTokenizer.from_pretrained(...) gives one",
        )
    known = find(model)
    base = base_of(model) if known is None else known.model
    if known is not None and known.merged:
        raise AttachmentError(
            "cannot attach another adapter while the rows are merged into the weights", hint="unmerge() first"
        )
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
        attachment = attach_adapter(
            base,
            adapter,
            record,
            graph=store.graph,
            name=name,
            freeze=model if freeze else None,
            materialize=materialize,
            fresh=fresh,
            active=active,
            given=model,
            classify=classify,
        )
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
        raise AttachmentError(
            "this adapter brings new tokens, and the model has an attachment already",
            found=", ".join(known.names),
            hint="attach it first, or detach() the others",
        )
    surgery = registry().named(adapter.manifest.surgery).surgery
    new = set(adapter.manifest.new_tokens.ids)
    by_row = (edit for edit in planned(surgery, adapter, located).edits if edit.sets() and edit.whole() is None)
    rows = (edit.restricted(lambda _, index: index in new) for edit in by_row)
    return apply(Plan((*edits, *(edit for edit in rows if edit is not None))), store)


def get_attachment(model: nn.Module) -> Attachment | None:
    """The model's one attachment, also after deepcopy, pickling or wrapping; None without."""
    from embedsurgery.runtime.attachment import find

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
    from embedsurgery.runtime.prompts.stacks import stacks_of
    from embedsurgery.runtime.prompts.task_heads import heads_of

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

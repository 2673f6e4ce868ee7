"""Attaches adapters to models in memory.

``runtime/`` has the attachment itself; ``surgeries/`` makes a config into an adapter. A new adapter's tokens are added
as in ``adding.py``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedsurgery.adapters.adapter import Adapter, strip_wrapper_names
from embedsurgery.adapters.carried_tokens import BaseState
from embedsurgery.adapters.locate import locate
from embedsurgery.combining.single import plan_new_tokens
from embedsurgery.errors import AttachmentError, ConfigError, EmbedSurgeryError
from embedsurgery.graph import EmbeddingGraph
from embedsurgery.graph.wrappers import base_of
from embedsurgery.models.adding import added_tokens_of
from embedsurgery.models.targets import check_model, store_of, texts_by_id
from embedsurgery.plan import Plan, Undo
from embedsurgery.plugins.current import registry
from embedsurgery.stores.apply import apply
from embedsurgery.stores.store import Store
from embedsurgery.surgeries.checked import call_plan, call_start
from embedsurgery.surgeries.surgery import Base, Surgery, Tokenizer

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
        config: A surgery's config to start training, or an `Adapter` to use or to train further.
        name: The adapter's name on this model.
        tokenizer: If given, the adapter carries the texts of its tokens; new tokens of an `Adapter` are added to it.
        freeze: Freeze all parameters that were trainable; `detach` restores them.
        active: Activate the adapter at once. With False the model computes as before, until ``activate(name)``.
        materialize: Override each table by a full copy in each forward, for code that reads ``module.weight`` directly.
            Slower. Used automatically where such code is detected.

    Returns:
        The model's one attachment; a second call adds a named adapter to it.

    Raises:
        ConfigError: ``config`` is not a config or adapter, or its values do not fit the model.
        TokenIndexError: A token index is out of range.
        TableError: No table fits ``target_modules``.
        BaseMismatchError: The adapter was made from another base.
        UnsupportedError: A table cannot be overridden.
        AttachmentError: The name is taken, or rows overlap those of another active adapter.
    """
    from embedsurgery.runtime.attachment import attach_adapter, find_attachment
    from embedsurgery.stores.modules import module_store

    check_model(model)
    _check_tokenizer(tokenizer)
    existing = find_attachment(model)
    base = base_of(model) if existing is None else existing.model
    if existing is not None and existing.merged:
        raise AttachmentError("cannot attach another adapter while the rows are merged", hint="unmerge() first")
    classify = registry().classify
    store = module_store(base, None if existing is None else existing.graph, classify=classify)
    added = None
    if isinstance(config, Adapter):
        adapter, record = config, registry().find_surgery(config.manifest.surgery)
        added = _add_missing_tokens(base, adapter, tokenizer, existing)
        if added is not None:  # the tables have grown, so the graph is another
            store = module_store(base, classify=classify)
    else:
        record = registry().for_config(config)
        adapter = _start_adapter(record.surgery, config, store, _describe_base(base, store.graph, tokenizer))
    try:
        attachment = attach_adapter(
            base,
            adapter,
            record,
            graph=store.graph,
            name=name,
            freeze=model if freeze else None,
            materialize=materialize,
            fresh=not isinstance(config, Adapter),
            active=active,
            given=model,
            classify=classify,
        )
    except BaseException:  # Ctrl-C too: without the adapter, its tokens must not stay in the model
        if added is not None:
            apply(added, store_of(base, tokenizer))
        raise
    if added is not None:
        attachment.extended.append((added, tokenizer))
    return attachment


def _check_tokenizer(tokenizer: object) -> None:
    if tokenizer is not None and not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise ConfigError(
            "not a tokenizer",
            where="tokenizer",
            expected="a tokenizer of transformers",
            found=f"{type(tokenizer).__name__} {str(tokenizer)[:80]!r}",
            hint="AutoTokenizer.from_pretrained(...) gives one",
        )


def _start_adapter(surgery: Surgery, config: Any, store: Store, base: Base) -> Adapter:
    return _with_disk_names(strip_wrapper_names(call_start(surgery, config, store, base)), base)


def _add_missing_tokens(
    model: nn.Module, adapter: Adapter, tokenizer: Tokenizer | None, existing: Attachment | None
) -> Undo | None:
    """Add the tokens that an adapter brings and the model lacks, with their rows; None if the model has them all.

    Raises:
        AttachmentError: The model has an attachment already, whose tables would have to grow.
    """
    if adapter.manifest.new_tokens is None:
        return None
    store = store_of(model, tokenizer)
    located = locate(adapter, store)
    edits = plan_new_tokens(adapter, located, store, BaseState.of(store.graph, texts_by_id([adapter], tokenizer)))
    if not edits:
        return None
    if existing is not None:
        raise AttachmentError(
            "the adapter brings new tokens, but the model has an attachment already",
            found=", ".join(existing.names),
            hint="attach it first, or detach() the others",
        )
    surgery = registry().find_surgery(adapter.manifest.surgery).surgery
    new = set(adapter.manifest.new_tokens.ids)
    by_row = (edit for edit in call_plan(surgery, adapter, located).edits if edit.sets() and edit.whole_table() is None)
    rows = (edit.restrict(lambda _, index: index in new) for edit in by_row)
    return apply(Plan((*edits, *(edit for edit in rows if edit is not None))), store)


def get_attachment(model: nn.Module) -> Attachment | None:
    """Return a model's attachment, also after deepcopy, pickling or wrapping; None if it has none."""
    from embedsurgery.runtime.attachment import find_attachment

    return find_attachment(model)


def _with_disk_names(adapter: Adapter, base: Base) -> Adapter:
    """Add its tables' names on disk to an adapter, if the model was loaded from a directory that still has them."""
    if base.name is None or not Path(base.name).is_dir():
        return adapter
    try:
        located = locate(adapter, registry().open_store(Path(base.name)))
    except EmbedSurgeryError:  # disk names are a hint: without them a table is recognised by its rows
        return adapter
    tables = tuple(
        replace(table, disk_names=tuple(name for name, _ in located[table.name].files))
        for table in adapter.manifest.tables
    )
    return replace(adapter, manifest=replace(adapter.manifest, tables=tables))


def _describe_base(model: nn.Module, graph: EmbeddingGraph, tokenizer: Tokenizer | None) -> Base:
    from embedsurgery.runtime.prompts.stacks import find_stacks
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
        submodules=tuple(stack.name for stack in find_stacks(model, graph)),
        heads=heads_of(model),
        new_tokens=added_tokens_of(model),
    )

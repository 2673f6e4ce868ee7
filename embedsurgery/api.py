"""The public functions: each puts the pieces together with what the registry holds, and has no logic of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedsurgery.adapter import Adapter, plainly_named, read_adapter_files
from embedsurgery.checkpoint import open_checkpoint
from embedsurgery.errors import AdapterError, AttachmentError, ConfigError, EmbedSurgeryError
from embedsurgery.graph import EmbeddingGraph
from embedsurgery.locate import locate
from embedsurgery.names import walk_names
from embedsurgery.plan import Undo
from embedsurgery.records import check_written, written
from embedsurgery.registry import registry
from embedsurgery.stores.base import Store, apply, check
from embedsurgery.surgeries.base import Base, Tokenizer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from embedsurgery.runtime.attach import Attachment

    Target = nn.Module | Mapping[str, torch.Tensor]


def walk(target: Target | str | os.PathLike[str]) -> EmbeddingGraph:
    """Every embedding table of a model or a checkpoint, with aliases, sites and vocabularies.

    Args:
        target: An ``nn.Module``; a state dict; or a checkpoint directory, of which only headers, index and config are
            read, without torch. Where a directory's config claims a tie whose two ends are both stored, it is
            believed here; merging compares their bytes.

    Raises:
        OverlapError: In a module, a parameter that shares memory with a part of a table.
        CheckpointError: The directory's files are missing or broken.
        ConfigError: ``target`` is none of the three.
    """
    if isinstance(target, (str, os.PathLike)):
        checkpoint = open_checkpoint(Path(target))
        return walk_names(checkpoint.stored(), config=checkpoint.config, source=str(target))
    return _store(target).graph


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
        tokenizer: Where given, the adapter carries the texts of its tokens.
        freeze: Freeze everything that was trainable; `detach` restores it.
        materialize: Override by a full copy of the table in each forward, for code that reads ``module.weight``
            by itself. Slower, and chosen by itself where it is seen to be needed.

    Returns:
        The model's one attachment; a second call adds a named adapter to it.

    Raises:
        TokenIndexError, TableError: The config does not fit the model.
        BaseMismatchError: The adapter was made from another base.
        UnsupportedError: A table that cannot be overridden.
        AttachmentError: The name is taken, or rows overlap another active adapter's.
    """
    from embedsurgery.runtime.attach import attach_adapter, find
    from embedsurgery.stores.tensors import module_store
    from embedsurgery.wrappers import base_of

    _refuse_other(model)
    known = find(model)
    base = base_of(model) if known is None else known.model
    if known is not None and known.merged:
        raise AttachmentError("cannot attach another adapter while the rows are merged into the weights",
                              hint="unmerge() first")  # fmt: skip
    store = module_store(base, known.graph if known is not None else None)
    fresh = not isinstance(config, Adapter)
    if isinstance(config, Adapter):
        adapter, record = config, registry().named(config.manifest.surgery)
    else:
        record = registry().for_config(config)
        known_base = _base(base, tokenizer)
        adapter = _with_disk_names(plainly_named(record.surgery.start(config, store, known_base)), known_base)
    return attach_adapter(base, adapter, record, graph=store.graph, name=name, freeze=model if freeze else None,
                          materialize=materialize, fresh=fresh)  # fmt: skip


def attached(model: nn.Module) -> Attachment | None:
    """The model's one attachment, also after deepcopy, pickling or wrapping; None without."""
    from embedsurgery.runtime.attach import find

    return find(model)


def load(directory: str | os.PathLike[str]) -> Adapter:
    """Read an adapter's directory, ours or PEFT's.

    Raises:
        AdapterError: The files are missing, broken, or contradict each other.
        UnknownSurgeryError: No installed plugin understands it. Nothing is imported on the word of a file.
    """
    files, manifest = read_adapter_files(directory)
    if manifest is None:
        return registry().for_peft_type(files.config.get("peft_type")).surgery.from_peft(files)
    surgery = registry().named(manifest.surgery).surgery
    if manifest.surgery_version > surgery.version:
        raise AdapterError("an adapter of a newer version of its surgery", where=directory, expected=surgery.version,
                           found=manifest.surgery_version, hint="upgrade what brings the surgery")  # fmt: skip
    return surgery.from_files(files, Adapter(manifest, {}, surgery))


def merge(target: Target, adapter: Adapter, tokenizer: Tokenizer | None = None) -> Undo:
    """Bake an adapter into a model or state dict, in place; each row is rounded once to the table's dtype.

    Args:
        target: An ``nn.Module`` without an attachment, or a state dict.
        adapter: What to bake in.
        tokenizer: For plans that touch a vocabulary; token rows do not.

    Returns:
        The undo, for `unmerge`.

    Raises:
        BaseMismatchError: The target's rows are not those the adapter was made from.
        TableError: The table is not found.
        UnsupportedError: A table whose rows cannot be set.
        AttachmentError: The model has an attachment, which merges by itself.
    """
    _refuse_attached(target, "merge")
    store = _store(target)
    if not isinstance(adapter, Adapter):
        raise ConfigError("not an adapter", expected="an Adapter", found=type(adapter).__name__,
                          hint="embedsurgery.load(directory) or attachment.adapter() gives one")  # fmt: skip
    surgery = registry().named(adapter.manifest.surgery).surgery
    undo = apply(surgery.plan(adapter, locate(adapter, store)), store)
    return replace(undo, facts={"written": written(undo, store)})


def unmerge(target: Target, undo: Undo) -> None:
    """Put back, bit for bit, what a merge changed.

    Raises:
        PlanError: The undo does not fit the target, or the rows have changed since the merge.
        AttachmentError: The model has an attachment, which unmerges by itself.
    """
    _refuse_attached(target, "unmerge")
    if not isinstance(undo, Undo):
        raise ConfigError("not an undo", expected="what merge() returned", found=type(undo).__name__)
    store = _store(target)
    check(undo, store)
    if "written" in undo.facts:
        check_written("the undo", undo, store)
    apply(undo, store)


def _refuse_attached(target: Target, verb: str) -> None:
    """An edit behind an attachment's back would leave its rows, and what it restores, wrong."""
    from torch import nn

    if isinstance(target, nn.Module) and attached(target) is not None:
        raise AttachmentError(f"cannot {verb} a model that has an attachment from outside", where=type(target).__name__,
                              hint=f"use the attachment's own {verb}(), or detach() it first")  # fmt: skip


def _refuse_other(model: object) -> None:
    from torch import nn

    if not isinstance(model, nn.Module):
        raise ConfigError("not a model", expected="an nn.Module", found=type(model).__name__,
                          hint="load the model first; merge_checkpoint() takes a directory")  # fmt: skip


def _store(target: Target) -> Store:
    from torch import nn

    from embedsurgery.stores.tensors import module_store, state_dict_store

    if isinstance(target, nn.Module):
        return module_store(target)
    if isinstance(target, Mapping):
        return state_dict_store(target)
    raise ConfigError("not a model or a state dict", expected="nn.Module or mapping of tensors",
                      found=type(target).__name__)  # fmt: skip


def _with_disk_names(adapter: Adapter, base: Base) -> Adapter:
    """The adapter with its tables' names on disk, where the model was loaded from a directory that still holds them."""
    from embedsurgery.stores.shards import ShardStore

    if base.name is None or not Path(base.name).is_dir():
        return adapter
    try:
        located = locate(adapter, ShardStore.open(Path(base.name)))
    except EmbedSurgeryError:  # a name is a hint: without it the rows decide
        return adapter
    tables = tuple(
        replace(table, disk_names=tuple(name for name, _ in located[table.name].files))
        for table in adapter.manifest.tables
    )
    return replace(adapter, manifest=replace(adapter.manifest, tables=tables))


def _base(model: nn.Module, tokenizer: Tokenizer | None) -> Base:
    name = getattr(model, "name_or_path", None) or None
    revision = getattr(getattr(model, "config", None), "_commit_hash", None)
    return Base(name if isinstance(name, str) else None, revision if isinstance(revision, str) else None, tokenizer)

"""Walking, loading and merging: each puts the pieces together with what the registry holds, and no logic of its own.

Attachments and new tokens on a live model are ``live.py``'s, checkpoints on disk ``offline.py``'s.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedsurgery import hub
from embedsurgery.adapter import Adapter, read_adapter_files
from embedsurgery.checkpoint import open_checkpoint
from embedsurgery.combining import Conflict, plan_parts, together
from embedsurgery.errors import AdapterError, AttachmentError, ConfigError, EmbedSurgeryWarning
from embedsurgery.graph import EmbeddingGraph
from embedsurgery.names import walk_names
from embedsurgery.parts import parts
from embedsurgery.plan import Undo
from embedsurgery.records import check_written, written
from embedsurgery.registry import registry
from embedsurgery.stores.base import Store, apply, check
from embedsurgery.surgeries.answers import read
from embedsurgery.surgeries.base import Tokenizer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from embedsurgery.new_tokens import KnownTokens
    from embedsurgery.surgeries.soft_prompt_bake_config import BakeConfig

    Target = nn.Module | Mapping[str, torch.Tensor]


def walk(target: Target | str | os.PathLike[str]) -> EmbeddingGraph:
    """Every embedding table of a model or a checkpoint, with aliases, sites and vocabularies.

    Args:
        target: An ``nn.Module``; a state dict; or a checkpoint directory or Hub id, of which only headers, index and
            config are read, without torch. Where the config claims a tie whose two ends are both stored, it is
            believed here; merging compares their bytes.

    Raises:
        OverlapError: In a module, a parameter that shares memory with a part of a table.
        CheckpointError: The directory's files are missing or broken.
        ConfigError: ``target`` is none of the three.
    """
    if isinstance(target, (str, os.PathLike)):
        return opened(target)[0]
    return store_of(target).graph


def opened(model: str | os.PathLike[str]) -> tuple[EmbeddingGraph, Mapping[str, Any] | None]:
    """The graph of a checkpoint directory or a Hub id, by headers alone, and its config.

    Raises:
        CheckpointError: The directory's files are missing or broken.
    """
    remote = hub.find_id(model)
    known = registry()
    if remote is None and not (form := known.format_of(Path(model))).fallback:
        store = known.opened(form, Path(model))
        return store.graph, store.config
    checkpoint = open_checkpoint(Path(model)) if remote is None else hub.open_remote(remote)
    graph = walk_names(checkpoint.stored(), config=checkpoint.config, source=str(model),
                       architectures=known.architectures)  # fmt: skip
    return graph, checkpoint.config


def load(directory: str | os.PathLike[str]) -> Adapter:
    """Read an adapter's directory, ours or PEFT's; or pull it, for ``org/name`` or ``org/name@revision``.

    Raises:
        AdapterError: The files are missing, broken, or contradict each other.
        HubError: It cannot be had from the Hub.
        UnknownSurgeryError: No installed plugin understands it. Nothing is imported on the word of a file.
    """
    remote = hub.find_id(directory)
    if remote is not None:
        return hub.pull(str(remote))
    return replace(_read(directory), source=hub.read_source(Path(directory)))


def _read(directory: str | os.PathLike[str]) -> Adapter:
    files, manifest = read_adapter_files(directory)
    if manifest is None:
        return read(registry().for_peft_type(files.config.get("peft_type")).surgery, files, None)
    surgery = registry().named(manifest.surgery).surgery
    if manifest.surgery_version > surgery.version:
        raise AdapterError("an adapter of a newer version of its surgery", where=directory, expected=surgery.version,
                           found=manifest.surgery_version, hint="upgrade what brings the surgery")  # fmt: skip
    return read(surgery, files, manifest)


def merge(
    target: Target,
    adapter: Adapter | tuple[Adapter, float] | Sequence[Adapter | tuple[Adapter, float]],
    tokenizer: Tokenizer | None = None,
    *,
    bake: BakeConfig | Sequence[BakeConfig | None] | None = None,
    on_conflict: Conflict | None = None,
    allow_nan: bool = False,
) -> Undo:
    """Bake adapters into a model or state dict, in place; each row is rounded once to the table's dtype.

    Args:
        target: An ``nn.Module`` without an attachment, or a state dict.
        adapter: What to bake in: one or several, each alone or in a pair with a weight, as `merge_checkpoint` takes
            them. Several are one merge, with one undo.
        tokenizer: Gets the tokens that the adapters bring, if any, or that soft prompts become.
        bake: How soft prompts become tokens: for all, or for each adapter.
        on_conflict: What becomes of rows that several set: "last" or "average", as for `merge_checkpoint`.
        allow_nan: Merge rows with NaN or infinity, which are refused otherwise.

    Returns:
        The undo, for `unmerge`.

    Raises:
        BaseMismatchError: The target's rows are not those the adapter was made from.
        TableError: The table is not found.
        PlanError: Two adapters set the same rows, or rows hold NaN or infinity.
        UnsupportedError: A table whose rows cannot be set.
        AttachmentError: The model has an attachment, which merges by itself.
    """
    refuse_attached(target, "merge")
    asked = parts(adapter, _loaded)
    store = store_of(target, tokenizer)
    if tokenizer is None:
        texts_of([part.adapter for part in asked], None)  # which says what an adapter's tokens would need
    tokens = None if tokenizer is None else partial(_known, tokenizer)
    planned = plan_parts(asked, lambda name: registry().named(name).surgery, store, tokens, options=bake,
                         on_conflict=on_conflict, allow_nan=allow_nan)  # fmt: skip
    plan = planned[0][1] if len(planned) == 1 else together([plan for _, plan in planned])
    undo = apply(plan, store)
    return MergeUndo(undo.edits, {**plan.facts, "written": written(undo, store)}, tokenizer)


def _loaded(adapter: object) -> tuple[Adapter, str]:
    if not isinstance(adapter, Adapter):
        raise ConfigError("not an adapter", expected="an Adapter", found=type(adapter).__name__,
                          hint="embedsurgery.load(directory) or attachment.adapter() gives one")  # fmt: skip
    return adapter, adapter.source or "adapter"


def _known(tokenizer: Any) -> KnownTokens:
    from embedsurgery.live_tokenizer import known_tokens

    return known_tokens(tokenizer)


def unmerge(target: Target, undo: Undo, tokenizer: Tokenizer | None = None) -> None:
    """Put back, bit for bit, what a merge changed.

    Args:
        target: What was merged into.
        undo: What `merge` returned, or one that was loaded from a file.
        tokenizer: Where the merge added tokens and the undo comes from a file; what `merge` returned knows its own.

    Raises:
        PlanError: The undo does not fit the target, or the rows have changed since the merge.
        AttachmentError: The model has an attachment, which unmerges by itself.
    """
    refuse_attached(target, "unmerge")
    if not isinstance(undo, Undo):
        raise ConfigError("not an undo", expected="what merge() returned", found=type(undo).__name__)
    store = store_of(target, tokenizer or getattr(undo, "tokenizer", None))
    check(undo, store)
    if "written" in undo.facts:
        check_written("the undo", undo, store)
    apply(undo, store)


@dataclass(frozen=True)
class MergeUndo(Undo):
    """The undo of a merge in memory, with the tokenizer that was changed along, if any."""

    tokenizer: Any = field(default=None, repr=False, compare=False)


def texts_of(adapters: Sequence[Adapter], tokenizer: Any) -> Mapping[int, str] | None:
    """Id -> text of a tokenizer's tokens; without one, a word to whom an adapter brings new tokens."""
    from embedsurgery.live_tokenizer import texts

    if tokenizer is not None:
        return texts(tokenizer)
    new = [token for a in adapters if a.manifest.new_tokens is not None for token in a.manifest.new_tokens.tokens]
    if new:
        named = ", ".join(repr(token.content) for token in new[:4])
        warnings.warn(f"the adapter brings new tokens ({named}): give tokenizer=, or it does not know them",
                      EmbedSurgeryWarning, stacklevel=4)  # fmt: skip
    return None


def refuse_attached(target: Target, verb: str) -> None:
    """An edit behind an attachment's back would leave its rows, and what it restores, wrong."""
    from torch import nn

    from embedsurgery.runtime.attach import find

    own = f", or use its own {verb}()" if verb.isalpha() else ""
    if isinstance(target, nn.Module) and find(target) is not None:
        raise AttachmentError(f"cannot {verb} a model that has an attachment from outside", where=type(target).__name__,
                              hint=f"detach() it first{own}")  # fmt: skip


def refuse_other(model: object) -> None:
    """Refuse what is no model."""
    from torch import nn

    if not isinstance(model, nn.Module):
        raise ConfigError("not a model", expected="an nn.Module", found=type(model).__name__,
                          hint="load the model first; merge_checkpoint() takes a directory")  # fmt: skip


def store_of(target: Target, tokenizer: Any = None) -> Store:
    """The store over a model or a state dict, with the tokenizer that goes with it."""
    from torch import nn

    from embedsurgery.stores.tensors import module_store, state_dict_store

    if isinstance(target, nn.Module):
        return module_store(target, tokenizer=tokenizer, classify=registry().classify)
    if isinstance(target, Mapping):
        return state_dict_store(target, tokenizer=tokenizer)
    raise ConfigError("not a model or a state dict", expected="nn.Module or mapping of tensors",
                      found=type(target).__name__)  # fmt: skip

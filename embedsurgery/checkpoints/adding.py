"""Tokens without any adapter, added to checkpoints on disk."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedsurgery.adapters.new_tokens import Init, plan_tokens
from embedsurgery.checkpoints.jobs import Job
from embedsurgery.checkpoints.records import tokens_facts
from embedsurgery.checkpoints.writing import open_output, write
from embedsurgery.errors import ConfigError, EmbedSurgeryWarning
from embedsurgery.plugins.current import registry
from embedsurgery.tokenizer.patching import check_tokens, known_tokens

if TYPE_CHECKING:
    from embedsurgery.adapters.carried_tokens import NewTokens
    from embedsurgery.checkpoints.report import MergeReport, Progress
    from embedsurgery.stores.store import Store


def add_tokens_checkpoint(
    model: str | os.PathLike[str],
    tokens: str | Sequence[str],
    output: str | os.PathLike[str] | None = None,
    *,
    init: Init = "mean",
    special: bool = False,
    reserved: bool = False,
    pad_to_multiple_of: int | None = None,
    seed: int = 0,
    hashes: bool = False,
    in_place: bool = False,
    hardlink: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Write a new checkpoint directory with tokens added to its tokenizer and rows for them; nothing is trained.

    As `embedsurgery.add_tokens`, on disk and without loading the model; recorded as a merge, so that
    `unmerge_checkpoint` takes the tokens out again.

    Args:
        model: A directory with safetensors weights and a tokenizer; or a Hub id, ``org/name@revision``.
        tokens: Texts. Those that exist are found, not added twice.
        output: A directory that does not exist yet. None for a dry run alone, or with ``in_place``.
        init: How rows start: NAME or NAME:ARGUMENT, for all tokens or for each in a dict by its text.
        special: Whether they are special tokens.
        reserved: Take the ids of reserved tokens first.
        pad_to_multiple_of: Where the tables must grow, grow them to a multiple.
        seed: For initialisers that draw.
        hashes: Record the sha256 of every file of the result, as `merge_checkpoint` does.
        in_place: Change ``model`` itself, as `merge_checkpoint` does. Spare rows are written where they lie; where the
            tables must grow, new files are made inside ``.embedsurgery/`` and take the places of the old ones.
        hardlink: Share the weight files that do not change with ``model``.
        dry_run: Check everything and say what would be done.
        progress: Called as files are copied.

    Raises:
        ConfigError: A token that is empty, named twice or exists already, or an initialiser that is none.
        CheckpointError: The model's files are missing or broken, or have no tokenizer.
        OutputExistsError: ``output`` exists.
    """
    with open_output(model, output, in_place=in_place, hardlink=hardlink, dry_run=dry_run, progress=progress) as place:
        store = registry().open_store(place.source)
        known = known_tokens(place.source)
        asked = plan_tokens(
            store,
            known,
            tokens,
            initializers=registry().initializers,
            init=init,
            special=special,
            reserved=reserved,
            pad_to_multiple_of=pad_to_multiple_of,
            seed=seed,
        )
        if asked.new is None:
            named = ", ".join(f"{known.texts[i]!r} is {i}" for i in asked.ids)
            raise ConfigError("the tokens exist already, so there is nothing to write", where=place.source, found=named)
        _try_encoding(place.source, asked.new)
        new = asked.new
        job = Job(asked.plan, lambda undo, store: {**tokens_facts(new, undo, store), **_hashes(store, hashes)})
        return write([job], store, place)


def _hashes(store: Store, asked: bool) -> dict[str, Any]:
    if not asked:
        return {}
    from embedsurgery.checkpoints.hashes import file_hashes

    return {"sha256": file_hashes(store.directory)}


def _try_encoding(source: Path, new: NewTokens) -> None:
    """See that text reaches the new tokens, where the library that encodes is there."""
    if importlib.util.find_spec("tokenizers") is None:
        warnings.warn(
            "the tokenizers library is not installed, so whether text reaches the new tokens was not tried",
            EmbedSurgeryWarning,
            stacklevel=3,
        )
        return
    check_tokens(source, new.tokens)

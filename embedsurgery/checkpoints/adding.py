"""Adds tokens to a checkpoint on disk without an adapter.

``adapters/new_tokens.py`` plans ids and rows, ``writing.py`` applies the plan.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedsurgery.adapters.new_tokens import Init, plan_tokens
from embedsurgery.checkpoints.jobs import Job
from embedsurgery.checkpoints.records import added_tokens_facts
from embedsurgery.checkpoints.writing import open_output, write_jobs
from embedsurgery.errors import ConfigError, warn
from embedsurgery.plugins.current import registry
from embedsurgery.tokenizer.patching import check_tokens, read_known_tokens

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
    """Write a new checkpoint with tokens added to its tokenizer, and untrained rows for them to its tables.

    The counterpart of `embedsurgery.add_tokens` on disk; the model is not loaded. The change is recorded as a merge, so
    `unmerge_checkpoint` removes the tokens again.

    Args:
        model: A directory with safetensors weights and a tokenizer, or a Hub id, ``org/name@revision``.
        tokens: Texts of the tokens. Existing ones are skipped.
        output: A new directory. None for a dry run, or with ``in_place``.
        init: How to initialise rows: NAME or NAME:ARGUMENT, for all tokens or as a dict with one for each text.
        special: Add them as special tokens.
        reserved: Take the ids of reserved tokens first.
        pad_to_multiple_of: If the tables must grow, grow them to a multiple of this.
        seed: Seed of random initialisers.
        hashes: Record the sha256 of every file of the result, as `merge_checkpoint` does.
        in_place: Change ``model`` itself, as `merge_checkpoint` does. Spare rows are overwritten. If the tables must
            grow, new files are built in ``.embedsurgery/`` and replace the old ones.
        hardlink: Share unchanged weight files with ``model``.
        dry_run: Check everything and return the report, write nothing.
        progress: Called as files are copied.

    Raises:
        ConfigError: A token is empty or given twice, all tokens exist, or the initialiser is unknown.
        CheckpointError: The model's files are missing or broken, or it has no tokenizer.
        OutputExistsError: ``output`` exists.
    """
    with open_output(model, output, in_place=in_place, hardlink=hardlink, dry_run=dry_run, progress=progress) as out:
        store = registry().open_store(out.source)
        known = read_known_tokens(out.source)
        planned = plan_tokens(
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
        new = planned.new
        if new is None:
            listed = ", ".join(f"{known.texts[i]!r} is {i}" for i in planned.ids)
            raise ConfigError("all tokens exist already", where=out.source, found=listed)
        _check_encoding(out.source, new)
        job = Job(
            planned.plan, lambda undo, store: {**added_tokens_facts(new, undo, store), **_hash_facts(store, hashes)}
        )
        return write_jobs([job], store, out)


def _hash_facts(store: Store, wanted: bool) -> dict[str, Any]:
    if not wanted:
        return {}
    # Imported here: hashing is rare, and merges start faster without it.
    from embedsurgery.checkpoints.hashes import hash_files

    return {"sha256": hash_files(store.directory)}


def _check_encoding(source: Path, new: NewTokens) -> None:
    """Check that text encodes to the new tokens; warn if the tokenizers library is missing."""
    if importlib.util.find_spec("tokenizers") is None:
        warn("tokenizers is not installed: could not check that text encodes to the new tokens")
        return
    check_tokens(source, new.tokens)

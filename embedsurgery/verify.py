"""Checks a checkpoint: what would make a loader fail, or load something else than it seems.

Reads headers, index, config and tokenizer, the rows of recorded merges, and, where a tie is stored twice, its copies.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedsurgery import hub
from embedsurgery.checkpoint import INDEX, Checkpoint
from embedsurgery.errors import EmbedSurgeryError
from embedsurgery.graph import EmbeddingGraph
from embedsurgery.jsonfile import read_json
from embedsurgery.names import is_language_model, tie_flag, vocabulary_sizes, walk_names
from embedsurgery.plan import Grow, Plan, SetBlocks, SetRows, Undo, Untie, count_rows
from embedsurgery.raw import EDITABLE
from embedsurgery.records import check_written, record_paths
from embedsurgery.registry import registry
from embedsurgery.stores.base import Store, rows_of
from embedsurgery.stores.shards import ShardStore
from embedsurgery.tie_flags import places
from embedsurgery.tokenizer_files import highest_token_id

MORE_ROWS = ("mllama", "mllama_text_model", "cpmant", "moshi", "molmo2")
"""Model types whose input table has rows beyond ``vocab_size`` by design, for images or prompts."""


Config = Mapping[str, Any] | None


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What.
        ok: Whether it is as it should be.
        detail: What was seen.
    """

    name: str
    ok: bool
    detail: str


def verify_checkpoint(directory: str | os.PathLike[str]) -> tuple[Check, ...]:
    """Check a checkpoint directory, or the model of a Hub id, of which headers, small files and single rows come.

    Returns:
        Every check, in order; all are ``ok`` in a sound checkpoint.

    Raises:
        CheckpointError: The files cannot be read at all.
        HubError: The model cannot be had from the Hub.
    """
    with hub.store(directory) as store:
        if not isinstance(store, ShardStore):
            checks, folder, claimed = [], Path(directory), store.graph
        else:
            stored, folder = store.checkpoint.stored(), store.checkpoint.directory
            checks = list(_index(store.checkpoint))
            claimed = walk_names(stored, config=store.config, source=store.name,
                                 architectures=registry().architectures)  # fmt: skip
        checks += [*_rows(store.config, store.graph), *_ties(store.config, store.graph, claimed, _parted(folder))]
        return (*checks, *_tokenizer(folder, store.graph), *_records(folder, store))


def _index(checkpoint: Checkpoint) -> Iterator[Check]:
    names = ", ".join(checkpoint.headers)
    if not checkpoint.indexed:
        yield Check("weights", True, f"{len(checkpoint.location)} tensors in {names}")
        return
    extra = [f"{file}: {n}" for file, h in checkpoint.headers.items() for n in h.entries
             if checkpoint.location.get(n) != file]  # fmt: skip
    detail = f"{len(checkpoint.location)} tensors in {len(checkpoint.headers)} shards"
    yield Check("index", not extra, f"not in the index: {', '.join(extra[:4])}" if extra else detail)
    total = sum(e.end - e.begin for h in checkpoint.headers.values() for e in h.entries.values())
    metadata = read_json(checkpoint.directory / INDEX).get("metadata")
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    yield Check("total_size", said == total, f"{said} in the index, {total} in the shards")


def _rows(config: Config, graph: EmbeddingGraph) -> Iterator[Check]:
    sizes = vocabulary_sizes(config)
    vocabulary = [t for t in graph.tables if t.kind == "vocabulary"]
    yield Check("tables", bool(vocabulary), ", ".join(f"{t.name} {list(t.shape)}" for t in vocabulary) or "none found")
    for table in vocabulary:
        kind = (config or {}).get("model_type")
        more = kind in MORE_ROWS and table.name == graph.input and table.shape[0] > min(sizes, default=0)
        known = not sizes or table.shape[0] in sizes or more
        said = ", ".join(map(str, dict.fromkeys(sizes))) or "nothing"
        yield Check("config", known, f"{table.name} has {table.shape[0]} rows, the config says {said}")
        good = table.dtype in EDITABLE
        yield Check("dtype", good, f"{table.name} is {table.dtype}")


def _ties(config: Config, graph: EmbeddingGraph, claimed: EmbeddingGraph, parted: set[str]) -> Iterator[Check]:
    flag = tie_flag(config)
    apart = set() if places(config or {}) else parted
    for table in claimed.tables:
        if len(table.files) > 1:
            real = graph.table(table.name)
            names = " and ".join(name for name, _ in table.files)
            if apart & {name for name, _ in table.files}:
                yield Check("ties", True, f"{names} are apart since a merge, whatever the config's flag says")
                continue
            same = len(real.files) == len(table.files)
            yield Check("ties", same, f"{names} are {'equal' if same else 'different, so they load untied'}")
    heads = [t for t in graph.tables if "output" in t.roles and t.kind == "vocabulary"]
    if is_language_model(config) and flag is False and graph.input and not heads:
        detail = f"tie_word_embeddings is false and no head is stored: {graph.input} loads beside a random one"
        yield Check("head", False, detail)


def _parted(folder: Path) -> set[str]:
    """Names of heads that merges have given tables of their own."""
    found = set()
    for record in record_paths(folder):
        with suppress(EmbedSurgeryError):  # a broken record is told of by itself
            found |= {e.head for e in Plan.load(record).edits if isinstance(e, Untie) and e.undo}
    return found


def _tokenizer(folder: Path, graph: EmbeddingGraph) -> Iterator[Check]:
    highest = highest_token_id(folder)
    if highest is None or graph.input is None:
        return
    rows = graph.table(graph.input).shape[0]
    yield Check("tokenizer", highest < rows, f"highest token id {highest}, {rows} rows")


def _records(folder: Path, store: Store) -> Iterator[Check]:
    covered: dict[str, set[int]] = {}
    grown: set[str] = set()
    numbers = [int(path.stem) for path in record_paths(folder)]
    if numbers != list(range(1, len(numbers) + 1)):
        yield Check("merges", False, f"records {', '.join(map(str, numbers))} are there, so one is missing")
    for path in reversed(record_paths(folder)):
        name = f"merge {int(path.stem)}"
        try:
            undo = Plan.load(path)
            overlaid = any(not covered.get(table, set()).isdisjoint(rows) for table, rows in _edited(undo))
            overlaid |= any(e.vocabulary in grown for e in undo.edits if isinstance(e, Grow))
            if not overlaid:
                check_written(path, undo, store)
        except EmbedSurgeryError as error:
            yield Check(name, False, str(error))
            continue
        bad = [e.table for e in undo.edits if isinstance(e, SetRows) and not _finite(store, e)]
        rows = sum(len(indices) for _, indices in _edited(undo))
        detail = f"NaN or infinity in {', '.join(bad)}" if bad else f"{count_rows(rows)} as written"
        yield Check(name, not bad, "partly under a later merge" if overlaid and not bad else detail)
        for table, indices in _edited(undo):
            covered.setdefault(table, set()).update(indices)
        grown.update(e.vocabulary for e in undo.edits if isinstance(e, Grow))


def _edited(undo: Undo) -> Iterator[tuple[str, Sequence[int]]]:
    """Table's name and row numbers of what a merge set."""
    for edit in undo.edits:
        if isinstance(edit, SetRows):
            yield edit.table, edit.indices
        elif isinstance(edit, SetBlocks):
            yield edit.table, range(edit.blocks.shape[0])


def _finite(store: Store, edit: SetRows) -> bool:
    rows = rows_of(store, store.graph.table(edit.table), edit.indices)
    return bool(np.isfinite(rows.float32()).all())

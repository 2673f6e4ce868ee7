"""Verifies a checkpoint: finds what makes a loader fail, or load another model than the files suggest.

Reads headers, index, config and tokenizer, the rows of recorded merges and, for a tie that is stored twice, both
copies; with ``full=True`` every byte of every file. ``hashes.py`` reads recorded hashes, ``stack.py`` merges.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedsurgery import hub
from embedsurgery.checkpoints.hashes import checkpoint_files, known_hashes, sha256_of
from embedsurgery.checkpoints.records import record_paths
from embedsurgery.checkpoints.stack import StackedMerge, find_overlaps, read_merge, tombstone_paths
from embedsurgery.errors import EmbedSurgeryError, PlanError
from embedsurgery.files.json_reading import read_json
from embedsurgery.graph import EmbeddingGraph
from embedsurgery.graph.architectures import is_language_model, read_tie_flag
from embedsurgery.graph.config import read_tie_flags, vocabulary_sizes
from embedsurgery.loading import open_store
from embedsurgery.plan import Edit, Undo
from embedsurgery.plan.edit import format_row_count
from embedsurgery.stores.checkpoint import INDEX, Checkpoint
from embedsurgery.stores.checks import digest_of
from embedsurgery.stores.shards import ShardStore
from embedsurgery.stores.store import Store, rows_of
from embedsurgery.stores.written import check_written
from embedsurgery.tensors.raw import EDITABLE
from embedsurgery.tokenizer.reading import highest_token_id

EXTRA_ROW_TYPES = ("mllama", "mllama_text_model", "cpmant", "moshi", "molmo2")
"""Model types whose input table has rows beyond ``vocab_size`` by design, for images or prompts."""

Config = Mapping[str, Any] | None


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: What was checked.
        ok: Whether it passed.
        detail: What was found.
    """

    name: str
    ok: bool
    detail: str


def verify_checkpoint(directory: str | os.PathLike[str], *, full: bool = False) -> tuple[Check, ...]:
    """Verify a checkpoint directory or a model on the Hub.

    Of a model on the Hub only headers, small files and single rows are downloaded, unless ``full``.

    Args:
        directory: A directory or a Hub id.
        full: Also read every file and compare its sha256 with the one that a merge recorded (``hashes=True``) or, for a
            file that no merge has changed, with the one in the Hub's download metadata. Files without either are
            listed: they are read but cannot be compared.

    Returns:
        Every check, in order; all are ``ok`` in a sound checkpoint.

    Raises:
        CheckpointError: The files cannot be read at all.
        HubError: The model cannot be read from the Hub.
    """
    if full and hub.find_id(directory) is not None:
        with hub.directory(directory) as whole:
            return verify_checkpoint(whole, full=True)
    with open_store(directory) as store:
        folder = store.directory
        checks = list(_check_index(store.checkpoint)) if isinstance(store, ShardStore) else []
        checks += _check_tables(store.config, store.graph)
        checks += _check_ties(store.config, store.graph, store.claimed_graph, _untied_heads(folder))
        checks += [*_check_token_ids(folder, store.graph), *_check_merges(folder, store)]
        return (*checks, *_check_hashes(folder)) if full else tuple(checks)


def _check_index(checkpoint: Checkpoint) -> Iterator[Check]:
    if not checkpoint.indexed:
        yield Check("weights", True, f"{len(checkpoint.location)} tensors in {', '.join(checkpoint.headers)}")
        return
    extra = [
        f"{file}: {name}"
        for file, header in checkpoint.headers.items()
        for name in header.entries
        if checkpoint.location.get(name) != file
    ]
    detail = f"{len(checkpoint.location)} tensors in {len(checkpoint.headers)} shards"
    yield Check("index", not extra, f"not in the index: {', '.join(extra[:4])}" if extra else detail)
    total = sum(e.end - e.begin for h in checkpoint.headers.values() for e in h.entries.values())
    metadata = read_json(checkpoint.directory / INDEX).get("metadata")
    recorded = metadata.get("total_size") if isinstance(metadata, dict) else None
    yield Check("total_size", recorded == total, f"{recorded} in the index, {total} in the shards")


def _check_tables(config: Config, graph: EmbeddingGraph) -> Iterator[Check]:
    sizes = vocabulary_sizes(config)
    tables = [t for t in graph.tables if t.kind == "vocabulary"]
    yield Check("tables", bool(tables), ", ".join(f"{t.name} {list(t.shape)}" for t in tables) or "none found")
    for table in tables:
        kind = (config or {}).get("model_type")
        extra = kind in EXTRA_ROW_TYPES and table.name == graph.input and table.shape[0] > min(sizes, default=0)
        known = not sizes or table.shape[0] in sizes or extra
        listed = ", ".join(map(str, dict.fromkeys(sizes))) or "no size"
        yield Check("config", known, f"{table.name} has {table.shape[0]} rows, the config has {listed}")
        yield Check("dtype", table.dtype in EDITABLE, f"{table.name} is {table.dtype}")


def _check_ties(config: Config, graph: EmbeddingGraph, claimed: EmbeddingGraph, untied: set[str]) -> Iterator[Check]:
    flag = read_tie_flag(config)
    apart = set() if read_tie_flags(config or {}) else untied
    for table in claimed.tables:
        if len(table.files) > 1:
            real = graph.table(table.name)
            names = " and ".join(name for name, _ in table.files)
            if apart & {name for name, _ in table.files}:
                yield Check("ties", True, f"{names} were untied by a merge, whatever the config's flag says")
                continue
            same = len(real.files) == len(table.files)
            yield Check("ties", same, f"{names} are {'equal' if same else 'different, so they load untied'}")
    heads = [t for t in graph.tables if "output" in t.roles and t.kind == "vocabulary"]
    if is_language_model(config) and flag is False and graph.input and not heads:
        detail = f"tie_word_embeddings is false but only {graph.input} is stored: the head would load with random rows"
        yield Check("head", False, detail)


def _untied_heads(folder: Path) -> set[str]:
    """Names of heads that merges have untied."""
    heads = set()
    for record in record_paths(folder):
        with suppress(EmbedSurgeryError):  # _check_merges reports a broken record
            heads |= {head for edit in Undo.load(record).edits for head in edit.tie_names()[1:]}
    return heads


def _check_token_ids(folder: Path, graph: EmbeddingGraph) -> Iterator[Check]:
    highest = highest_token_id(folder)
    if highest is None or graph.input is None:
        return
    rows = graph.table(graph.input).shape[0]
    yield Check("tokenizer", highest < rows, f"highest token id {highest}, {rows} rows")


def _check_merges(folder: Path, store: Store) -> Iterator[Check]:
    paths = record_paths(folder)
    numbers = sorted({int(path.stem) for path in paths} | tombstone_paths(folder).keys())
    if numbers != list(range(1, len(numbers) + 1)):
        yield Check("merges", False, f"a record is missing: found {', '.join(map(str, numbers))}")
    merges: list[StackedMerge] = []
    for path in paths:
        try:
            merges.append(read_merge(path))
        except EmbedSurgeryError as error:
            yield Check(f"merge {int(path.stem)}", False, str(error))
    for merge in reversed(find_overlaps(merges, store.graph)):
        name = f"merge {merge.number}"
        try:
            check_written(merge.path, merge.undo, store, skip=merge.overridden)
            _check_small_files(merge, store)
            bad = [
                table
                for number, edit in enumerate(merge.undo.edits)
                if number not in merge.overridden
                for table in _non_finite_tables(store, edit)
            ]
        except EmbedSurgeryError as error:
            yield Check(name, False, str(error))
            continue
        rows = format_row_count(sum(merge.record.rows.values()))
        detail = f"partly overridden: {merge.overlaps}" if merge.overridden else f"{rows} as written"
        yield Check(name, not bad, f"NaN or infinity in {', '.join(bad)}" if bad else detail)


def _check_small_files(merge: StackedMerge, store: Store) -> None:
    """Refuse small files that changed since the merge wrote them."""
    for number, edit in enumerate(merge.undo.edits):
        expected = edit.expected_file()
        if expected is not None and number not in merge.overridden:
            path, written = expected
            found = digest_of(store.read_file(path))
            if found != written:
                raise PlanError(
                    "a file changed since the merge",
                    where=path,
                    found=f"sha256 {found}"[:19],
                    expected=f"sha256 {written}"[:19],
                )


def _non_finite_tables(store: Store, edit: Edit) -> Iterator[str]:
    """The tables in which rows that an edit of an undo sets are now NaN or infinite."""
    for name, indices in edit.sets().items():
        table = store.graph.find(name)
        if table is not None and indices is not None:
            rows = rows_of(store, table, tuple(indices))
            if not np.isfinite(rows.float32()).all():
                yield name


def _check_hashes(folder: Path) -> Iterator[Check]:
    try:
        known = known_hashes(folder)
    except EmbedSurgeryError as error:
        yield Check("hashes", False, str(error))
        known = {}
    unknown = []
    files = checkpoint_files(folder)
    for path in sorted(known.keys() - set(files)):
        yield Check(path, False, f"file not found; {known[path].source} recorded its hash")
    for path in files:
        try:
            found = sha256_of(folder / path)
        except EmbedSurgeryError as error:
            yield Check(path, False, str(error))
            continue
        if path not in known:
            unknown.append(path)
            continue
        same = found == known[path].sha256
        recorded = "as" if same else known[path].sha256[:12]
        yield Check(path, same, f"sha256 {found[:12]}, {recorded} recorded by {known[path].source}")
    if unknown:
        listed = ", ".join(unknown[:6]) + (f" and {len(unknown) - 6} more" if len(unknown) > 6 else "")
        yield Check("no hash known", True, f"{listed}: read but not compared (merge --hash records hashes)")

"""Checks a checkpoint: what would make a loader fail, or load something else than it seems.

Reads headers, index, config and tokenizer, the rows of recorded merges, and, where a tie is stored twice, its copies;
when asked, every byte of every file.
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
from embedsurgery.checkpoints.stack import Entry, arranged, entry, tombstones
from embedsurgery.errors import EmbedSurgeryError, PlanError
from embedsurgery.files.json_reading import read_json
from embedsurgery.graph import EmbeddingGraph
from embedsurgery.graph.architectures import is_language_model, tie_flag
from embedsurgery.graph.config import places
from embedsurgery.graph.from_names import vocabulary_sizes
from embedsurgery.loading import open_store
from embedsurgery.plan import Edit, Undo
from embedsurgery.plan.edit import count_rows
from embedsurgery.stores.checkpoint import INDEX, Checkpoint
from embedsurgery.stores.checks import digest
from embedsurgery.stores.shards import ShardStore
from embedsurgery.stores.store import Store, rows_of
from embedsurgery.stores.written import check_written
from embedsurgery.tensors.raw import EDITABLE
from embedsurgery.tokenizer.reading import highest_token_id

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


def verify_checkpoint(directory: str | os.PathLike[str], *, full: bool = False) -> tuple[Check, ...]:
    """Check a checkpoint directory, or the model of a Hub id, of which headers, small files and single rows come.

    Args:
        directory: A directory or a Hub id.
        full: Also read every file whole and compare its sha256 with what a merge recorded (``hashes=True``) or, for a
            file that no merge has touched, with what the Hub said when it was downloaded. Files of which neither is
            known are named: they were read, and compared with nothing.

    Returns:
        Every check, in order; all are ``ok`` in a sound checkpoint.

    Raises:
        CheckpointError: The files cannot be read at all.
        HubError: The model cannot be had from the Hub.
    """
    if full and hub.find_id(directory) is not None:
        with hub.directory(directory) as whole:
            return verify_checkpoint(whole, full=True)
    with open_store(directory) as store:
        folder, claimed = store.directory, store.claimed_graph
        checks = list(_index(store.checkpoint)) if isinstance(store, ShardStore) else []
        checks += [*_rows(store.config, store.graph), *_ties(store.config, store.graph, claimed, _parted(folder))]
        checks += [*_tokenizer(folder, store.graph), *_records(folder, store)]
        return (*checks, *_hashes(folder)) if full else tuple(checks)


def _index(checkpoint: Checkpoint) -> Iterator[Check]:
    names = ", ".join(checkpoint.headers)
    if not checkpoint.indexed:
        yield Check("weights", True, f"{len(checkpoint.location)} tensors in {names}")
        return
    extra = [
        f"{file}: {n}"
        for file, h in checkpoint.headers.items()
        for n in h.entries
        if checkpoint.location.get(n) != file
    ]
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
            found |= {head for edit in Undo.load(record).edits for head in edit.ends()[1:]}
    return found


def _tokenizer(folder: Path, graph: EmbeddingGraph) -> Iterator[Check]:
    highest = highest_token_id(folder)
    if highest is None or graph.input is None:
        return
    rows = graph.table(graph.input).shape[0]
    yield Check("tokenizer", highest < rows, f"highest token id {highest}, {rows} rows")


def _records(folder: Path, store: Store) -> Iterator[Check]:
    paths = record_paths(folder)
    numbers = sorted({int(path.stem) for path in paths} | tombstones(folder).keys())
    if numbers != list(range(1, len(numbers) + 1)):
        yield Check("merges", False, f"records {', '.join(map(str, numbers))} are there, so one is missing")
    entries: list[Entry] = []
    for path in paths:
        try:
            entries.append(entry(path))
        except EmbedSurgeryError as error:
            yield Check(f"merge {int(path.stem)}", False, str(error))
    for one in reversed(arranged(entries, store.graph)):
        name = f"merge {one.number}"
        try:
            check_written(one.path, one.undo, store, skip=one.under)
            _small_files(one, store)
            bad = [
                table
                for n, edit in enumerate(one.undo.edits)
                if n not in one.under
                for table in _not_finite(store, edit)
            ]
        except EmbedSurgeryError as error:
            yield Check(name, False, str(error))
            continue
        rows = sum(one.said.rows.values())
        detail = f"{count_rows(rows)} as written" if not one.under else f"partly under {one.overlaps}"
        yield Check(name, not bad, f"NaN or infinity in {', '.join(bad)}" if bad else detail)


def _small_files(one: Entry, store: Store) -> None:
    """Refuse small files that are not what the merge wrote."""
    for number, edit in enumerate(one.undo.edits):
        expected = edit.expected_file()
        if expected is not None and number not in one.under:
            path, before = expected
            found = digest(store.read_file(path))
            if found != before:
                raise PlanError(
                    "a file is not what the merge wrote",
                    where=path,
                    found=f"sha256 {found}"[:19],
                    expected=f"sha256 {before}"[:19],
                )


def _not_finite(store: Store, edit: Edit) -> Iterator[str]:
    """The tables of which rows that an edit sets hold NaN or infinity."""
    for name, indices in edit.sets().items():
        table = store.graph.find(name)
        if table is not None and indices is not None:
            rows = rows_of(store, table, tuple(indices))
            if not np.isfinite(rows.float32()).all():
                yield name


def _hashes(folder: Path) -> Iterator[Check]:
    try:
        known = known_hashes(folder)
    except EmbedSurgeryError as error:
        yield Check("hashes", False, str(error))
        known = {}
    unknown = []
    files = checkpoint_files(folder)
    for path in sorted(known.keys() - set(files)):
        yield Check(path, False, f"not there; its hash is known from {known[path].source}")
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
        said = f"as {known[path].source} has it" if same else f"{known[path].source} has {known[path].sha256[:12]}"
        yield Check(path, same, f"sha256 {found[:12]}, {said}")
    if unknown:
        shown = ", ".join(unknown[:6]) + (f" and {len(unknown) - 6} more" if len(unknown) > 6 else "")
        yield Check("no hash known", True, f"{shown}: read, and compared with nothing (merge --hash records them)")

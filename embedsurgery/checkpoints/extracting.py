"""Extracts the embedding rows that full tuning changed as an adapter of trainable tokens.

Both checkpoints are compared block by block, without torch. The tuned model is a checkpoint, or a PEFT adapter that
saved whole embeddings (``modules_to_save``, ``save_embedding_layers``). ``tuned_tensors.py`` reads it and
``extracted_adapter.py`` builds the adapter.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from embedsurgery import hub
from embedsurgery.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter
from embedsurgery.checkpoints.extracted_adapter import build_adapter, find_new_tokens
from embedsurgery.checkpoints.tuned_tensors import TunedTensor, find_tensor, open_shard_store, read_tuned_tensors
from embedsurgery.errors import BaseMismatchError, CheckpointError, ConfigError, warn
from embedsurgery.files.json_reading import read_json
from embedsurgery.graph import Table
from embedsurgery.plan.blocks import spans
from embedsurgery.stores.shards import ShardStore
from embedsurgery.tensors.raw import EDITABLE, RawArray
from embedsurgery.tokenizer.reading import read_token_texts


@dataclass(frozen=True)
class Extraction:
    """What `extract_checkpoint` found in a tuned model.

    Attributes:
        adapter: The changed rows; None if nothing changed.
        rows: Table -> number of changed rows, new ones included.
        grown: Table -> number of rows that the base does not have.
        tokens: Id -> text of the changed rows' tokens, if there is a tokenizer.
        left: Names of other tensors that differ from the base's or are not in it; they are not in the adapter.
        bytes: Size of the tuned tables.
    """

    adapter: Adapter | None
    rows: Mapping[str, int]
    grown: Mapping[str, int]
    tokens: Mapping[int, str]
    left: tuple[str, ...]
    bytes: int


def extract_checkpoint(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    *,
    threshold: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> Extraction:
    """Extract the rows of a model's embedding tables that tuning changed, as an adapter.

    Merging the adapter into BASE gives TUNED's tables bit for bit, if the threshold is zero and the dtypes are equal.

    Args:
        base: Checkpoint directory or Hub id of the model that was tuned.
        tuned: Checkpoint directory, directory of a PEFT adapter with whole embeddings, or the Hub id of either.
        threshold: A row counts as changed if one of its elements differs by more than this. Zero: by any bit.
        progress: Called with the bytes read so far and the bytes to read.

    Raises:
        ConfigError: ``threshold`` is negative or not finite.
        CheckpointError: Files are missing or broken, or TUNED has no table of BASE.
        BaseMismatchError: A table has another width or fewer rows, or tuning untied it.
        HubError: A model cannot be read from the Hub.
    """
    if not isinstance(threshold, (int, float)) or not 0 <= threshold < float("inf"):
        raise ConfigError("threshold must be finite and not negative", expected=">= 0", found=repr(threshold))
    remote = hub.find_id(base)
    pinned = None if remote is None else hub.pin_revision(remote)
    with (
        hub.directory(base if pinned is None else str(pinned)) as source,
        hub.directory(tuned, adapters=True) as target,
    ):
        extraction = _extract(source, target, threshold, progress)
    if pinned is None or extraction.adapter is None:
        return extraction
    manifest = replace(extraction.adapter.manifest, base_model=pinned.repo, revision=pinned.revision)
    return replace(extraction, adapter=replace(extraction.adapter, manifest=manifest))


def _extract(base: Path, tuned: Path, threshold: float, progress: Callable[[int, int], None] | None) -> Extraction:
    store = open_shard_store(base)
    tensors = read_tuned_tensors(tuned)
    pairs = _match_tables(store, tensors, tuned)
    total = sum(t.entry.end - t.entry.begin for t in pairs.values())
    changed: dict[str, tuple[int, ...]] = {}
    done = 0
    for name, tensor in pairs.items():
        table = store.graph.table(name)
        indices = []
        for rows, size in _find_changed_rows(store, table, tensor, threshold):
            indices += rows
            done += size
            if progress is not None:
                progress(done, total)
        changed[name] = tuple(indices)
        if indices:
            _refuse_half_tuned_tie(table, tensors, tuned)
    new = find_new_tokens(store, base, tuned, pairs)
    left = (*_changed_other_tensors(store, tensors, pairs), *_added_adapter_tensors(tuned, tensors, store))
    texts = {**(read_token_texts(base) or {}), **(read_token_texts(tuned) or {})}
    ids = sorted({i for rows in changed.values() for i in rows} | set(() if new is None else new.ids))
    adapter = build_adapter(store, base, tensors, pairs, changed, new, texts, threshold) if ids else None
    return Extraction(
        adapter,
        {name: len(rows) for name, rows in changed.items()},
        {name: max(0, t.entry.shape[0] - store.graph.table(name).shape[0]) for name, t in pairs.items()},
        {i: texts[i] for i in ids if i in texts},
        left,
        total,
    )


def _match_tables(store: ShardStore, tensors: Mapping[str, TunedTensor], tuned: Path) -> dict[str, TunedTensor]:
    """Match each table of the base with its tuned tensor; copies of a table that is tied in the base must be equal."""
    pairs = {}
    for table in (t for t in store.graph.tables if t.kind == "vocabulary"):
        found = [tensor for name in table.names if (tensor := find_tensor(name, tensors)) is not None]
        if not found:
            continue
        for other in found[1:]:
            if not found[0].equals(other):
                raise BaseMismatchError(
                    "tuning untied a table that is tied in the base",
                    where=other.entry.name,
                    expected=f"the rows of {found[0].entry.name}",
                    found="other rows",
                    hint="set tie_word_embeddings to false in the base, and store both tables",
                )
        _check_tuned_table(table, found[0])
        if found[0].entry.dtype != table.dtype:
            warn(
                f"{table.name} is {table.dtype} in the base and {found[0].entry.dtype} in the tuned model: "
                f"a merge rounds to {table.dtype}"
            )
        pairs[table.name] = found[0]
    if not pairs:
        raise CheckpointError(
            "the tuned model has no embedding table of the base",
            where=tuned,
            expected=" or ".join(t.name for t in store.graph.tables if t.kind == "vocabulary"),
            found=", ".join(list(tensors)[:4]) or "no tensor",
        )
    return pairs


def _check_tuned_table(table: Table, tensor: TunedTensor) -> None:
    """Refuse a tuned table of another width, with fewer rows, or of a dtype without plain numbers."""
    shape = tensor.entry.shape
    if len(shape) != 2 or shape[1] != table.shape[1] or shape[0] < table.shape[0]:
        raise BaseMismatchError(
            "the tuned table has another shape",
            where=tensor.entry.name,
            expected=f"({table.shape[0]} or more, {table.shape[1]})",
            found=list(shape),
            hint="was the model tuned from this base?",
        )
    if tensor.entry.dtype not in EDITABLE or table.dtype not in EDITABLE:
        raise BaseMismatchError(
            "rows of this dtype cannot be compared",
            where=tensor.entry.name,
            expected=" or ".join(EDITABLE),
            found=f"{tensor.entry.dtype}, in the base {table.dtype}",
        )


def _refuse_half_tuned_tie(table: Table, tensors: Mapping[str, TunedTensor], tuned: Path) -> None:
    """Refuse a tied table of which PEFT trained a copy at one end only.

    For ``modules_to_save=["embed_tokens"]`` on a tied model, PEFT trains a copy of the embedding and leaves the base's
    rows in the head. One table cannot hold both. ``ensure_weight_tying=True`` trains both ends.
    """
    config = read_json(tuned / CONFIG_NAME) if (tuned / CONFIG_NAME).exists() else {}
    saved = config.get("modules_to_save")
    saved = [name for name in saved if isinstance(name, str)] if isinstance(saved, list) else []
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in table.names))
    stored = [name for name in modules if find_tensor(f"{name}.weight", tensors) is not None]
    copied = [name for name in stored if any(name == one or name.endswith("." + one) for one in saved)]
    if copied and len(stored) < len(modules):
        raise BaseMismatchError(
            "PEFT trained a copy of a tied table at one end, and the other end kept the base's rows",
            where=tuned,
            expected=f"modules_to_save with {', '.join(modules)}",
            found=", ".join(saved),
            hint="train with ensure_weight_tying=True, or tune an untied base",
        )


def _find_changed_rows(
    store: ShardStore, table: Table, tensor: TunedTensor, threshold: float
) -> Iterator[tuple[list[int], int]]:
    """Yield for each block the indices of changed rows and the bytes read; at the end the rows beyond the base's."""
    name, rows = store.copies(table)[0], table.shape[0]
    pitch = (tensor.entry.end - tensor.entry.begin) // max(1, tensor.entry.shape[0])
    for start, stop in spans(rows, pitch):
        before, after = store.read_block(name, start, stop), tensor.read_block(start, stop)
        if before == after:
            yield [], len(after.data)
            continue
        if threshold == 0 and before.dtype == after.dtype:
            # Bits, not values: -0.0 equals 0.0 and a NaN equals nothing, but a merge must give the tuned bits.
            differ = (_bytes_by_row(before) != _bytes_by_row(after)).any(axis=1)
        else:
            old, new = (np.asarray(rows.to("F64").bits, np.float64) for rows in (before, after))
            with np.errstate(invalid="ignore"):
                # "not <=" instead of ">", so that a value that became NaN counts as changed.
                differ = (~(np.abs(new - old) <= threshold) & ~(np.isnan(old) & np.isnan(new))).any(axis=1)
        yield (np.flatnonzero(differ) + start).tolist(), len(after.data)
    yield list(range(rows, tensor.entry.shape[0])), (tensor.entry.shape[0] - rows) * pitch


def _bytes_by_row(rows: RawArray) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    return np.frombuffer(rows.data, np.uint8).reshape(rows.shape[0], -1)


def _changed_other_tensors(
    store: ShardStore, tensors: Mapping[str, TunedTensor], pairs: Mapping[str, TunedTensor]
) -> Iterator[str]:
    """Names of the base's other tensors that tuning changed."""
    used = {id(tensor) for tensor in pairs.values()}
    tables = {name for table in store.graph.tables for name in table.names}
    for name in store.tensor_names():
        tensor = find_tensor(name, tensors)
        if tensor is None or id(tensor) in used or name in tables:
            continue
        if not TunedTensor(store.checkpoint.path(name), store.checkpoint.entry(name)).equals(tensor):
            yield name


def _added_adapter_tensors(tuned: Path, tensors: Mapping[str, TunedTensor], store: ShardStore) -> Iterator[str]:
    """Names of a PEFT adapter's tensors that the base does not have: LoRA's matrices and the like."""
    if os.path.exists(tuned / WEIGHTS_NAME):
        names = list(store.tensor_names()) + [name for table in store.graph.tables for name in table.names]
        for name in tensors:
            if all(name != n and not n.endswith("." + name) and not name.endswith("." + n) for n in names):
                yield name

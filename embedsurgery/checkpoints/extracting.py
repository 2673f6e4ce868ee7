"""The rows that a fully tuned embedding changed become an adapter of trainable tokens.

Reads both checkpoints block by block, without torch. The tuned model is a checkpoint, or a PEFT adapter that saved
whole embeddings (``modules_to_save``, ``save_embedding_layers``).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from embedsurgery import hub
from embedsurgery._version import __version__
from embedsurgery.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter
from embedsurgery.adapters.carried_tokens import NewTokens, entries_name, evidence, filler_name
from embedsurgery.adapters.manifest import Fingerprint, Manifest, TableRecord
from embedsurgery.checkpoints.tuned_tensors import Tuned, alike, open_safetensors, tuned_tensors
from embedsurgery.errors import BaseMismatchError, CheckpointError, ConfigError, EmbedSurgeryWarning
from embedsurgery.files.json_reading import read_json
from embedsurgery.files.regular import open_regular, pread_exactly
from embedsurgery.graph import Table
from embedsurgery.plan import Token
from embedsurgery.plan.blocks import spans
from embedsurgery.plugins.current import registry
from embedsurgery.stores.shards import ShardStore
from embedsurgery.stores.store import rows_of
from embedsurgery.surgeries.trainable_tokens.peft_files import OTHERS
from embedsurgery.tensors.raw import EDITABLE, ITEMSIZE, RawArray
from embedsurgery.tokenizer.content import flags
from embedsurgery.tokenizer.patching import added_tokens, vocabulary
from embedsurgery.tokenizer.reading import token_texts


@dataclass(frozen=True)
class Extraction:
    """What was found in a tuned embedding.

    Attributes:
        adapter: The changed rows; None where nothing changed.
        rows: Table -> how many rows changed, grown ones included.
        grown: Table -> how many rows the base does not have.
        tokens: Id -> text of the changed rows' tokens, where a tokenizer says.
        left: What else differs, or lies beside the embedding, and is in no adapter of rows.
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
    """The rows of a model's embedding tables that tuning changed, as an adapter.

    Merged back into BASE, it gives TUNED's tables bit for bit where the threshold is zero and the dtypes are the same.

    Args:
        base: Checkpoint directory, or Hub id, that tuning began from.
        tuned: Checkpoint directory, or directory of a PEFT adapter that holds whole embeddings; or the id of one.
        threshold: A row counts as changed where one of its elements differs by more than this. Zero: by any bit.
        progress: Called with bytes read so far, and bytes to read.

    Raises:
        ConfigError: A negative threshold.
        CheckpointError: Files that are missing or broken, or no table in TUNED.
        BaseMismatchError: Tables of another width, fewer rows, or a tie that tuning parted.
        HubError: What an id names cannot be had.
    """
    if not isinstance(threshold, (int, float)) or not 0 <= threshold < float("inf"):
        raise ConfigError("the threshold is no distance", expected="zero or more", found=repr(threshold))
    remote = hub.find_id(base)
    pinned = None if remote is None else hub.pinned(remote)
    with (
        hub.directory(base if pinned is None else str(pinned)) as source,
        hub.directory(tuned, adapters=True) as target,
    ):
        found = _extracted(source, target, threshold, progress)
    if pinned is None or found.adapter is None:
        return found
    manifest = replace(found.adapter.manifest, base_model=pinned.repo, revision=pinned.revision)
    return replace(found, adapter=replace(found.adapter, manifest=manifest))


def _extracted(source: Path, target: Path, threshold: float, progress: Callable[[int, int], None] | None) -> Extraction:
    store = open_safetensors(source)
    tensors = tuned_tensors(target)
    pairs = _pairs(store, tensors, target)
    total = sum(t.entry.end - t.entry.begin for t in pairs.values())
    changed: dict[str, tuple[int, ...]] = {}
    done = 0
    for name, part in pairs.items():
        found = []
        for rows, size in _changed(store, store.graph.table(name), part, threshold):
            found += rows
            done += size
            if progress is not None:
                progress(done, total)
        changed[name] = tuple(found)
        if found:
            _refuse_one_end(store.graph.table(name), tensors, target)
    new = _new_tokens(store, source, target, pairs)
    left = (*_left(store, tensors, pairs), *_strangers(target, tensors, store))
    texts = {**(token_texts(source) or {}), **(token_texts(target) or {})}
    ids = sorted({i for rows in changed.values() for i in rows} | set(() if new is None else new.ids))
    adapter = _adapter(store, source, tensors, pairs, changed, new, texts, threshold) if ids else None
    return Extraction(
        adapter,
        {name: len(rows) for name, rows in changed.items()},
        {name: max(0, p.entry.shape[0] - store.graph.table(name).shape[0]) for name, p in pairs.items()},
        {i: texts[i] for i in ids if i in texts},
        tuple(left),
        total,
    )


def _pairs(store: ShardStore, tensors: Mapping[str, Tuned], tuned: Path) -> dict[str, Tuned]:
    """Base table's name -> the tuned tensor. Copies of a table that is tied in the base must be one."""
    pairs = {}
    for table in (t for t in store.graph.tables if t.kind == "vocabulary"):
        found = [known for name in table.names if (known := alike(name, tensors)) is not None]
        for other in found[1:]:
            if not found[0].same(other):
                raise BaseMismatchError(
                    "tuning parted a table that is tied in the base",
                    where=other.entry.name,
                    expected=f"the rows of {found[0].entry.name}",
                    found="others",
                    hint="set tie_word_embeddings to false in the base, and store both",
                )
        if not found:
            continue
        shape = found[0].entry.shape
        if len(shape) != 2 or shape[1] != table.shape[1] or shape[0] < table.shape[0]:
            raise BaseMismatchError(
                "a tuned table of another shape",
                where=found[0].entry.name,
                expected=f"({table.shape[0]} or more, {table.shape[1]})",
                found=list(shape),
                hint="is this the base that tuning began from?",
            )
        if found[0].entry.dtype not in EDITABLE or table.dtype not in EDITABLE:
            raise BaseMismatchError(
                "a table whose rows are no plain numbers",
                where=found[0].entry.name,
                expected=" or ".join(EDITABLE),
                found=f"{found[0].entry.dtype}, in the base {table.dtype}",
            )
        if found[0].entry.dtype != table.dtype:
            warnings.warn(
                f"{table.name} is {table.dtype} in the base and {found[0].entry.dtype} where it was tuned: "
                "merging rounds to the base's",
                EmbedSurgeryWarning,
                stacklevel=3,
            )
        pairs[table.name] = found[0]
    if not pairs:
        raise CheckpointError(
            "no embedding table of the base is in the tuned model",
            where=tuned,
            expected=" or ".join(t.name for t in store.graph.tables if t.kind == "vocabulary"),
            found=", ".join(list(tensors)[:4]) or "no tensor",
        )
    return pairs


def _refuse_one_end(table: Table, tensors: Mapping[str, Tuned], tuned: Path) -> None:
    """Refuse a tied table of which PEFT trained a copy at one end: the other end kept the base's rows."""
    config = read_json(tuned / CONFIG_NAME) if (tuned / CONFIG_NAME).exists() else {}
    saved = config.get("modules_to_save")
    saved = [name for name in saved if isinstance(name, str)] if isinstance(saved, list) else []
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in table.names))
    stored = [name for name in modules if alike(f"{name}.weight", tensors) is not None]
    copied = [name for name in stored if any(name == one or name.endswith("." + one) for one in saved)]
    if copied and len(stored) < len(modules):
        raise BaseMismatchError(
            "tuning parted a table that is tied in the base: PEFT trained a copy at one end, the other kept its rows",
            where=tuned,
            expected=f"modules_to_save with {', '.join(modules)}",
            found=", ".join(saved),
            hint="train with ensure_weight_tying=True, or on a base that is not tied",
        )


def _changed(store: ShardStore, table: Table, part: Tuned, threshold: float) -> Iterator[tuple[list[int], int]]:
    """For each block the rows that differ, grown ones included, and the bytes that were read."""
    name, rows = store.copies(table)[0], table.shape[0]
    pitch = (part.entry.end - part.entry.begin) // max(1, part.entry.shape[0])
    for start, stop in spans(rows, pitch):
        before, after = store.read_block(name, start, stop), part.block(start, stop)
        if before == after:
            yield [], len(after.data)
            continue
        if threshold == 0 and before.dtype == after.dtype:
            differ = (_bytes(before) != _bytes(after)).any(axis=1)
        else:
            old, new = (np.asarray(rows.to("F64").bits, np.float64) for rows in (before, after))
            with np.errstate(invalid="ignore"):
                differ = (~(np.abs(new - old) <= threshold) & ~(np.isnan(old) & np.isnan(new))).any(axis=1)
        yield (np.flatnonzero(differ) + start).tolist(), len(after.data)
    yield list(range(rows, part.entry.shape[0])), (part.entry.shape[0] - rows) * pitch


def _bytes(rows: RawArray) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    return np.frombuffer(rows.data, np.uint8).reshape(rows.shape[0], -1)


def _new_tokens(store: ShardStore, base: Path, tuned: Path, pairs: Mapping[str, Tuned]) -> NewTokens | None:
    """The tokens that the tuned model's tokenizer has and the base's has not."""
    main = store.graph.main_input()
    whole = store.graph.vocabulary_of(main)
    parts = [pairs[name] for name in whole.tables if name in pairs]
    grown = max((p.entry.shape[0] for p in parts), default=whole.size)
    tokens: tuple[Token, ...] = ()
    before = token_texts(base)
    if before is not None and token_texts(tuned) is not None:
        found = (t for t in added_tokens(tuned) if before.get(t.id) != t.content and t.id < grown)
        tokens = tuple(replace(t, replaces=before.get(t.id)) for t in found)
        _warn_of_flags(tuned, tokens)
    if grown > whole.size:
        if len(parts) != len(whole.tables) or any(p.entry.shape[0] != grown for p in parts):
            raise BaseMismatchError(
                "not all tables of the vocabulary grew",
                where=tuned,
                expected=f"{grown} rows in {', '.join(whole.tables)}",
                found=", ".join(f"{p.entry.name} {p.entry.shape[0]}" for p in parts),
            )
        if not tokens:
            warnings.warn(
                f"{tuned} has rows that the base lacks, and no tokenizer that names them: the adapter brings "
                "rows and no tokens",
                EmbedSurgeryWarning,
                stacklevel=3,
            )
    if not tokens and grown == whole.size:
        return None
    return NewTokens(tuple(sorted(tokens, key=lambda t: t.id)), whole.size, grown, whole.vectors)


def _warn_of_flags(tuned: Path, tokens: tuple[Token, ...]) -> None:
    """Say which tokens the tuned tokenizer matches in a way of their own, which an adapter does not carry."""
    known = vocabulary(tuned)
    odd = [t.content for t in tokens if {**(known.entry(t.content) or {}), "id": t.id} != {"id": t.id, **flags(t)}]
    if odd:
        warnings.warn(
            f"{tuned} matches {', '.join(map(repr, odd[:8]))} in a way of their own (lstrip, rstrip, "
            "single_word, normalized): the adapter brings them as add_tokens would",
            EmbedSurgeryWarning,
            stacklevel=4,
        )


def _left(store: ShardStore, tensors: Mapping[str, Tuned], pairs: Mapping[str, Tuned]) -> Iterator[str]:
    """Other tensors of the base that were changed too, and are in no adapter of rows."""
    used = {id(part) for part in pairs.values()}
    tables = {name for table in store.graph.tables for name in table.names}
    for name in store.tensor_names():
        part = alike(name, tensors)
        if part is None or id(part) in used or name in tables:
            continue
        if not Tuned(store.checkpoint.path(name), store.checkpoint.entry(name)).same(part):
            yield name


def _strangers(tuned: Path, tensors: Mapping[str, Tuned], store: ShardStore) -> Iterator[str]:
    """In a PEFT adapter what is no tensor of the base: LoRA's matrices and the like."""
    if os.path.exists(tuned / WEIGHTS_NAME):
        names = list(store.tensor_names()) + [name for table in store.graph.tables for name in table.names]
        for name in tensors:
            if all(name != n and not n.endswith("." + name) and not name.endswith("." + n) for n in names):
                yield name


def _adapter(
    store: ShardStore,
    base: Path,
    tensors: Mapping[str, Tuned],
    pairs: Mapping[str, Tuned],
    changed: Mapping[str, tuple[int, ...]],
    new: NewTokens | None,
    texts: Mapping[int, str],
    threshold: float,
) -> Adapter:
    records, raw = [], {}
    ids = () if new is None else new.ids
    union = sorted({i for rows in changed.values() for i in rows} | set(ids))
    for name, part in pairs.items():
        table = store.graph.table(name)
        indices = changed[name] or tuple(i for i in ids)
        if not indices:
            continue
        wide = "F64" if table.dtype == "F64" else "F32"
        raw[name] = part.rows(indices).to(wide)
        others = [i for i in union if i not in set(indices)]
        if others:
            raw[name + OTHERS] = _untrained(store, table, part, others, ids).to(wide)
        if new is not None:
            raw[filler_name(name)] = part.rows((part.entry.shape[0] - 1,))
        sampled = evidence(indices, new, table.shape[0]) if new is not None else ()
        projections = [t for t in store.graph.tables if "output" in t.roles and t.shape[0] == table.shape[0]]
        records.append(
            TableRecord(
                name=name,
                aliases=table.aliases,
                indices=indices,
                shape=(part.entry.shape[0], table.shape[1]),
                dtype=table.dtype,
                tied="output" in table.roles if projections and "input" in table.roles else None,
                fingerprint=Fingerprint.of(rows_of(store, table, sampled or indices)),
                disk_names=tuple(n for n, _ in table.files),
                sampled=sampled,
            )
        )
    if new is not None:
        raw.update(_entries(store, tensors, new))
    manifest = Manifest(
        "trainable_tokens",
        1,
        {"extracted": True, "threshold": threshold},
        tuple(records),
        str(base),
        None,
        {i: texts[i] for i in union if i in texts},
        __version__,
        new,
    )
    return Adapter(manifest, raw, registry().named("trainable_tokens").surgery)


def _untrained(store: ShardStore, table: Table, part: Tuned, indices: Sequence[int], new: Collection[int]) -> RawArray:
    """Rows that another table's indices name: new ones as tuned, others as the base has them, below the threshold."""
    rows = part.rows(indices)
    kept = [n for n, index in enumerate(indices) if index < table.shape[0] and index not in new]
    values = rows_of(store, table, tuple(indices[n] for n in kept)).to(rows.dtype)
    pitch = len(rows.data) // len(indices)
    data = bytearray(rows.data)
    for place, n in enumerate(kept):
        data[n * pitch : (n + 1) * pitch] = values.data[place * pitch : (place + 1) * pitch]
    return RawArray(rows.dtype, rows.shape, bytes(data))


def _entries(store: ShardStore, tensors: Mapping[str, Tuned], new: NewTokens) -> dict[str, RawArray]:
    """A vector's entries for the new tokens, and the last one as filler.

    Where the tuned model does not say, the base's own, and zeros for rows that it lacks.
    """
    raw = {}
    for name in new.vectors:
        part = alike(name, tensors)
        if part is None or part.entry.shape[-1] != new.grown:
            own = store.read_vector(name)
            padded = RawArray(own.dtype, (new.grown,), own.data + bytes(ITEMSIZE[own.dtype] * (new.grown - new.rows)))
            raw[entries_name(name)] = padded.take([*new.ids, new.grown - 1])
            continue
        with open_regular(part.path) as descriptor:
            data = pread_exactly(descriptor, part.entry.end - part.entry.begin, part.entry.begin)
        vector = RawArray(part.entry.dtype, (new.grown,), data)
        raw[entries_name(name)] = vector.take([*new.ids, new.grown - 1])
    return raw

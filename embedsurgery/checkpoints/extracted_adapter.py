"""Builds the adapter of an extraction: its new tokens, its rows, and what both need to be merged.

``extracting.py`` finds the changed rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from embedsurgery._version import __version__
from embedsurgery.adapters.adapter import Adapter
from embedsurgery.adapters.carried_tokens import NewTokens, choose_evidence, entries_name, filler_name
from embedsurgery.adapters.manifest import Fingerprint, Manifest, TableRecord
from embedsurgery.checkpoints.tuned_tensors import TunedTensor, find_tensor
from embedsurgery.errors import BaseMismatchError, warn
from embedsurgery.files.regular import open_regular, pread_exactly
from embedsurgery.graph import Table
from embedsurgery.plan import Token
from embedsurgery.plugins.current import registry
from embedsurgery.stores.shards import ShardStore
from embedsurgery.stores.store import rows_of
from embedsurgery.surgeries.trainable_tokens.peft_files import OTHERS
from embedsurgery.tensors.raw import ITEMSIZE, RawArray
from embedsurgery.tokenizer.content import added_token_fields
from embedsurgery.tokenizer.patching import read_added_tokens, read_vocabulary
from embedsurgery.tokenizer.reading import read_token_texts


def find_new_tokens(store: ShardStore, base: Path, tuned: Path, pairs: Mapping[str, TunedTensor]) -> NewTokens | None:
    """Find the tokens that the tuned model's tokenizer has and the base's does not.

    Args:
        store: The base.
        base: Its directory.
        tuned: The tuned model's directory.
        pairs: Table of the base -> tuned tensor.

    Returns:
        None if there are no new tokens and no new rows.

    Raises:
        BaseMismatchError: Only some tables of the vocabulary grew.
    """
    main = store.graph.main_input()
    whole = store.graph.vocabulary_of(main)
    parts = [pairs[name] for name in whole.tables if name in pairs]
    grown = max((p.entry.shape[0] for p in parts), default=whole.size)
    tokens: tuple[Token, ...] = ()
    before = read_token_texts(base)
    if before is not None and read_token_texts(tuned) is not None:
        found = (t for t in read_added_tokens(tuned) if before.get(t.id) != t.content and t.id < grown)
        tokens = tuple(replace(t, replaces=before.get(t.id)) for t in found)
        _warn_matching_options(tuned, tokens)
    if grown > whole.size:
        if len(parts) != len(whole.tables) or any(p.entry.shape[0] != grown for p in parts):
            raise BaseMismatchError(
                "only some tables of the vocabulary grew",
                where=tuned,
                expected=f"{grown} rows in {', '.join(whole.tables)}",
                found=", ".join(f"{p.entry.name} {p.entry.shape[0]}" for p in parts),
            )
        if not tokens:
            warn(
                f"{tuned} has more rows than the base but no tokenizer that names their tokens: the adapter adds rows "
                "and no tokens"
            )
    if not tokens and grown == whole.size:
        return None
    return NewTokens(tuple(sorted(tokens, key=lambda t: t.id)), whole.size, grown, whole.vectors)


def _warn_matching_options(tuned: Path, tokens: tuple[Token, ...]) -> None:
    """Warn about tokens that the tuned tokenizer matches with options that an adapter does not store."""
    known = read_vocabulary(tuned)
    odd = [
        t.content
        for t in tokens
        if {**(known.entry(t.content) or {}), "id": t.id} != {"id": t.id, **added_token_fields(t)}
    ]
    if odd:
        warn(
            f"{tuned}: an adapter does not store the options (lstrip, rstrip, single_word, normalized) of "
            f"{', '.join(map(repr, odd[:8]))}; a merge adds them with the defaults of add_tokens"
        )


def build_adapter(
    store: ShardStore,
    base: Path,
    tensors: Mapping[str, TunedTensor],
    pairs: Mapping[str, TunedTensor],
    changed: Mapping[str, tuple[int, ...]],
    new: NewTokens | None,
    texts: Mapping[int, str],
    threshold: float,
) -> Adapter:
    """Build an adapter of trainable tokens from the changed rows.

    Args:
        store: The base.
        base: Its name in the manifest.
        tensors: All tensors of the tuned model.
        pairs: Table of the base -> tuned tensor.
        changed: Table -> indices of the changed rows.
        new: New tokens and rows, if any.
        texts: Id -> text of tokens.
        threshold: For the manifest.
    """
    records, raw = [], {}
    ids = () if new is None else new.ids
    union = sorted({i for rows in changed.values() for i in rows} | set(ids))
    for name, tensor in pairs.items():
        table = store.graph.table(name)
        indices = changed[name] or tuple(ids)  # new tokens on spare rows that tuning left alone are carried too
        if not indices:
            continue
        wide = "F64" if table.dtype == "F64" else "F32"
        raw[name] = tensor.read_rows(indices).to(wide)
        # PEFT's file has one list of indices for all tables, so it needs rows of this table that others changed.
        others = [i for i in union if i not in set(indices)]
        if others:
            raw[name + OTHERS] = _unchanged_rows(store, table, tensor, others, ids).to(wide)
        if new is not None:
            raw[filler_name(name)] = tensor.read_rows((tensor.entry.shape[0] - 1,))
        records.append(_table_record(store, table, tensor, indices, new))
    if new is not None:
        raw.update(_vector_entries(store, tensors, new))
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
    return Adapter(manifest, raw, registry().find_surgery("trainable_tokens").surgery)


def _table_record(
    store: ShardStore, table: Table, tensor: TunedTensor, indices: tuple[int, ...], new: NewTokens | None
) -> TableRecord:
    sampled = choose_evidence(indices, new, table.shape[0]) if new is not None else ()
    projections = [t for t in store.graph.tables if "output" in t.roles and t.shape[0] == table.shape[0]]
    return TableRecord(
        name=table.name,
        aliases=table.aliases,
        indices=indices,
        shape=(tensor.entry.shape[0], table.shape[1]),
        dtype=table.dtype,
        tied="output" in table.roles if projections and "input" in table.roles else None,
        fingerprint=Fingerprint.of(rows_of(store, table, sampled or indices)),
        disk_names=tuple(n for n, _ in table.files),
        sampled=sampled,
    )


def _unchanged_rows(
    store: ShardStore, table: Table, tensor: TunedTensor, indices: Sequence[int], new: Collection[int]
) -> RawArray:
    """Rows of a table that only other tables changed: new ones as tuned, the others as in the base.

    With a threshold the tuned rows differ a little from the base's. The base's are what a merge leaves there.
    """
    rows = tensor.read_rows(indices)
    kept = [n for n, index in enumerate(indices) if index < table.shape[0] and index not in new]
    values = rows_of(store, table, tuple(indices[n] for n in kept)).to(rows.dtype)
    pitch = len(rows.data) // len(indices)
    data = bytearray(rows.data)
    for place, n in enumerate(kept):
        data[n * pitch : (n + 1) * pitch] = values.data[place * pitch : (place + 1) * pitch]
    return RawArray(rows.dtype, rows.shape, bytes(data))


def _vector_entries(store: ShardStore, tensors: Mapping[str, TunedTensor], new: NewTokens) -> dict[str, RawArray]:
    """Entries of per-token vectors for the new tokens, followed by the last entry as the filler.

    If the tuned model does not store a vector, the base's entries are used, with zeros for rows that it lacks.
    """
    raw = {}
    for name in new.vectors:
        tensor = find_tensor(name, tensors)
        if tensor is None or tensor.entry.shape[-1] != new.grown:
            own = store.read_vector(name)
            padded = RawArray(own.dtype, (new.grown,), own.data + bytes(ITEMSIZE[own.dtype] * (new.grown - new.rows)))
            raw[entries_name(name)] = padded.take([*new.ids, new.grown - 1])
            continue
        with open_regular(tensor.path) as descriptor:
            data = pread_exactly(descriptor, tensor.entry.end - tensor.entry.begin, tensor.entry.begin)
        vector = RawArray(tensor.entry.dtype, (new.grown,), data)
        raw[entries_name(name)] = vector.take([*new.ids, new.grown - 1])
    return raw

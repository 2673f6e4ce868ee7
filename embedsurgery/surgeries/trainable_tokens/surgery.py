"""Trainable tokens: a few rows of an embedding table are trained, and everything else stays frozen.

An adapter holds the rows' values, as PEFT's files do, and no differences: those would give other rows on a base whose
rows were initialised differently. https://huggingface.co/docs/peft/package_reference/trainable_tokens

The config is in ``config.py``, PEFT's file format in ``peft_files.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from embedsurgery._version import __version__
from embedsurgery.adapters.adapter import Adapter, PeftFiles
from embedsurgery.adapters.carried_tokens import (
    NewTokens,
    choose_evidence,
    combine_new_tokens,
    entries_name,
    filler_name,
)
from embedsurgery.adapters.manifest import Fingerprint, Manifest, TableRecord
from embedsurgery.errors import TokenIndexError, warn
from embedsurgery.graph import EmbeddingGraph, Table
from embedsurgery.plan import Plan, SetRows
from embedsurgery.stores.store import Store, rows_of, shorten
from embedsurgery.surgeries.scales import table_scale
from embedsurgery.surgeries.surgery import Base, RowOverride, Surgery
from embedsurgery.surgeries.trainable_tokens.config import TrainableTokensConfig, resolve_targets
from embedsurgery.surgeries.trainable_tokens.peft_files import (
    OTHERS,
    PEFT_TYPE,
    carried_rows,
    tokens_from_files,
    tokens_from_peft,
    tokens_to_peft,
)
from embedsurgery.tensors.raw import RawArray

__all__ = ["PEFT_TYPE", "TrainableTokens", "TrainableTokensConfig"]


class TrainableTokens(Surgery):
    """Trains rows of tables. Each table has its own (K, D) tensor, which its aliases share."""

    name = "trainable_tokens"

    def start(self, config: TrainableTokensConfig, store: Store, base: Base) -> Adapter:
        """Return an adapter with the current rows (or random ones) of every targeted table.

        Raises:
            TableError: No table fits ``target_modules``.
            TokenIndexError: A table lacks an index.
            UnsupportedError: A table is quantised.
        """
        config = _add_new_tokens(config, base)
        new = config.new_tokens
        targets = [(table, indices, True) for table, indices in resolve_targets(config, store.graph)]
        if new is not None:
            carried = _find_carried_tables(new, [table for table, _, _ in targets], store.graph)
            targets += [(table, new.ids, False) for table in carried]
        union = tuple(sorted({i for _, indices, _ in targets for i in indices} | set(new.ids if new else ())))
        records, raw = [], {}
        for table, indices, is_trained in targets:
            _check_range(indices, table)
            store.check_editable(table)
            original = rows_of(store, table, indices)
            rows = original if original.dtype == "F64" else original.to("F32")
            if not config.init_weights and is_trained:
                rows = _draw_random_rows(store, table, len(indices), rows.dtype)
            raw[table.name] = rows
            others = tuple(i for i in union if i not in set(indices))
            if others and others[-1] < table.shape[0]:
                raw[table.name + OTHERS] = rows_of(store, table, others).to(rows.dtype)
            records.append(_make_record(store, table, indices, new, is_trained, original))
        if new is not None:
            raw.update(_read_vocabulary_tensors(new, store))
        manifest = Manifest(
            self.name,
            self.version,
            config.to_json(),
            tuple(records),
            base.name,
            base.revision,
            _token_texts(records, base, new),
            __version__,
            new,
        )
        return Adapter(manifest, raw, self)

    def live(self, adapter: Adapter, located: Mapping[str, Table]) -> tuple[RowOverride, ...]:
        """Return one override for each table whose rows are trained."""
        return tuple(
            RowOverride(located[record.name].name, record.name, record.indices)
            for record in adapter.manifest.tables
            if record.trained
        )

    def plan(self, adapter: Adapter, located: Mapping[str, Table]) -> Plan:
        """Set each table's rows to the adapter's, and those of its new tokens that are not trained, too."""
        edits = []
        for record in adapter.manifest.tables:
            name = located[record.name].name
            edits.append(SetRows(name, record.indices, adapter.raw[record.name]))
            ids, rows = carried_rows(adapter, record)
            if ids:
                edits.append(SetRows(name, ids, rows))
        return Plan(tuple(edits))

    def to_peft(self, adapter: Adapter) -> PeftFiles:
        return tokens_to_peft(adapter)

    def from_files(self, files: PeftFiles, adapter: Adapter) -> Adapter:
        return tokens_from_files(files, adapter)

    def from_peft(self, files: PeftFiles) -> Adapter:
        return tokens_from_peft(files, self)


def _make_record(
    store: Store, table: Table, indices: tuple[int, ...], new: NewTokens | None, is_trained: bool, original: RawArray
) -> TableRecord:
    """Return the record of a table whose rows at the indices are ``original``, (K, D)."""
    # Rows of new tokens are no evidence of a base that has yet to get these tokens.
    sampled = choose_evidence(indices, new, new.rows) if new is not None else ()
    projections = [t for t in store.graph.tables if "output" in t.roles and t.shape[0] == table.shape[0]]
    return TableRecord(
        name=table.name,
        aliases=table.aliases,
        indices=indices,
        shape=table.shape,
        dtype=table.dtype,
        tied="output" in table.roles if projections and "input" in table.roles else None,
        fingerprint=Fingerprint.of(rows_of(store, table, sampled) if sampled else original),
        sampled=sampled,
        trained=is_trained,
    )


def _token_texts(records: Sequence[TableRecord], base: Base, new: NewTokens | None) -> dict[int, str]:
    """Return id -> text of the rows' tokens, as far as they are known."""
    used = sorted({i for record in records for i in record.indices})
    texts = base.tokenizer.convert_ids_to_tokens(used) if base.tokenizer is not None else []
    tokens = {i: text for i, text in zip(used, texts, strict=False) if isinstance(text, str)}
    return tokens if new is None else tokens | {token.id: token.content for token in new.tokens}


def _add_new_tokens(config: TrainableTokensConfig, base: Base) -> TrainableTokensConfig:
    """Return the config with the tokens that `add_tokens` added to this model, if its indices include some of them."""
    indices = config.token_indices
    lists = indices.values() if isinstance(indices, dict) else [indices]
    new = (
        None
        if config.new_tokens is not None
        else combine_new_tokens(base.new_tokens, {i for part in lists for i in part})
    )
    return config if new is None else replace(config, new_tokens=new)


def _find_carried_tables(new: NewTokens, targets: list[Table], graph: EmbeddingGraph) -> list[Table]:
    """Return the untrained tables in which new tokens have rows. An adapter carries the rows of all tables."""
    table = graph.main_input()
    if table.shape[0] < new.grown:
        raise TokenIndexError(
            "the model does not have the new tokens' rows",
            where=table.name,
            expected=f"{new.grown} rows",
            found=table.shape[0],
            hint="attach to the model that add_tokens was called with",
        )
    names = graph.vocabulary_of(table).tables
    return [graph.table(name) for name in names if all(name != target.name for target in targets)]


def _read_vocabulary_tensors(new: NewTokens, store: Store) -> dict[str, RawArray]:
    """Return the tensors of an extended vocabulary beside its rows, under `filler_name` and `entries_name`."""
    vocabulary = store.graph.vocabulary_of(store.graph.main_input())
    filler = next((i for i in range(new.rows, new.grown) if i not in set(new.ids)), new.ids[0])
    raw = {filler_name(n): rows_of(store, store.graph.table(n), (filler,)) for n in vocabulary.tables}
    for name in new.vectors:
        raw[entries_name(name)] = store.read_vector(name).take([*new.ids, filler])
    return raw


def _check_range(indices: tuple[int, ...], table: Table) -> None:
    rows = table.shape[0]
    beyond = [i for i in indices if i >= rows]
    if beyond:
        raise TokenIndexError(
            "token_indices are out of range",
            where=table.name,
            expected=f"0 to {rows - 1}",
            found=shorten(beyond),
            hint="add the tokens to the model first",
        )
    if len(indices) > rows // 2:
        warn(
            f"{len(indices)} of {rows} rows of {table.name} will be trained: past half of the vocabulary, "
            "train the whole embedding instead"
        )


def _draw_random_rows(store: Store, table: Table, count: int, dtype: str) -> RawArray:
    """Return normally distributed rows with the table's standard deviation, from torch's global generator."""
    import torch  # only these rows need it

    warn(
        f"init_weights=False: {count} rows of {table.name} start at random, and the model "
        "loses what it knows of these tokens"
    )
    values = torch.randn(count, table.shape[1], dtype=torch.float32).numpy() * np.float32(table_scale(store, table))
    return RawArray.of(values).to(dtype)

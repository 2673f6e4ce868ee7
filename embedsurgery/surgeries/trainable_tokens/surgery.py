"""Trainable tokens: a few rows of an embedding table are trained, everything else stays frozen.

The rows are absolute values, as PEFT stores them, not differences: on a base whose rows were initialised otherwise a
difference would mean something else. https://huggingface.co/docs/peft/package_reference/trainable_tokens
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from embedsurgery._version import __version__
from embedsurgery.adapters.adapter import Adapter, PeftFiles
from embedsurgery.adapters.carried_tokens import NewTokens, entries_name, evidence, filler_name, together
from embedsurgery.adapters.manifest import Fingerprint, Manifest, TableRecord
from embedsurgery.errors import EmbedSurgeryWarning, TokenIndexError
from embedsurgery.graph import EmbeddingGraph, Table
from embedsurgery.plan import Plan, SetRows
from embedsurgery.stores.store import Store, rows_of, shorten
from embedsurgery.surgeries.scales import table_scale
from embedsurgery.surgeries.surgery import Base, RowOverride, Surgery
from embedsurgery.surgeries.trainable_tokens.config import TrainableTokensConfig, resolve
from embedsurgery.surgeries.trainable_tokens.peft_files import (
    OTHERS,
    PEFT_TYPE,
    carried,
    from_files,
    from_peft,
    to_peft,
)
from embedsurgery.tensors.raw import RawArray

__all__ = ["PEFT_TYPE", "TrainableTokens", "TrainableTokensConfig"]


class TrainableTokens(Surgery):
    """Rows of tables, each table with its own (K, D) tensor; aliases of a table share it."""

    name = "trainable_tokens"

    def start(self, config: TrainableTokensConfig, store: Store, base: Base) -> Adapter:
        """The current rows (or random ones) of every targeted table.

        Raises:
            TableError: Nothing fits ``target_modules``.
            TokenIndexError: An index that a table does not have.
            UnsupportedError: A table whose rows are no plain numbers.
        """
        config = _knowing(config, base)
        new = config.new_tokens
        targets = [(table, indices, True) for table, indices in resolve(config, store.graph)]
        if new is not None:
            targets += [(table, new.ids, False) for table in _beside(new, [t for t, _, _ in targets], store.graph)]
        union = tuple(sorted({i for _, indices, _ in targets for i in indices} | set(new.ids if new else ())))
        records, raw = [], {}
        for table, indices, is_trained in targets:
            _check_range(indices, table)
            store.check_editable(table)
            original = rows_of(store, table, indices)
            rows = original if original.dtype == "F64" else original.to("F32")
            if not config.init_weights and is_trained:
                rows = _random_rows(store, table, len(indices), rows.dtype)
            raw[table.name] = rows
            others = tuple(i for i in union if i not in set(indices))
            if others and others[-1] < table.shape[0]:
                raw[table.name + OTHERS] = rows_of(store, table, others).to(rows.dtype)
            sampled = evidence(indices, new, new.rows) if new is not None else ()
            projections = [t for t in store.graph.tables if "output" in t.roles and t.shape[0] == table.shape[0]]
            records.append(
                TableRecord(
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
            )
        if new is not None:
            raw.update(_padding(new, store))
        used = sorted({i for record in records for i in record.indices})
        texts = base.tokenizer.convert_ids_to_tokens(used) if base.tokenizer is not None else []
        tokens = {i: text for i, text in zip(used, texts, strict=False) if isinstance(text, str)}
        if new is not None:
            tokens |= {token.id: token.content for token in new.tokens}
        manifest = Manifest(
            self.name,
            self.version,
            config.to_json(),
            tuple(records),
            base.name,
            base.revision,
            tokens,
            __version__,
            new,
        )
        return Adapter(manifest, raw, self)

    def live(self, adapter: Adapter, located: Mapping[str, Table]) -> tuple[RowOverride, ...]:
        """One override a table whose rows are trained."""
        return tuple(
            RowOverride(located[record.name].name, record.name, record.indices)
            for record in adapter.manifest.tables
            if record.trained
        )

    def plan(self, adapter: Adapter, located: Mapping[str, Table]) -> Plan:
        """The rows of each table become the adapter's; those of its new tokens that are not trained as well."""
        edits = []
        for record in adapter.manifest.tables:
            name = located[record.name].name
            edits.append(SetRows(name, record.indices, adapter.raw[record.name]))
            ids, rows = carried(adapter, record)
            if ids:
                edits.append(SetRows(name, ids, rows))
        return Plan(tuple(edits))

    def to_peft(self, adapter: Adapter) -> PeftFiles:
        return to_peft(adapter)

    def from_files(self, files: PeftFiles, adapter: Adapter) -> Adapter:
        return from_files(files, adapter)

    def from_peft(self, files: PeftFiles) -> Adapter:
        return from_peft(files, self)


def _knowing(config: TrainableTokensConfig, base: Base) -> TrainableTokensConfig:
    """The config with the tokens that `add_tokens` gave this model, where plain numbers name some of them."""
    indices = config.token_indices
    lists = indices.values() if isinstance(indices, dict) else [indices]
    new = None if config.new_tokens is not None else together(base.new_tokens, {i for part in lists for i in part})
    return config if new is None else replace(config, new_tokens=new)


def _beside(new: NewTokens, targets: list[Table], graph: EmbeddingGraph) -> list[Table]:
    """The tables that new tokens have rows of, beside those that are trained: an adapter carries them all."""
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


def _padding(new: NewTokens, store: Store) -> dict[str, RawArray]:
    """What an adapter holds of a grown vocabulary beyond rows: see `vocabulary.filler_name` and `entries_name`."""
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
        warnings.warn(
            f"{len(indices)} of {rows} rows of {table.name} are to be trained: past half of the vocabulary, tuning "
            "the whole embedding is the better tool",
            EmbedSurgeryWarning,
            stacklevel=7,
        )


def _random_rows(store: Store, table: Table, count: int, dtype: str) -> RawArray:
    """Normal rows at the table's own scale, from torch's global generator."""
    import torch

    warnings.warn(
        f"init_weights=False: {count} rows of {table.name} start at random, so the model forgets these tokens",
        EmbedSurgeryWarning,
        stacklevel=7,
    )
    values = torch.randn(count, table.shape[1], dtype=torch.float32).numpy() * np.float32(table_scale(store, table))
    return RawArray.of(values).to(dtype)

"""Finds the tables that an adapter was made for, in another graph: by name, checked by content.

Names in memory and on disk differ, so a name is a hint and the rows decide; without rows to compare (PEFT's files)
the name must.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace

from embedsurgery.adapters.adapter import Adapter
from embedsurgery.adapters.manifest import MAIN_INPUT, TableRecord
from embedsurgery.errors import BaseMismatchError, EmbedSurgeryError, EmbedSurgeryWarning, TableError, TokenIndexError
from embedsurgery.graph import Table
from embedsurgery.graph.wrappers import plain_name
from embedsurgery.stores.store import Store, rows_of, shorten
from embedsurgery.tensors.raw import EDITABLE


def locate(adapter: Adapter, store: Store) -> Mapping[str, Table]:
    """For each table record's name, the table of the store that it means.

    Raises:
        BaseMismatchError: The rows are not those of the adapter's base, or are tied differently.
        TableError: No table, or more than one, fits.
        TokenIndexError: The store's table does not have the rows.
    """
    return {record.name: _locate(record, adapter, store) for record in adapter.manifest.tables}


def _locate(record: TableRecord, adapter: Adapter, store: Store) -> Table:
    new = adapter.manifest.new_tokens
    here = record if new is None else replace(record, indices=tuple(i for i in record.indices if i < new.rows))
    named = _by_name(record, store)
    fits = [table for table in store.graph.tables if _could_be(here, adapter, table)]
    if record.fingerprint is None:
        if named is None:
            raise store.graph.no_table(f"no table goes by the name {record.name!r}, and the file has no fingerprint")
        table = _check_shape(here, adapter, named)
        warnings.warn(
            f"{record.name}: this file does not say which base rows it was made from, so the base is not checked",
            EmbedSurgeryWarning,
            stacklevel=4,
        )
    elif named is not None and _same_rows(record, named, store):
        table = named
    elif named is not None:
        table = _check_shape(here, adapter, named)
        store.check_editable(table)
        raise BaseMismatchError(
            "the base's rows are not those that the adapter was made from",
            where=f"{store.name}: {named.name}, rows {shorten(list(record.evidence))}",
            expected=f"sha256 {record.fingerprint.sha256['F32'][:12]} as F32",
            found=rows_of(store, named, record.evidence).to("F32").sha256()[:12],
            hint="use the base named in the adapter's manifest, without this or another adapter merged into it",
        )
    else:
        same = [t for t in fits if _same_rows(record, t, store)]
        if len(same) != 1:
            error: type[EmbedSurgeryError] = TableError if len(same) > 1 else BaseMismatchError
            found = ", ".join(f"{t.name} {list(t.shape)} {t.dtype}" for t in same or store.graph.tables) or "no table"
            fit = "the rows of several tables" if same else "no table's rows"
            raise error(
                f"no table goes by the adapter's name, and {fit} are those it was made from",
                where=store.name,
                expected=f"{record.name} {list(record.shape or ())} {record.dtype}",
                found=found,
                hint="is this the base that the adapter was trained on?",
            )
        table = same[0]
    _check_tie(record, table, store)
    return table


def _by_name(record: TableRecord, store: Store) -> Table | None:
    """The table with one of the record's names; else the only one whose name ends or begins as they do.

    Prefixes come and go between a model and its base model ("bert.embeddings..." and "embeddings..."), and between
    versions ("language_model.model.embed_tokens" and "model.language_model.embed_tokens").
    """
    if record.name == MAIN_INPUT:
        return store.graph.main_input()
    for name in record.names:
        table = store.graph.find(name)
        if table is not None:
            return table
    for name in record.names:
        near = [t for t in store.graph.tables if any(_nested(name, other) for other in t.names)]
        if len(near) == 1:
            return near[0]
    if record.fingerprint is not None:
        return None
    leaf = ".".join(record.name.split(".")[-2:])
    alike = [t for t in store.graph.tables if any(n == leaf or n.endswith("." + leaf) for n in t.names)]
    return alike[0] if len(alike) == 1 else None


def _nested(a: str, b: str) -> bool:
    a, b = plain_name(a), plain_name(b)
    return a == b or a.endswith("." + b) or b.endswith("." + a)


def _could_be(record: TableRecord, adapter: Adapter, table: Table) -> bool:
    width = _width(record, adapter)
    rows = max((*record.indices, *record.sampled), default=0)
    return table.shape[1] == width and rows < table.shape[0] and table.dtype in EDITABLE


def _width(record: TableRecord, adapter: Adapter) -> int:
    """D of a record's table: that of its rows, or of all that an adapter has."""
    values = adapter.raw[record.name] if record.name in adapter.raw else next(iter(adapter.raw.values()))
    return values.shape[-1]


def _check_shape(record: TableRecord, adapter: Adapter, table: Table) -> Table:
    width = _width(record, adapter)
    if table.shape[1] != width:
        raise BaseMismatchError("the base has another width", where=table.name, expected=width, found=table.shape[1])
    beyond = [i for i in (*record.indices, *record.sampled) if i >= table.shape[0]]
    if beyond:
        raise TokenIndexError(
            "the base does not have the adapter's rows",
            where=table.name,
            expected=f"more than {max(beyond)} rows",
            found=table.shape[0],
            hint="extend the vocabulary as it was when the adapter was trained",
        )
    return table


def _same_rows(record: TableRecord, table: Table, store: Store) -> bool:
    assert record.fingerprint is not None
    if record.shape is not None and table.shape[1] != record.shape[1]:
        return False
    if max(record.evidence) >= table.shape[0] or table.dtype not in EDITABLE:
        return False
    return record.fingerprint.matches(rows_of(store, table, record.evidence))


def _check_tie(record: TableRecord, table: Table, store: Store) -> None:
    """A tied adapter on an untied base, or the other way round, would train one table and change another."""
    stored = store.tensor_names()
    strange = [alias for alias in record.aliases if alias in stored and store.graph.find(alias) is None]
    if strange:
        raise BaseMismatchError(
            "the adapter was made on tied tables, and here one end is stored under a name that tells nothing of a tie",
            where=store.name,
            expected=f"{table.name} alone",
            found=", ".join(strange),
            hint="save the model with the tie stored once, or merge in memory",
        )
    others = [store.graph.find(alias) for alias in record.aliases]
    parted = [t.name for t in others if t is not None and t is not table]
    heads = [t.name for t in store.graph.tables if "output" in t.roles and t.shape[0] == table.shape[0]]
    if record.tied and "output" not in table.roles and heads:
        parted = parted or heads
    if parted:
        raise BaseMismatchError(
            "the adapter was made on tied tables, and here they are apart",
            where=store.name,
            expected=f"{', '.join(parted)} tied to {table.name}",
            found="separate tables",
            hint="tie them, or train the adapter on this base",
        )
    if record.tied is False and "output" in table.roles and "input" in table.roles:
        raise BaseMismatchError(
            "the adapter was made on an untied table, and here it is tied",
            where=store.name,
            expected=f"{table.name} apart from the output head",
            found="one table",
            hint="untie them, or train the adapter on this base",
        )

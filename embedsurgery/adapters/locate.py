"""Finds the tables of an adapter in another base: by name, and checked by content.

The names of a table in memory and on disk differ, so a name is only a hint and the fingerprint decides. In files from
PEFT, which have no fingerprint, the name decides. ``manifest.py`` has the records and fingerprints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from embedsurgery.adapters.adapter import Adapter
from embedsurgery.adapters.manifest import MAIN_INPUT, TableRecord
from embedsurgery.errors import BaseMismatchError, EmbedSurgeryError, TableError, TokenIndexError, warn
from embedsurgery.graph import Table
from embedsurgery.graph.wrappers import plain_name
from embedsurgery.stores.store import Store, rows_of, shorten
from embedsurgery.tensors.raw import EDITABLE


def locate(adapter: Adapter, store: Store) -> Mapping[str, Table]:
    """Return name of each table record -> table of the store.

    Raises:
        BaseMismatchError: The rows are not those of the adapter's base, or are tied differently.
        TableError: No table fits, or more than one.
        TokenIndexError: The store's table does not have the rows.
    """
    return {record.name: _locate_table(record, adapter, store) for record in adapter.manifest.tables}


def _locate_table(record: TableRecord, adapter: Adapter, store: Store) -> Table:
    # Rows of the adapter's new tokens are not in the base yet, so their absence is not an error.
    new = adapter.manifest.new_tokens
    existing = record if new is None else replace(record, indices=tuple(i for i in record.indices if i < new.rows))
    named = _find_by_name(record, store)
    if record.fingerprint is None:
        if named is None:
            what = "the adapter's table is not found by name"
            raise store.graph.table_error(what, f"{record.name}, because the file has no fingerprint")
        table = _check_shape(existing, adapter, named)
        warn(f"{record.name}: this file has no fingerprint of the base's rows, so the base is not checked")
    elif named is not None and _has_same_rows(record, named, store):
        table = named
    elif named is not None:
        # Another shape or a quantised table is a more helpful error than hashes that differ.
        table = _check_shape(existing, adapter, named)
        store.check_editable(table)
        raise BaseMismatchError(
            "the base's rows are not those that the adapter was made from",
            where=f"{store.name}: {named.name}, rows {shorten(list(record.evidence))}",
            expected=f"sha256 {record.fingerprint.sha256['F32'][:12]} as F32",
            found=rows_of(store, named, record.evidence).to("F32").sha256()[:12],
            hint="use the base named in the adapter's manifest, without this or another adapter merged into it",
        )
    else:
        table = _find_by_rows(record, existing, adapter, store)
    _check_tie(record, table, store)
    return table


def _find_by_rows(record: TableRecord, existing: TableRecord, adapter: Adapter, store: Store) -> Table:
    """Return the only table whose rows have the record's fingerprint."""
    fits = [table for table in store.graph.tables if _could_fit(existing, adapter, table)]
    same = [table for table in fits if _has_same_rows(record, table, store)]
    if len(same) == 1:
        return same[0]
    error: type[EmbedSurgeryError] = TableError if same else BaseMismatchError
    raise error(
        f"no table has the adapter's name, and {'several tables have' if same else 'none has'} its original rows",
        where=store.name,
        expected=f"{record.name} {list(record.shape or ())} {record.dtype}",
        found=", ".join(f"{t.name} {list(t.shape)} {t.dtype}" for t in same or store.graph.tables) or "no table",
        hint="check that this is the base that the adapter was trained on",
    )


def _find_by_name(record: TableRecord, store: Store) -> Table | None:
    """Return the table with one of the record's names, else the only table with a similar name, None without one.

    A name is similar if one is the end of the other: a model's base class has no prefix ("bert.embeddings..." and
    "embeddings..."). Prefixes also change between versions ("language_model.model.embed_tokens" and
    "model.language_model.embed_tokens"): then the fingerprint finds the table or, in a file without one, the last two
    components of the name.
    """
    if record.name == MAIN_INPUT:
        return store.graph.main_input()
    for name in record.names:
        table = store.graph.find(name)
        if table is not None:
            return table
    for name in record.names:
        near = [t for t in store.graph.tables if any(_is_nested_name(name, other) for other in t.names)]
        if len(near) == 1:
            return near[0]
    if record.fingerprint is not None:
        return None
    end = ".".join(record.name.split(".")[-2:])
    similar = [t for t in store.graph.tables if any(n == end or n.endswith("." + end) for n in t.names)]
    return similar[0] if len(similar) == 1 else None


def _is_nested_name(a: str, b: str) -> bool:
    a, b = plain_name(a), plain_name(b)
    return a == b or a.endswith("." + b) or b.endswith("." + a)


def _could_fit(record: TableRecord, adapter: Adapter, table: Table) -> bool:
    width = _width_of(record, adapter)
    rows = max((*record.indices, *record.sampled), default=0)
    return table.shape[1] == width and rows < table.shape[0] and table.dtype in EDITABLE


def _width_of(record: TableRecord, adapter: Adapter) -> int:
    """Return the D of a record's rows or, for a record without rows, of the adapter's other tensors."""
    values = adapter.raw[record.name] if record.name in adapter.raw else next(iter(adapter.raw.values()))
    return values.shape[-1]


def _check_shape(record: TableRecord, adapter: Adapter, table: Table) -> Table:
    width = _width_of(record, adapter)
    if table.shape[1] != width:
        raise BaseMismatchError(
            "the base's rows have another width", where=table.name, expected=width, found=table.shape[1]
        )
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


def _has_same_rows(record: TableRecord, table: Table, store: Store) -> bool:
    assert record.fingerprint is not None
    if record.shape is not None and table.shape[1] != record.shape[1]:
        return False
    if max(record.evidence) >= table.shape[0] or table.dtype not in EDITABLE:
        return False
    return record.fingerprint.matches(rows_of(store, table, record.evidence))


def _check_tie(record: TableRecord, table: Table, store: Store) -> None:
    """Refuse a tied adapter on an untied base, and the reverse: its rows would change a table that it did not train."""
    # A stored alias that is not in the graph may be a copy that loading ties: an edit would miss it.
    stored = store.tensor_names()
    unknown = [alias for alias in record.aliases if alias in stored and store.graph.find(alias) is None]
    if unknown:
        raise BaseMismatchError(
            "the adapter was trained on tied tables, but a tensor of this base may be a second copy of the table",
            where=store.name,
            expected=f"{table.name} only",
            found=", ".join(unknown),
            hint="save the model with one copy of the tied table, or merge in memory",
        )
    tables = [store.graph.find(alias) for alias in record.aliases]
    separate = [t.name for t in tables if t is not None and t is not table]
    heads = [t.name for t in store.graph.tables if "output" in t.roles and t.shape[0] == table.shape[0]]
    if record.tied and "output" not in table.roles and heads:
        separate = separate or heads
    if separate:
        raise BaseMismatchError(
            "the adapter was trained on tied tables, but in this base they are untied",
            where=store.name,
            expected=f"{', '.join(separate)} tied to {table.name}",
            found="separate tables",
            hint="tie them, or train the adapter on this base",
        )
    if record.tied is False and "output" in table.roles and "input" in table.roles:
        raise BaseMismatchError(
            "the adapter was trained on an untied table, but in this base it is tied to the output head",
            where=store.name,
            expected=f"{table.name} only",
            found=", ".join(table.names),
            hint="untie them, or train the adapter on this base",
        )

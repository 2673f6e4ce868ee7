"""The records of merges that lie in a checkpoint's ``.embedsurgery/merges/``, the newest with the highest number.

A record is an undo (see ``plan.py``) whose facts say which adapter was merged, when, and what was written.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from embedsurgery._version import __version__
from embedsurgery.adapter import Adapter
from embedsurgery.checkpoint import STATE_DIRECTORY
from embedsurgery.errors import PlanError
from embedsurgery.plan import Grow, Plan, SetBlocks, SetEntries, SetRows, Undo, Untie, spans
from embedsurgery.raw import ITEMSIZE
from embedsurgery.stores.base import Store, entries_of, rows_of
from embedsurgery.vocabulary import NewTokens

MERGES = f"{STATE_DIRECTORY}/merges"


def record_paths(directory: Path) -> list[Path]:
    """The records of a checkpoint, the oldest first."""
    folder = directory / MERGES
    names = (p for p in folder.iterdir() if re.fullmatch(r"\d{4,}\.safetensors", p.name)) if folder.is_dir() else ()
    return sorted(names, key=lambda p: int(p.stem))


def next_record(directory: Path) -> Path:
    """Where the next record goes."""
    paths = record_paths(directory)
    number = int(paths[-1].stem) + 1 if paths else 1
    return directory / MERGES / f"{number:04d}.safetensors"


def facts(adapter: Adapter, source: str, undo: Undo, store: Store) -> dict[str, Any]:
    """What a record says beside the undo; called when the rows have been written."""
    return {
        "adapter": source,
        "adapter_sha256": adapter_sha256(adapter),
        "surgery": adapter.manifest.surgery,
        "base_model": adapter.manifest.base_model,
        "tokens": {str(i): text for i, text in adapter.manifest.tokens.items()},
        **_done(undo, store),
    }


def tokens_facts(new: NewTokens, undo: Undo, store: Store) -> dict[str, Any]:
    """As `facts`, for tokens that no adapter brought."""
    return {"surgery": "add_tokens", "tokens": {str(t.id): t.content for t in new.tokens}, **_done(undo, store)}


def _done(undo: Undo, store: Store) -> dict[str, Any]:
    rows: dict[str, int] = {}
    for edit in undo.edits:
        if isinstance(edit, SetRows):
            rows[edit.table] = rows.get(edit.table, 0) + len(edit.indices)
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "rows": rows,
        "written": written(undo, store),
    }


def adapter_sha256(adapter: Adapter) -> str:
    """A hash over an adapter's manifest and values, the same wherever and however it is saved."""
    digest = hashlib.sha256(json.dumps(adapter.manifest.to_json(), sort_keys=True).encode())
    for name in sorted(adapter.raw):
        raw = adapter.raw[name]
        digest.update(json.dumps([name, raw.dtype, raw.shape]).encode())
        digest.update(raw.data)
    return digest.hexdigest()


def written(undo: Plan, store: Store) -> list[str]:
    """For each edit of an undo, the hash of what is in the store now where it would put something back."""
    return [_digest(edit, store) for edit in undo.edits]


def _digest(edit: object, store: Store) -> str:
    if isinstance(edit, SetRows):
        return rows_of(store, store.graph.table(edit.table), edit.indices).sha256()
    if isinstance(edit, Untie) and edit.undo:
        return rows_of(store, store.graph.table(edit.head), edit.indices).sha256()
    if isinstance(edit, SetEntries):
        return entries_of(store, edit.vector, edit.indices).sha256()
    digest = hashlib.sha256()
    if isinstance(edit, SetBlocks):
        table = store.graph.table(edit.table)
        name = store.copies(table)[0]
        for start, stop in spans(table.shape[0], table.shape[1] * ITEMSIZE[table.dtype]):
            digest.update(store.read_block(name, start, stop).data)
    elif isinstance(edit, Grow) and edit.count < 0:
        vocabulary = next(v for v in store.graph.vocabularies if edit.vocabulary in v.tables)
        for name in vocabulary.tables:
            table = store.graph.table(name)
            last = tuple(range(table.shape[0] + edit.count, table.shape[0]))
            digest.update(rows_of(store, table, last).data)
    return digest.hexdigest()


def check_written(record: Path | str, undo: Plan, store: Store) -> None:
    """Refuse to undo what has been changed since.

    Raises:
        PlanError: The rows are not those that the merge wrote.
    """
    expected = undo.facts.get("written")
    if not isinstance(expected, list) or len(expected) != len(undo.edits):
        raise PlanError("the record does not say what was written", where=record)
    for edit, before, now in zip(undo.edits, expected, written(undo, store), strict=True):
        if before != now:
            where = getattr(edit, "table", None) or getattr(edit, "vector", None) or "?"
            raise PlanError("the rows are not those that the merge wrote", where=f"{store.name}: {where}",
                            expected=f"sha256 {str(before)[:12]}", found=now[:12],
                            hint="something changed them since: take that out first")  # fmt: skip


def summary(record: Path, undo: Plan) -> Mapping[str, Any]:
    """A record for a person or a program."""
    keys = ("adapter", "adapter_sha256", "surgery", "base_model", "time", "version", "rows", "tokens")
    return {"number": int(record.stem), **{key: undo.facts.get(key) for key in keys}}

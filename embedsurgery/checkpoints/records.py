"""Merge records: files in a checkpoint's ``.embedsurgery/merges/``, numbered in the order of the merges.

A record is an undo (``plan/plan.py``) whose facts say which adapter was merged, when, and what was written.
``stack.py`` decides which merge can be unmerged.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from embedsurgery._version import __version__
from embedsurgery.adapters.adapter import Adapter
from embedsurgery.adapters.carried_tokens import NewTokens
from embedsurgery.adapters.manifest import Fingerprint
from embedsurgery.errors import PlanError
from embedsurgery.files.locking import STATE_DIRECTORY, refuse_linked_state
from embedsurgery.files.safetensors import Header, read_header
from embedsurgery.plan import Edit, Undo
from embedsurgery.plan.edit import Sizes
from embedsurgery.stores.store import Store
from embedsurgery.stores.written import hash_written
from embedsurgery.tensors.raw import RawArray

MERGES = f"{STATE_DIRECTORY}/merges"
RECORD = re.compile(r"(\d{4,12})\.safetensors")
"""File name of a record in that directory."""


@dataclass(frozen=True)
class MergeRecord:
    """A merge as its record describes it; `embedsurgery.list_merges` returns these.

    Attributes:
        number: Position in the stack; 1 was merged first.
        adapter: Name of the adapter; None if tokens were added without one.
        adapter_sha256: Hash of its manifest and values.
        surgery: Its technique, or "add_tokens".
        weight: Weight of its rows against the base's.
        on_conflict: How rows that several adapters of the same merge set were resolved; None if there were none.
        base_model: Name of the base that the adapter was made from.
        base: Table -> fingerprint of the rows before the merge: ``dtype``, and ``sha256`` of them as F32, BF16 and F16,
            as in an adapter's manifest.
        rows: Table -> number of rows set.
        tokens: Id -> text of the adapter's tokens.
        files: The files that were changed.
        time: When, in UTC, ISO 8601.
        version: embedsurgery's version.
    """

    number: int
    adapter: str | None = None
    adapter_sha256: str | None = None
    surgery: str | None = None
    weight: float = 1.0
    on_conflict: str | None = None
    base_model: str | None = None
    base: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)
    tokens: Mapping[int, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    time: str | None = None
    version: str | None = None

    @property
    def label(self) -> str:
        """Number and name, for messages."""
        return f"merge {self.number}" + (f" ({self.adapter or self.surgery})" if self.adapter or self.surgery else "")


def record_paths(directory: Path) -> list[Path]:
    """The records of a checkpoint, the oldest first.

    Raises:
        CheckpointError: Their directory is a link, which may lead anywhere.
    """
    refuse_linked_state(directory)
    folder = directory / MERGES
    names = (p for p in folder.iterdir() if RECORD.fullmatch(p.name)) if folder.is_dir() else ()
    return sorted(names, key=lambda p: int(p.stem))


def next_record_path(directory: Path) -> Path:
    """The path of the next record."""
    paths = record_paths(directory)
    number = int(paths[-1].stem) + 1 if paths else 1
    return directory / MERGES / f"{number:04d}.safetensors"


# -- facts of a new record ---------------------------------------------------------------------------------------------


def merge_facts(
    adapter: Adapter,
    name: str,
    undo: Undo,
    store: Store,
    *,
    weight: float = 1.0,
    on_conflict: str | None = None,
) -> dict[str, Any]:
    """The facts of a merge's record.

    Args:
        adapter: What was merged.
        name: Its name in the record.
        undo: The undo of the merge.
        store: The checkpoint after the merge.
        weight: The adapter's weight.
        on_conflict: How conflicts were resolved.
    """
    return {
        "adapter": name,
        "adapter_sha256": adapter_sha256(adapter),
        "surgery": adapter.manifest.surgery,
        "weight": weight,
        "on_conflict": on_conflict,
        "base_model": adapter.manifest.base_model,
        "tokens": {str(i): text for i, text in adapter.manifest.tokens.items()},
        **_change_facts(undo, store),
    }


def added_tokens_facts(new: NewTokens, undo: Undo, store: Store) -> dict[str, Any]:
    """The facts of a record of tokens that were added without an adapter; arguments as of `merge_facts`."""
    return {"surgery": "add_tokens", "tokens": {str(t.id): t.content for t in new.tokens}, **_change_facts(undo, store)}


def _change_facts(undo: Undo, store: Store) -> dict[str, Any]:
    """The facts that every record has."""
    rows: dict[str, set[int]] = {}
    base: dict[str, Any] = {}
    sizes = Sizes(store.graph, store.name)
    for edit in undo.edits:
        for name, indices in edit.replaced_rows(sizes).items():
            table = store.graph.find(name)
            if table is not None:  # per-token vectors are not counted
                rows.setdefault(name, set()).update(range(table.shape[0]) if indices is None else indices)
        for name, displaced in _displaced_rows(edit).items():
            base.setdefault(name, _fingerprint(displaced))
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "rows": {table: len(indices) for table, indices in rows.items()},
        "base": base,
        "files": list(changed_files(undo, store)),
        "written": hash_written(undo, store),
    }


def _displaced_rows(edit: Edit) -> Mapping[str, RawArray]:
    """Table -> the rows that an edit of an undo restores; of a whole table up to `SAMPLE`, evenly spaced."""
    # whole_tables.py is imported here because reading records does not need it.
    from embedsurgery.surgeries.whole_tables import SAMPLE

    whole = edit.whole_table()
    if whole is None:
        return {name: raw for name, raw in edit.arrays().items() if name in edit.sets() and len(raw.shape) == 2}
    table, blocks = whole
    rows, columns = blocks.shape
    count = min(SAMPLE, rows)
    parts = (blocks.read_rows(at, at + 1).data for at in (n * rows // count for n in range(count)))
    return {table: RawArray(blocks.dtype, (count, columns), b"".join(parts))}


def _fingerprint(rows: RawArray) -> dict[str, Any]:
    fingerprint = Fingerprint.of(rows)
    return {"dtype": fingerprint.dtype, "sha256": dict(fingerprint.sha256)}


def changed_files(undo: Undo, store: Store) -> tuple[str, ...]:
    """The files of a store that an undo changes back."""
    footprints = [edit.footprint(store) for edit in undo.edits]
    return tuple(dict.fromkeys(file for found in footprints for file in (*found.ranges, *found.replaced)))


def adapter_sha256(adapter: Adapter) -> str:
    """Hash an adapter's manifest and values; independent of how and where it is saved."""
    digest = hashlib.sha256(json.dumps(adapter.manifest.to_json(), sort_keys=True).encode())
    for name in sorted(adapter.raw):
        raw = adapter.raw[name]
        digest.update(json.dumps([name, raw.dtype, raw.shape]).encode())
        digest.update(raw.data)
    return digest.hexdigest()


# -- reading a record --------------------------------------------------------------------------------------------------


def read_facts(path: Path, header: Header | None = None) -> Mapping[str, Any]:
    """Read a record's facts from its header.

    Args:
        path: The record.
        header: Its header, if it was read already.

    Raises:
        PlanError: The file is not a record.
        CheckpointError: It is not a safetensors file.
    """
    header = read_header(path) if header is None else header
    try:
        facts = json.loads(header.metadata["embedsurgery.plan"])["facts"]
        if not isinstance(facts, dict):
            raise TypeError(f"facts are a {type(facts).__name__}")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise PlanError("not a merge record", where=path, found=f"{type(error).__name__}: {error}") from error
    return facts


def parse_record(path: Path, facts: Mapping[str, Any]) -> MergeRecord:
    """Convert a record's facts to their types; older versions did not write all of them.

    Raises:
        PlanError: A fact has the wrong type.
    """
    try:
        return MergeRecord(
            number=int(path.stem),
            weight=_require_number(facts.get("weight", 1.0)),
            base={_require_string(k): dict(v) for k, v in dict(facts.get("base", {})).items()},
            rows={_require_string(k): _require_count(v) for k, v in dict(facts.get("rows", {})).items()},
            tokens={int(k): _require_string(v) for k, v in _recorded_tokens(facts).items()},
            files=tuple(map(_require_string, facts.get("files", ()))),
            **{
                key: None if facts.get(key) is None else _require_string(facts[key])
                for key in ("adapter", "adapter_sha256", "surgery", "on_conflict", "base_model", "time", "version")
            },
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise PlanError("a fact of the merge record has the wrong type", where=path, found=str(error)) from error


def _recorded_tokens(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Id -> text of the adapter's tokens and of those that a soft prompt became."""
    return {**dict(facts.get("tokens", {})), **dict(dict(facts.get("prompt", {})).get("tokens", {}))}


def _require_string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    return value


def _require_count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r} is not a count")
    return value


def _require_number(value: object) -> float:
    if type(value) not in (int, float):
        raise TypeError(f"{value!r} is not a number")
    return float(value)  # type: ignore[arg-type]

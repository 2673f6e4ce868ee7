"""The records of merges that lie in a checkpoint's ``.embedsurgery/merges/``, the newest with the highest number.

A record is an undo (see ``plan.py``) whose facts say which adapter was merged, when, and what was written. What may be
taken out again, and in which order, is ``stack.py``'s.
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
from embedsurgery.files.locking import refuse_linked_state
from embedsurgery.files.safetensors import Header, read_header
from embedsurgery.plan import Edit, Undo
from embedsurgery.plan.edit import Sizes
from embedsurgery.stores.checkpoint import STATE_DIRECTORY
from embedsurgery.stores.store import Store
from embedsurgery.stores.written import written
from embedsurgery.tensors.raw import RawArray

MERGES = f"{STATE_DIRECTORY}/merges"
RECORD = re.compile(r"(\d{4,12})\.safetensors")
"""Name of a record in that directory."""


@dataclass(frozen=True)
class MergeRecord:
    """What a record says of a merge, as `embedsurgery.list_merges` gives it.

    Attributes:
        number: Its place: 1 was merged first.
        adapter: What the adapter was called; None where tokens were added without one.
        adapter_sha256: Hash over its manifest and values.
        surgery: Which technique, or "add_tokens".
        weight: How far its rows were moved from the base's.
        on_conflict: How rows that several adapters of the same merge set were settled, None where none were.
        base_model: The base that the adapter was made from, by name.
        base: Table -> fingerprint of the rows that were there before: ``dtype``, and ``sha256`` of them as F32, BF16
            and F16, as an adapter's manifest has it.
        rows: Table -> how many rows were set.
        tokens: Id -> text of the adapter's tokens.
        files: The files that were touched.
        time: When, in UTC, ISO 8601.
        version: Of embedsurgery.
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
        """For messages: the number and the name."""
        return f"merge {self.number}" + (f" ({self.adapter or self.surgery})" if self.adapter or self.surgery else "")


def record_paths(directory: Path) -> list[Path]:
    """The records of a checkpoint, the oldest first.

    Raises:
        CheckpointError: The directory that they lie in is a link, which may lead anywhere.
    """
    refuse_linked_state(directory)
    folder = directory / MERGES
    names = (p for p in folder.iterdir() if RECORD.fullmatch(p.name)) if folder.is_dir() else ()
    return sorted(names, key=lambda p: int(p.stem))


def next_record(directory: Path) -> Path:
    """Where the next record goes."""
    paths = record_paths(directory)
    number = int(paths[-1].stem) + 1 if paths else 1
    return directory / MERGES / f"{number:04d}.safetensors"


# -- what a record says ------------------------------------------------------------------------------------------------


def facts(
    adapter: Adapter,
    source: str,
    undo: Undo,
    store: Store,
    *,
    weight: float = 1.0,
    on_conflict: str | None = None,
) -> dict[str, Any]:
    """What a record says beside the undo; called when the rows have been written."""
    return {
        "adapter": source,
        "adapter_sha256": adapter_sha256(adapter),
        "surgery": adapter.manifest.surgery,
        "weight": weight,
        "on_conflict": on_conflict,
        "base_model": adapter.manifest.base_model,
        "tokens": {str(i): text for i, text in adapter.manifest.tokens.items()},
        **_done(undo, store),
    }


def tokens_facts(new: NewTokens, undo: Undo, store: Store) -> dict[str, Any]:
    """As `facts`, for tokens that no adapter brought."""
    return {"surgery": "add_tokens", "tokens": {str(t.id): t.content for t in new.tokens}, **_done(undo, store)}


def _done(undo: Undo, store: Store) -> dict[str, Any]:
    rows: dict[str, set[int]] = {}
    base: dict[str, Any] = {}
    sizes = Sizes(store.graph, store.name)
    for edit in undo.edits:
        for name, indices in edit.leaves(sizes).items():
            table = store.graph.find(name)
            if table is not None:  # per-token vectors are not counted
                rows.setdefault(name, set()).update(range(table.shape[0]) if indices is None else indices)
        for name, displaced in _displaced(edit).items():
            base.setdefault(name, _fingerprint(displaced))
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "rows": {table: len(indices) for table, indices in rows.items()},
        "base": base,
        "files": list(touched_files(undo, store)),
        "written": written(undo, store),
    }


def _displaced(edit: Edit) -> Mapping[str, RawArray]:
    """Table -> the rows that an edit of an undo puts back; of a whole table up to `SAMPLE`, spread evenly."""
    from embedsurgery.surgeries.whole_tables import SAMPLE

    whole = edit.whole()
    if whole is None:
        return {name: raw for name, raw in edit.arrays().items() if name in edit.sets() and len(raw.shape) == 2}
    table, blocks = whole
    rows, columns = blocks.shape
    count = min(SAMPLE, rows)
    parts = (blocks.saved_rows(at, at + 1).data for at in (n * rows // count for n in range(count)))
    return {table: RawArray(blocks.dtype, (count, columns), b"".join(parts))}


def _fingerprint(rows: RawArray) -> dict[str, Any]:
    mark = Fingerprint.of(rows)
    return {"dtype": mark.dtype, "sha256": dict(mark.sha256)}


def touched_files(undo: Undo, store: Store) -> tuple[str, ...]:
    """The files that an undo changes back, in a store of files."""
    footprints = [edit.footprint(store) for edit in undo.edits]
    return tuple(dict.fromkeys(file for found in footprints for file in (*found.ranges, *found.replaced)))


def adapter_sha256(adapter: Adapter) -> str:
    """A hash over an adapter's manifest and values, the same wherever and however it is saved."""
    digest = hashlib.sha256(json.dumps(adapter.manifest.to_json(), sort_keys=True).encode())
    for name in sorted(adapter.raw):
        raw = adapter.raw[name]
        digest.update(json.dumps([name, raw.dtype, raw.shape]).encode())
        digest.update(raw.data)
    return digest.hexdigest()


def facts_of(path: Path, header: Header | None = None) -> Mapping[str, Any]:
    """What a record says, from its header alone.

    Raises:
        PlanError: The file is no record.
        CheckpointError: It is no safetensors file.
    """
    found = read_header(path) if header is None else header
    try:
        said = json.loads(found.metadata["embedsurgery.plan"])["facts"]
        if not isinstance(said, dict):
            raise TypeError(f"facts are a {type(said).__name__}")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise PlanError("not a record of embedsurgery", where=path, found=f"{type(error).__name__}: {error}") from error
    return said


def _tokens(said: Mapping[str, Any]) -> dict[str, Any]:
    """Id -> text of the tokens that an adapter names, and of those that a soft prompt became."""
    return {**dict(said.get("tokens", {})), **dict(dict(said.get("prompt", {})).get("tokens", {}))}


def merge_record(path: Path, said: Mapping[str, Any]) -> MergeRecord:
    """A record's facts by type; older versions did not write all of them.

    Raises:
        PlanError: A fact of the wrong type.
    """
    try:
        return MergeRecord(
            number=int(path.stem),
            weight=_number(said.get("weight", 1.0)),
            base={_text(k): dict(v) for k, v in dict(said.get("base", {})).items()},
            rows={_text(k): _count(v) for k, v in dict(said.get("rows", {})).items()},
            tokens={int(k): _text(v) for k, v in _tokens(said).items()},
            files=tuple(map(_text, said.get("files", ()))),
            **{
                key: None if said.get(key) is None else _text(said[key])
                for key in ("adapter", "adapter_sha256", "surgery", "on_conflict", "base_model", "time", "version")
            },
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise PlanError("a record whose facts are of the wrong type", where=path, found=str(error)) from error


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r} is no count")
    return value


def _number(value: object) -> float:
    if type(value) not in (int, float):
        raise TypeError(f"{value!r} is no number")
    return float(value)  # type: ignore[arg-type]


# -- what was written, against what is there ---------------------------------------------------------------------------

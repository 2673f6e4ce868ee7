"""Plans and undos as frozen data, and their one serialised form. The edits are ``edits.py``'s.

A plan says what will change, an undo is a plan that holds what was there before, the record of a merge is an undo with
facts about the merge beside it, and a journal is an undo of files (``file_edits.py``). All of them are one safetensors
file: the numbers are its tensors, the rest is JSON in its metadata, and its last tensor is the sha256 of all that comes
before. What applies a plan is ``stores/base.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from embedsurgery.errors import PlanError
from embedsurgery.files.regular import open_regular, pread_exactly
from embedsurgery.files.safetensors import Entry, TensorSource, check_seal, read_header, write_file
from embedsurgery.graph import EmbeddingGraph
from embedsurgery.plan.edits import (
    AddTokens,
    Blocks,
    Edit,
    Front,
    Grow,
    PatchFile,
    SetBlocks,
    SetEntries,
    SetRows,
    Suppress,
    Token,
    Untie,
    count_rows,
    listed_tokens,
    spans,
)
from embedsurgery.plan.file_edits import PutFile, SetBytes, decode, encode
from embedsurgery.tensors.raw import ITEMSIZE, RawArray

__all__ = [
    "FORMAT",
    "SEAL",
    "AddTokens",
    "Blocks",
    "Edit",
    "Front",
    "Grow",
    "PatchFile",
    "Plan",
    "PutFile",
    "SetBlocks",
    "SetBytes",
    "SetEntries",
    "SetRows",
    "Suppress",
    "Token",
    "Undo",
    "Untie",
    "count_rows",
    "listed_tokens",
    "spans",
    "undo_bytes",
]
"""Edits are imported from here, too: plans and they come together."""

FORMAT = 1
"""Version of the serialised form."""

SEAL = "sha256"
"""The last tensor of the file."""


@dataclass(frozen=True)
class Plan:
    """Edits in order, with facts that go with them.

    Attributes:
        edits: What to do.
        facts: JSON values: in a merge's record the adapter, the time, hashes of what was written.
    """

    edits: tuple[Edit, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> list[str]:
        """A line for each edit."""
        return [edit.describe() for edit in self.edits]

    def save(self, path: Path) -> None:
        """Write the plan to a new file, fsynced.

        Raises:
            PlanError: It holds blocks that are computed from the table and so cannot be written down.
        """
        tensors: dict[str, TensorSource] = {}
        described = [_encode(edit, f"{number}.", tensors) for number, edit in enumerate(self.edits)]
        body = {"format": FORMAT, "edits": described, "facts": dict(self.facts)}
        write_file(path, tensors, {"embedsurgery.plan": json.dumps(body, sort_keys=True)}, seal=SEAL)

    @classmethod
    def load(cls, path: Path, *, sealed: bool = False) -> Plan:
        """Read a plan; whole-table blocks stay in the file and are read when they are applied.

        Args:
            path: The file.
            sealed: Read all of it first, and see that it is what was written.

        Raises:
            PlanError: The file is no plan, or of a newer format.
            CheckpointError: The file is no safetensors file.
        """
        header = read_header(path)
        if sealed:
            check_seal(path, header, SEAL)
        try:
            body = json.loads(header.metadata["embedsurgery.plan"])
            if body["format"] != FORMAT:
                raise PlanError("a plan of another format", where=path, expected=FORMAT, found=body["format"],
                                hint="use the embedsurgery version that wrote it, or a newer one")  # fmt: skip
            reader = _Reader(path, header.entries)
            edits = tuple(reader.decode(edit, f"{n}.") for n, edit in enumerate(body["edits"]))
            return cls(edits, dict(body["facts"]))
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError, IndexError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(
                "not a plan of embedsurgery", where=path, found=f"{type(error).__name__}: {error}"
            ) from error


Undo = Plan
"""A plan whose edits put back what was there."""


def undo_bytes(plan: Plan, graph: EmbeddingGraph) -> int:
    """Bytes of the rows that a plan's undo keeps: a few for rows, a table for a whole table."""
    size = 0
    for edit in plan.edits:
        if isinstance(edit, (SetRows, SetBlocks)) and (table := graph.find(edit.table)) is not None:
            rows = len(edit.indices) if isinstance(edit, SetRows) else table.shape[0]
            size += rows * table.shape[1] * ITEMSIZE[table.dtype]
    return size


def _encode(edit: Edit, prefix: str, tensors: dict[str, TensorSource]) -> dict[str, Any]:
    """The JSON part of an edit; its numbers go into ``tensors`` under names that start with ``prefix``."""
    if isinstance(edit, SetRows):
        tensors[prefix + "indices"] = _indices(edit.indices)
        tensors[prefix + "rows"] = TensorSource.of(edit.rows)
        return {"edit": "SetRows", "table": edit.table}
    if isinstance(edit, SetEntries):
        tensors[prefix + "indices"] = _indices(edit.indices)
        tensors[prefix + "entries"] = TensorSource.of(edit.entries)
        return {"edit": "SetEntries", "vector": edit.vector}
    if isinstance(edit, SetBlocks):
        blocks = edit.blocks
        if not blocks.stored:
            raise PlanError("blocks that are computed from the table cannot be written down", where=edit.table,
                            hint="apply the plan and save its undo")  # fmt: skip
        nothing = RawArray(blocks.dtype, (0, blocks.shape[1]), b"")
        chunks = (blocks.block(start, stop, nothing).data for start, stop in blocks.spans())
        tensors[prefix + "blocks"] = TensorSource(blocks.dtype, blocks.shape, chunks)
        return {"edit": "SetBlocks", "table": edit.table}
    if isinstance(edit, Grow):
        for kind, part in (("rows", edit.rows), ("vectors", edit.vectors)):
            tensors.update({f"{prefix}{kind}.{name}": TensorSource.of(raw) for name, raw in part.items()})
        tensors.update({f"{prefix}saved.{path}": _bytes(data) for path, data in edit.saved.items()})
        return {"edit": "Grow", "vocabulary": edit.vocabulary, "count": edit.count,
                "rows": list(edit.rows), "vectors": list(edit.vectors), "saved": list(edit.saved)}  # fmt: skip
    if isinstance(edit, AddTokens):
        front = {} if edit.front is None else {"front": asdict(edit.front)}
        parts = {"parts": dict(edit.parts)} if edit.parts else {}
        tokens = [asdict(token) for token in edit.tokens]
        return {"edit": "AddTokens", "tokens": tokens, "remove": edit.remove, **front, **parts}
    if isinstance(edit, Suppress):
        restore = None if edit.restore is None else list(edit.restore)
        return {"edit": "Suppress", "ids": list(edit.ids), "restore": restore, "undo": edit.undo}
    if isinstance(edit, Untie):
        tensors[prefix + "indices"] = _indices(edit.indices)
        tensors[prefix + "rows"] = TensorSource.of(edit.rows)
        tensors.update({f"{prefix}saved.{path}": _bytes(data) for path, data in edit.saved.items()})
        return {"edit": "Untie", "table": edit.table, "head": edit.head, "undo": edit.undo, "saved": list(edit.saved)}
    if isinstance(edit, (SetBytes, PutFile)):
        return encode(edit, prefix, tensors)
    if edit.after is not None:
        tensors[prefix + "after"] = _bytes(edit.after)
    return {"edit": "PatchFile", "path": edit.path, "removed": edit.after is None, "before": edit.before}


def _indices(indices: tuple[int, ...]) -> TensorSource:
    return TensorSource.of(RawArray.of_integers(indices))


def _bytes(data: bytes) -> TensorSource:
    return TensorSource("U8", (len(data),), (data,))


@dataclass(frozen=True)
class _Reader:
    path: Path
    entries: Mapping[str, Entry]

    def tensor(self, name: str) -> RawArray:
        entry = self.entries[name]
        with open_regular(self.path) as descriptor:
            return RawArray(entry.dtype, entry.shape, pread_exactly(descriptor, entry.end - entry.begin, entry.begin))

    def indices(self, prefix: str) -> tuple[int, ...]:
        indices = self.tensor(prefix + "indices")
        if indices.dtype != "I64" or len(indices.shape) != 1:
            raise ValueError(f"indices are {indices!r}")
        return indices.integers()

    def bytes(self, name: str) -> bytes:
        raw = self.tensor(name)
        if raw.dtype != "U8" or len(raw.shape) != 1:
            raise ValueError(f"bytes are {raw!r}")
        return raw.data

    def decode(self, body: Mapping[str, Any], prefix: str) -> Edit:
        kind = body["edit"]
        if kind == "SetRows":
            return SetRows(str(body["table"]), self.indices(prefix), self.tensor(prefix + "rows"))
        if kind == "SetEntries":
            return SetEntries(str(body["vector"]), self.indices(prefix), self.tensor(prefix + "entries"))
        if kind == "SetBlocks":
            return SetBlocks(str(body["table"]), Blocks.in_file(self.path, self.entries[prefix + "blocks"]))
        if kind == "Grow":
            rows = {name: self.tensor(f"{prefix}rows.{name}") for name in body["rows"]}
            vectors = {name: self.tensor(f"{prefix}vectors.{name}") for name in body["vectors"]}
            saved = {path: self.bytes(f"{prefix}saved.{path}") for path in body["saved"]}
            return Grow(str(body["vocabulary"]), int(body["count"]), rows, vectors, saved)
        if kind == "AddTokens":
            front = None if body.get("front") is None else _front(body["front"])
            return AddTokens(
                tuple(map(_token, body["tokens"])), bool(body["remove"]), front, dict(body.get("parts", {}))
            )
        if kind == "Suppress":
            restore = None if body["restore"] is None else tuple(map(int, body["restore"]))
            return Suppress(tuple(map(int, body["ids"])), restore, bool(body["undo"]))
        if kind == "Untie":
            saved = {path: self.bytes(f"{prefix}saved.{path}") for path in body["saved"]}
            return Untie(str(body["table"]), str(body["head"]), self.indices(prefix), self.tensor(prefix + "rows"),
                         bool(body["undo"]), saved)  # fmt: skip
        if kind == "PatchFile":
            after = None if body["removed"] else self.bytes(prefix + "after")
            return PatchFile(str(body["path"]), after, _text(body["before"]))
        found = decode(body, prefix, self.path, self.entries)
        if found is not None:
            return found
        raise PlanError("an edit that this version does not know", where=self.path, found=kind,
                        hint="use the embedsurgery version that wrote it, or a newer one")  # fmt: skip


def _token(body: Mapping[str, Any]) -> Token:
    return Token(str(body["content"]), int(body["id"]), bool(body["special"]), _text(body["replaces"]))


def _front(body: Mapping[str, Any]) -> Front:
    contents, ids = tuple(map(str, body["contents"])), tuple(map(int, body["ids"]))
    if len(contents) != len(ids) or not ids:
        raise ValueError("as many texts as ids, and at least one")
    places = (bool(body[key]) for key in ("texts", "chats", "after_bos"))
    return Front(str(body["label"]), contents, ids, *places)


def _text(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value

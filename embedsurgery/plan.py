"""Edits, plans and undos as frozen data, and their one serialised form.

A plan says what will change, an undo is a plan that holds what was there before, the record of a merge is an undo with
facts about the merge beside it, and a journal is an undo of files (``file_edits.py``). All of them are one safetensors
file: the numbers are its tensors, the rest is JSON in its metadata, and its last tensor is the sha256 of all that comes
before. What applies a plan is ``stores/base.py``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from embedsurgery.errors import PlanError
from embedsurgery.file_edits import PutFile, SetBytes, decode, encode
from embedsurgery.graph import EmbeddingGraph
from embedsurgery.raw import ITEMSIZE, RawArray
from embedsurgery.safetensors_file import (
    Entry,
    TensorSource,
    check_seal,
    open_regular,
    pread_exactly,
    read_header,
    write_file,
)

FORMAT = 1
"""Version of the serialised form."""

SEAL = "sha256"
"""The last tensor of the file."""

BLOCK_BYTES = 8 << 20
"""Bytes that whole-table edits hold at a time, about."""


def count_rows(count: int) -> str:
    """A number of rows for a person."""
    return f"{count:,} row" if count == 1 else f"{count:,} rows"


def listed_tokens(tokens: Sequence[tuple[str, int]], most: int = 8) -> str:
    """Texts and ids of tokens for a person: the first few, and how many more."""
    shown = ", ".join(f"{text!r} as {index}" for text, index in tokens[:most])
    return shown if len(tokens) <= most else f"{shown} and {len(tokens) - most} more"


@dataclass(frozen=True)
class SetRows:
    """Some rows of a table become others.

    Attributes:
        table: The table's name in the store's graph.
        indices: Row numbers, (K,), each once.
        rows: The new rows, (K, D), in any editable dtype; rounded once to the table's.
    """

    table: str
    indices: tuple[int, ...]
    rows: RawArray

    def describe(self) -> str:
        """One line for a person."""
        return f"set {count_rows(len(self.indices))} of {self.table}"


@dataclass(frozen=True)
class SetEntries:
    """Some entries of a per-token vector, such as a head's bias, become others.

    Attributes:
        vector: The vector's name in its vocabulary in the store's graph.
        indices: Token ids, (K,), each once.
        entries: The new entries, (K,), in any editable dtype; rounded once to the vector's.
    """

    vector: str
    indices: tuple[int, ...]
    entries: RawArray

    def describe(self) -> str:
        """One line for a person."""
        count = len(self.indices)
        return f"set {count:,} {'entry' if count == 1 else 'entries'} of {self.vector}"


@dataclass(frozen=True)
class Blocks:
    """All rows of a table, made block by block.

    Attributes:
        shape: (V, D).
        dtype: Of the blocks that `block` returns.
        block: Called as ``block(start, stop, current)`` with the table's rows ``start:stop`` as they are now;
            returns the new ones, (stop - start, D).
        stored: The blocks come from a file or from memory whatever ``current`` is, so that they can be saved.
    """

    shape: tuple[int, int]
    dtype: str
    block: Callable[[int, int, RawArray], RawArray]
    stored: bool = False

    @classmethod
    def of(cls, rows: RawArray) -> Blocks:
        """All rows, held in memory."""
        return cls((rows.shape[0], rows.shape[1]), rows.dtype, _Held(rows), stored=True)

    @classmethod
    def in_file(cls, path: Path, entry: Entry) -> Blocks:
        """All rows, in a tensor of a safetensors file that is read block by block."""
        rows, columns = entry.shape
        return cls((rows, columns), entry.dtype, _InFile(path, entry), stored=True)

    def spans(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of consecutive blocks of bounded size that cover all rows."""
        yield from spans(self.shape[0], self.shape[1] * ITEMSIZE[self.dtype])


@dataclass(frozen=True)
class _Held:
    rows: RawArray

    def __call__(self, start: int, stop: int, current: RawArray) -> RawArray:
        part = np.ascontiguousarray(self.rows.bits[start:stop])
        return RawArray(self.rows.dtype, (stop - start, self.rows.shape[1]), part.tobytes())


@dataclass(frozen=True, eq=False)
class _InFile:
    """A copy is the same object, which the file may live as long as; pickled it is its values."""

    path: Path
    entry: Entry

    def __call__(self, start: int, stop: int, current: RawArray | None = None) -> RawArray:
        columns = self.entry.shape[1]
        pitch = columns * ITEMSIZE[self.entry.dtype]
        with open_regular(self.path) as descriptor:
            data = pread_exactly(descriptor, (stop - start) * pitch, self.entry.begin + start * pitch)
        return RawArray(self.entry.dtype, (stop - start, columns), data)

    def __deepcopy__(self, memo: object) -> _InFile:
        return self

    def __reduce__(self) -> tuple[type[_Held], tuple[RawArray]]:
        return _Held, (self(0, self.entry.shape[0]),)


def spans(rows: int, pitch: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive blocks of about `BLOCK_BYTES` bytes, for rows of ``pitch`` bytes."""
    step = max(1, BLOCK_BYTES // max(pitch, 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


@dataclass(frozen=True)
class SetBlocks:
    """All rows of a table become others, in bounded memory; the undo spills to a file."""

    table: str
    blocks: Blocks

    def describe(self) -> str:
        """One line for a person; what it costs to take back is `undo_bytes`."""
        return f"set all {count_rows(self.blocks.shape[0])} of {self.table}, block by block"


@dataclass(frozen=True)
class Grow:
    """A vocabulary gets rows at its end (or, with a negative count, loses its last ones: the undo of growing).

    All tables and per-token vectors of the vocabulary change together, and so does what counts them: modules'
    attributes and configs in memory, ``config.json`` and the index on disk.

    Attributes:
        vocabulary: The vocabulary's name in the store's graph.
        count: How many rows; negative in an undo.
        rows: Table name -> the new rows, (count, D), in any editable dtype. Empty for a negative count.
        vectors: Vector name -> the new entries, (count,). Empty for a negative count.
        saved: What a store of files needs to be put back bit for bit: path -> the bytes of a weight file before its
            first tensor, or all bytes of a small file. Empty in a plan that no undo has made.
    """

    vocabulary: str
    count: int
    rows: Mapping[str, RawArray]
    vectors: Mapping[str, RawArray]
    saved: Mapping[str, bytes] = field(default_factory=dict)

    def describe(self) -> str:
        """One line for a person."""
        verb = "grow" if self.count > 0 else "shrink"
        return f"{verb} the vocabulary of {self.vocabulary} by {count_rows(abs(self.count))}"


@dataclass(frozen=True)
class Token:
    """A token of a tokenizer.

    Attributes:
        content: Its text.
        id: The id it has.
        special: Whether it is a special token.
        replaces: Text of the reserved token that had the id before and gives it up; None where the id was free.
    """

    content: str
    id: int
    special: bool = False
    replaces: str | None = None


@dataclass(frozen=True)
class Front:
    """Tokens that a tokenizer puts before every text by itself.

    Attributes:
        label: What they are called together where the tokenizer's post-processor names them.
        contents: Their texts, in order.
        ids: Their ids.
        texts: The post-processor puts them there.
        chats: The chat templates do.
        after_bos: They stand behind the tokens that begin a text, "<s>" or "[CLS]"; else before those.
    """

    label: str
    contents: tuple[str, ...]
    ids: tuple[int, ...]
    texts: bool = True
    chats: bool = True
    after_bos: bool = False

    @property
    def text(self) -> str:
        """Their texts as one."""
        return "".join(self.contents)


@dataclass(frozen=True)
class AddTokens:
    """Tokens enter the tokenizer at given ids; with ``remove`` they leave it again: the undo of adding.

    Attributes:
        tokens: The tokens.
        remove: They leave.
        front: Those that the tokenizer from then on puts before every text.
        parts: In an undo in memory: what other parts of the tokenizer become again, by their names.
    """

    tokens: tuple[Token, ...]
    remove: bool = False
    front: Front | None = None
    parts: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> str:
        """One line for a person."""
        verb = "remove" if self.remove else "add"
        last = f", and put {self.front.label} before every text" if self.front is not None else ""
        return f"{verb} tokens " + listed_tokens([(t.content, t.id) for t in self.tokens]) + last


@dataclass(frozen=True)
class Suppress:
    """The generation config keeps tokens from being generated.

    Attributes:
        ids: The tokens.
        restore: In an undo in memory: the ids that were suppressed before, None where nothing said so. Else ``()``.
        undo: Whether this is an undo.
    """

    ids: tuple[int, ...]
    restore: tuple[int, ...] | None = ()
    undo: bool = False

    def describe(self) -> str:
        """One line for a person."""
        verb = "no longer suppress" if self.undo else "suppress"
        return f"{verb} {len(self.ids)} tokens in the generation config"


@dataclass(frozen=True)
class Untie:
    """A projection that is tied to a lookup gets a table of its own: a copy of the lookup's with some other rows.

    Attributes:
        table: The lookup's table.
        head: Name of the projection's parameter: an alias of the table until then, a table of its own afterwards.
        indices: Rows in which the two differ, (K,), each once.
        rows: The projection's rows there, (K, D), in any editable dtype. In an undo the lookup's, which both have then.
        undo: The projection is tied again, and its own table is gone.
        saved: As in `Grow`.
    """

    table: str
    head: str
    indices: tuple[int, ...]
    rows: RawArray
    undo: bool = False
    saved: Mapping[str, bytes] = field(default_factory=dict)

    def describe(self) -> str:
        """One line for a person."""
        return f"tie {self.head} to {self.table} again" if self.undo else f"give {self.head} a table of its own"


@dataclass(frozen=True)
class PatchFile:
    """A small file beside the weights becomes other bytes.

    Attributes:
        path: Relative to the checkpoint, with forward slashes.
        after: The new bytes; None removes the file.
        before: sha256 (hex) of what must be there, None for no such file: anything else is refused.
    """

    path: str
    after: bytes | None
    before: str | None

    @classmethod
    def change(cls, path: str, before: bytes | None, after: bytes | None) -> PatchFile:
        """The edit that turns one content into another; None stands for no file."""
        return cls(path, after, None if before is None else hashlib.sha256(before).hexdigest())

    def describe(self) -> str:
        """One line for a person."""
        return f"{'remove' if self.after is None else 'write'} {self.path}"


Edit = SetRows | SetEntries | SetBlocks | Grow | AddTokens | Suppress | Untie | PatchFile | SetBytes | PutFile


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
    return TensorSource.of(RawArray.of(np.asarray(indices, dtype=np.int64)))


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
        return tuple(map(int, indices.bits))

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

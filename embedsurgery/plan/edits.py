"""The edits that plans are made of, as frozen data: what each changes, and a line that says so to a person.

How plans of them are written down is ``plan.py``'s, what does them ``stores/base.py``'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embedsurgery.files.regular import open_regular, pread_exactly
from embedsurgery.files.safetensors import Entry
from embedsurgery.plan.file_edits import PutFile, SetBytes
from embedsurgery.tensors.raw import ITEMSIZE, RawArray

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
        pitch = self.rows.shape[1] * ITEMSIZE[self.rows.dtype]
        part = self.rows.data[start * pitch : stop * pitch]
        return RawArray(self.rows.dtype, (stop - start, self.rows.shape[1]), part)


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

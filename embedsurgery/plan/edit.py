"""What every edit says of itself; `Edit` is the base class of all of them.

Whoever looks at a plan asks these methods and never asks for the type: only what applies an edit and what checks it
against a store do (``stores/apply.py``, ``stores/checks.py``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from embedsurgery.errors import PlanError
from embedsurgery.graph import EmbeddingGraph
from embedsurgery.plan.blocks import BlockFunction, Blocks
from embedsurgery.plan.tokens import Prefix, Token
from embedsurgery.tensors.raw import RawArray

if TYPE_CHECKING:
    from embedsurgery.files.safetensors import TensorSource
    from embedsurgery.plan.serial import PlanFile

Range = tuple[int, int]
"""(begin, end) in bytes from the start of a file."""

Rows = Mapping[str, Sequence[int] | None]
"""Table or per-token vector -> row numbers; None for all of them."""


class Values(NamedTuple):
    """Rows of a table, or entries of a per-token vector, that an edit sets.

    Attributes:
        name: The table or vector.
        indices: Row numbers, (K,).
        values: (K, D) or (K,).
    """

    name: str
    indices: Sequence[int]
    values: RawArray


@dataclass(frozen=True)
class Touched:
    """What an edit changes, as far as a later edit can lie over it.

    Attributes:
        rows: Rows of tables and entries of vectors.
        files: Small files, and weight files whose header changes.
    """

    rows: Rows = field(default_factory=dict)
    files: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Footprint:
    """What an edit does to a checkpoint's files.

    Attributes:
        ranges: Weight file -> bytes that are written over where they lie.
        replaced: Files that are replaced, made or removed, relative to the checkpoint.
    """

    ranges: Mapping[str, Sequence[Range]] = field(default_factory=dict)
    replaced: tuple[str, ...] = ()


class StoreFiles(Protocol):
    """What an edit asks a store about its files; a store without files answers with nothing."""

    def row_ranges(self, table: str, indices: Sequence[int] | None) -> Mapping[str, Sequence[Range]]:
        """Weight file -> where rows of a table lie; None for all rows. Empty for a table that is not stored yet."""

    def entry_ranges(self, vector: str, indices: Sequence[int]) -> Mapping[str, Sequence[Range]]:
        """Weight file -> where entries of a per-token vector lie."""

    def resized_files(self, vocabulary: str) -> Sequence[str]:
        """The files that are rewritten when a vocabulary gets another number of rows."""

    def untie_footprint(self, edit: Any) -> Footprint:
        """What an `Untie` does."""


class Sizes:
    """How many rows each table, vector and vocabulary has, as the edits so far leave them.

    Attributes:
        rows: Table or vector -> rows.
        vocabularies: Vocabulary -> rows.
        members: Vocabulary -> its tables and vectors.

    Args:
        graph: Before any edit.
        where: For messages.
    """

    def __init__(self, graph: EmbeddingGraph, where: str = "") -> None:
        self._where = where
        self.rows = {table.name: table.shape[0] for table in graph.tables}
        self.rows |= {name: v.size for v in graph.vocabularies for name in v.vectors}
        self.vocabularies = {v.name: v.size for v in graph.vocabularies}
        self.members = {v.name: (*v.tables, *v.vectors) for v in graph.vocabularies}
        self._tables = tuple(v.tables for v in graph.vocabularies)

    def tables_of(self, vocabulary: str) -> tuple[str, ...]:
        """The tables of a vocabulary that is named by one of them.

        Raises:
            PlanError: There is none.
        """
        found = next((tables for tables in self._tables if vocabulary in tables), None)
        if found is None:
            raise PlanError("a record of a vocabulary that does not exist here", where=self._where, expected=vocabulary)
        return found

    def resize(self, vocabulary: str, count: int) -> None:
        """Give a vocabulary so many rows more, or fewer."""
        self.vocabularies[vocabulary] = self.vocabularies.get(vocabulary, 0) + count
        for name in self.members.get(vocabulary, ()):
            self.rows[name] = self.rows.get(name, 0) + count


@dataclass(frozen=True)
class Edit(ABC):
    """One change of a checkpoint or a model, as frozen data."""

    rearranges: ClassVar[bool] = True
    """Whether sizes, names or small files change, so that later edits cannot be checked against the store as it is."""

    interpolates: ClassVar[bool] = True
    """Whether a weight other than 1 has a meaning for the edit."""

    @abstractmethod
    def describe(self) -> str:
        """One line for a person."""

    # -- what it touches ----------------------------------------------------------------------------------------------

    def sets(self) -> Rows:
        """The rows and entries that get new values."""
        return {}

    def touches(self, sizes: Sizes) -> Touched:
        """What it changes, as far as a later edit can lie over it."""
        return Touched(self.sets())

    def leaves(self, sizes: Sizes) -> Rows:
        """In an undo: rows whose present values it takes away, which a record hashes before."""
        return self.sets()

    def footprint(self, store: StoreFiles) -> Footprint:
        """What it does to the files of a store."""
        return Footprint()

    def ends(self) -> tuple[str, ...]:
        """Names of the lookup's table and the head whose tie it changes."""
        return ()

    def resize(self, sizes: Sizes) -> None:  # noqa: B027 - most edits leave all sizes as they are
        """Bring sizes up to date with this edit."""

    def kept_bytes(self, graph: EmbeddingGraph) -> int:
        """Bytes of rows that its undo keeps."""
        return 0

    # -- what it brings -----------------------------------------------------------------------------------------------

    def arrays(self) -> Mapping[str, RawArray]:
        """Table or vector -> all values that it brings for it."""
        return {}

    def values(self, sizes: Sizes) -> list[Values]:
        """Values that several adapters of one merge may set, by row. New rows that only pad a table are not among them.

        Args:
            sizes: As the edits before this one leave them.
        """
        return []

    def padding(self) -> Mapping[str, RawArray]:
        """Table -> rows that only pad it, over which the rows of tokens are set."""
        return {}

    def whole(self) -> tuple[str, Blocks] | None:
        """A table and all its new rows, block by block."""
        return None

    def changed_tokens(self) -> tuple[Token, ...]:
        """The tokens that enter or leave the tokenizer."""
        return ()

    def new_prefix(self) -> Prefix | None:
        """Tokens that the tokenizer puts before every text from then on."""
        return None

    # -- other edits made of it ---------------------------------------------------------------------------------------

    def with_values(self, new: Mapping[str, RawArray]) -> Edit:
        """The edit with other `values`, by table or vector."""
        return self

    def with_blocks(self, wrap: Callable[[BlockFunction], BlockFunction], *, stored: bool) -> Edit:
        """The edit with its block function wrapped in another, where it has one.

        Args:
            wrap: Returns the new function.
            stored: Whether the blocks can still be saved, if they could.
        """
        return self

    def with_tables(self, names: Mapping[str, str]) -> Edit | None:
        """The same edit of another table; None where it sets none of these.

        Args:
            names: Table -> the other one.
        """
        return None

    def restricted(self, wanted: Callable[[str, int], bool]) -> Edit | None:
        """The edit without rows that are not wanted; None where none is left.

        Args:
            wanted: Called with the table or vector, and a row.
        """
        return self

    def once(self) -> str | None:
        """Key of what a plan can do only once; `joined` makes one edit of several with this key. None for no key."""
        return None

    def joined(self, later: Any) -> Edit:
        """One edit that does what this and a later one of the same key do."""
        raise NotImplementedError

    # -- how it is written down ---------------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, prefix: str, tensors: dict[str, TensorSource]) -> dict[str, Any]:
        """The JSON part of the edit.

        Args:
            prefix: Of the names of its tensors.
            tensors: Takes its numbers.
        """

    @classmethod
    @abstractmethod
    def decode(cls, body: Mapping[str, Any], prefix: str, file: PlanFile) -> Edit:
        """The inverse of `encode`.

        Raises:
            ValueError: It contradicts itself; or another of Python's errors for values of the wrong kind.
        """

    # -- files --------------------------------------------------------------------------------------------------------

    def expected_file(self) -> tuple[str, str | None] | None:
        """A small file that it changes, and the sha256 that it must have; None for the hash where it must not exist."""
        return None

    def put_back(self, directory: Path, journal: Path) -> str | None:
        """As an edit of a journal: put a file back, with nothing known of the checkpoint but its files.

        Args:
            directory: The checkpoint.
            journal: The journal's directory, with the files that were kept.

        Returns:
            The file's path; None where this is no edit of files.

        Raises:
            UnfinishedError: The files are not those that the journal was written for.
            OSError: The file cannot be written.
        """
        return None


def count_rows(count: int) -> str:
    """A number of rows for a person."""
    return f"{count:,} row" if count == 1 else f"{count:,} rows"


def positions(indices: Sequence[int], name: str, wanted: Callable[[str, int], bool]) -> list[int]:
    """Positions of the indices that are wanted."""
    return [n for n, index in enumerate(indices) if wanted(name, index)]

"""`Edit`, the base class of all edits, and the types its methods use.

Code that inspects a plan calls these methods and does not test the type of an edit. Only ``stores/apply.py``, which
applies edits, and ``stores/checks.py``, which checks them against a store, do that.
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
        values: The new values, (K, D) or (K,).
    """

    name: str
    indices: Sequence[int]
    values: RawArray


@dataclass(frozen=True)
class Touched:
    """What an edit changes and a later edit may change again.

    Attributes:
        rows: Rows of tables and entries of vectors.
        files: Small files, and weight files whose header changes.
    """

    rows: Rows = field(default_factory=dict)
    files: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Footprint:
    """The files and bytes of a checkpoint that an edit changes.

    Attributes:
        ranges: Weight file -> byte ranges that are overwritten in place.
        replaced: Files that are replaced, created or removed, relative to the checkpoint.
    """

    ranges: Mapping[str, Sequence[Range]] = field(default_factory=dict)
    replaced: tuple[str, ...] = ()


class StoreFiles(Protocol):
    """What an edit asks a store about its files. A store without files returns empty values."""

    def row_ranges(self, table: str, indices: Sequence[int] | None) -> Mapping[str, Sequence[Range]]:
        """Weight file -> byte ranges of rows, or of all rows for None. Empty for a table that is not stored yet."""

    def entry_ranges(self, vector: str, indices: Sequence[int]) -> Mapping[str, Sequence[Range]]:
        """Weight file -> byte ranges of entries of a per-token vector."""

    def resized_files(self, vocabulary: str) -> Sequence[str]:
        """The files that are rewritten when a vocabulary is resized."""

    def untie_footprint(self, edit: Any) -> Footprint:
        """The footprint of an `Untie`."""


class Sizes:
    """Number of rows of each table, vector and vocabulary after the edits so far.

    Attributes:
        rows: Table or vector -> rows.
        vocabularies: Vocabulary -> rows.
        members: Vocabulary -> its tables and vectors.

    Args:
        graph: The graph before any edit.
        where: Name of the store, for messages.
    """

    def __init__(self, graph: EmbeddingGraph, where: str = "") -> None:
        self._where = where
        self.rows = {table.name: table.shape[0] for table in graph.tables}
        self.rows |= {name: v.size for v in graph.vocabularies for name in v.vectors}
        self.vocabularies = {v.name: v.size for v in graph.vocabularies}
        self.members = {v.name: (*v.tables, *v.vectors) for v in graph.vocabularies}
        self._tables = tuple(v.tables for v in graph.vocabularies)

    def tables_of(self, vocabulary: str) -> tuple[str, ...]:
        """Return the tables of the vocabulary that contains a table of this name.

        Raises:
            PlanError: There is no such vocabulary.
        """
        found = next((tables for tables in self._tables if vocabulary in tables), None)
        if found is None:
            raise PlanError("the store has no such vocabulary", where=self._where, expected=vocabulary)
        return found

    def resize(self, vocabulary: str, count: int) -> None:
        """Add rows to a vocabulary or, with a negative count, remove them."""
        self.vocabularies[vocabulary] = self.vocabularies.get(vocabulary, 0) + count
        for name in self.members.get(vocabulary, ()):
            self.rows[name] = self.rows.get(name, 0) + count


@dataclass(frozen=True)
class Edit(ABC):
    """One change of a checkpoint or model, as frozen data."""

    rearranges: ClassVar[bool] = True
    """Whether sizes, names or small files change, so that later edits cannot be checked against the current store."""

    interpolates: ClassVar[bool] = True
    """Whether the edit can be scaled by an adapter's weight."""

    @abstractmethod
    def describe(self) -> str:
        """Describe the edit in one line of a report."""

    # -- what it changes ----------------------------------------------------------------------------------------------

    def sets(self) -> Rows:
        """Return the rows and entries that get new values."""
        return {}

    def touches(self, sizes: Sizes) -> Touched:
        """Return what it changes and a later edit may change again."""
        return Touched(self.sets())

    def replaced_rows(self, sizes: Sizes) -> Rows:
        """Return the rows that it replaces or removes, for an edit of an undo. A merge's record has their hash."""
        return self.sets()

    def footprint(self, store: StoreFiles) -> Footprint:
        """Return the files and bytes of a store that it changes."""
        return Footprint()

    def tie_names(self) -> tuple[str, ...]:
        """Return the names of the lookup's table and of the head, if it ties or unties them."""
        return ()

    def resize(self, sizes: Sizes) -> None:  # noqa: B027 - most edits leave all sizes as they are
        """Update the sizes to those after this edit."""

    def kept_bytes(self, graph: EmbeddingGraph) -> int:
        """Return how many bytes of rows its undo keeps."""
        return 0

    # -- what it contains ---------------------------------------------------------------------------------------------

    def arrays(self) -> Mapping[str, RawArray]:
        """Return all values that it contains, by table or vector."""
        return {}

    def values(self, sizes: Sizes) -> list[Values]:
        """Return the values that several adapters of one merge may set, by row, without `padding`.

        Args:
            sizes: Sizes after the edits before this one.
        """
        return []

    def padding(self) -> Mapping[str, RawArray]:
        """Return rows that only fill up a table, by table. The rows of tokens are set afterwards."""
        return {}

    def whole_table(self) -> tuple[str, Blocks] | None:
        """Return the table of which it sets all rows, and these rows as blocks; None if it sets no whole table."""
        return None

    def changed_tokens(self) -> tuple[Token, ...]:
        """Return the tokens that are added to or removed from the tokenizer."""
        return ()

    def new_prefix(self) -> Prefix | None:
        """Return the tokens that the tokenizer will prepend to every text."""
        return None

    # -- edits derived from it ----------------------------------------------------------------------------------------

    def with_values(self, new: Mapping[str, RawArray]) -> Edit:
        """Return the edit with other `values`, by table or vector."""
        return self

    def with_blocks(self, wrap: Callable[[BlockFunction], BlockFunction], *, stored: bool) -> Edit:
        """Return the edit with its block function, if it has one, wrapped in another.

        Args:
            wrap: Returns the new function.
            stored: Whether the blocks can still be saved, if they could.
        """
        return self

    def with_tables(self, names: Mapping[str, str]) -> Edit | None:
        """Return the same edit for another table; None if its table is not in ``names``.

        Args:
            names: Table -> the other one.
        """
        return None

    def restrict(self, wanted: Callable[[str, int], bool]) -> Edit | None:
        """Return the edit with a part of its rows; None if no row is left.

        Args:
            wanted: Called with the table or vector and a row number; says whether to keep the row.
        """
        return self

    def join_key(self) -> str | None:
        """Return the key of a change that a plan can make only once, else None. `join` merges edits of equal keys."""
        return None

    def join(self, later: Any) -> Edit:
        """Merge this edit with a later one of the same key."""
        raise NotImplementedError

    # -- serialisation ------------------------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, prefix: str, tensors: dict[str, TensorSource]) -> dict[str, Any]:
        """Return the JSON part of the edit, and add its tensors to ``tensors``.

        Args:
            prefix: Prefix of the names of its tensors.
            tensors: Name -> tensor; changed.
        """

    @classmethod
    @abstractmethod
    def decode(cls, body: Mapping[str, Any], prefix: str, file: PlanFile) -> Edit:
        """Read an edit that `encode` wrote.

        Raises:
            ValueError: The values contradict one another.
            KeyError, TypeError, ...: A value is missing or has the wrong type. `Edits.load` turns all these into
                a PlanError.
        """

    # -- files --------------------------------------------------------------------------------------------------------

    def expected_file(self) -> tuple[str, str | None] | None:
        """Return the small file that it changes and the sha256 it must have, None if it must not exist."""
        return None

    def restore_file(self, directory: Path, journal: Path) -> str | None:
        """Restore a file from a journal, without opening the checkpoint.

        Args:
            directory: The checkpoint.
            journal: The journal's directory, with the files that were kept.

        Returns:
            The file's path; None if this is not an edit of a journal.

        Raises:
            UnfinishedError: The journal was written for other files.
            OSError: The file cannot be written.
        """
        return None


def format_row_count(count: int) -> str:
    """Format a number of rows for a report: "1 row", "2,000 rows"."""
    return f"{count:,} row" if count == 1 else f"{count:,} rows"


def find_positions(indices: Sequence[int], name: str, wanted: Callable[[str, int], bool]) -> list[int]:
    """Return the positions of the wanted row numbers in ``indices``."""
    return [n for n, index in enumerate(indices) if wanted(name, index)]

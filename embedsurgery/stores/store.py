"""`Store`, the contract of everything that holds tables: their rows are read and written here.

A store knows single edits, and neither surgeries nor plans. ``checks.py`` checks a plan against a store and
``apply.py`` applies it. A plugin that implements `Store` for another file format supports every surgery.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from embedsurgery.errors import PlanError, UnsupportedEditError, UnsupportedError
from embedsurgery.graph import EmbeddingGraph, Table, Vocabulary
from embedsurgery.graph.config import as_mapping, find_growth_obstacle
from embedsurgery.graph.vocabularies import find_unknown_tensor, names_of, row_counts_of
from embedsurgery.plan import AddTokens, Edit, Grow, PatchFile, Suppress, Untie
from embedsurgery.plan.edit import Footprint, Range
from embedsurgery.tensors.raw import EDITABLE, RawArray

_SCALES = ("_scale", "_scale_inv", ".scales", ".qzeros", ".absmax", ".quant_state", ".SCB", "_zero_point", ".g_idx")
"""Suffixes of tensors beside a quantised weight, added to its name or to its module's."""


class Store(ABC):
    """Holds tables. Rows are read and written in the table's dtype, as (n, D), also if they are stored transposed."""

    graph: EmbeddingGraph
    """The graph of the store. Plans use its names."""

    name: str
    """Name of the store, for messages."""

    config: Any = None
    """The model's config, a mapping or an object; None if there is none."""

    directory: Path
    """For a store of files, the checkpoint directory. `Registry.open_store` sets it if the store does not."""

    refuse_links: bool = True
    """For a store of files, whether to refuse writing to files with other hard links."""

    @property
    def claimed_graph(self) -> EmbeddingGraph:
        """The graph from names and headers alone: ties that the config claims are not verified by comparing bytes."""
        return self.graph

    def with_work_directory(self, work: Path) -> Store:
        """Return a store over the same checkpoint that changes it in place and creates new files in ``work``."""
        return self

    def close(self) -> None:  # noqa: B027 - most stores hold nothing open
        """Release resources, such as downloaded files."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def copies(self, table: Table) -> tuple[str, ...]:
        """Return the names of separate copies of a table, one for each memory. Rows are read from the first."""

    @abstractmethod
    def read_rows(self, name: str, indices: tuple[int, ...]) -> RawArray:
        """Read rows of one copy, (K, D), in the order of the indices, which are in range."""

    @abstractmethod
    def write_rows(self, name: str, indices: tuple[int, ...], rows: RawArray) -> None:
        """Write rows of one copy. They have the table's dtype."""

    @abstractmethod
    def read_block(self, name: str, start: int, stop: int) -> RawArray:
        """Read consecutive rows of one copy, (stop - start, D)."""

    @abstractmethod
    def write_block(self, name: str, start: int, rows: RawArray) -> None:
        """Write consecutive rows of one copy. They have the table's dtype."""

    def read_vector(self, name: str) -> RawArray:
        """Read a per-token vector of one of the graph's vocabularies, (V,)."""
        raise UnsupportedEditError("this store cannot read per-token vectors", where=self.name, found=name)

    def write_entries(self, name: str, indices: tuple[int, ...], entries: RawArray) -> None:
        """Write entries, (K,), of every copy of a per-token vector, rounded to the dtype of each copy."""
        raise UnsupportedEditError("this store cannot write per-token vectors", where=self.name, found=name)

    def row_ranges(self, table: str, indices: Sequence[int] | None) -> Mapping[str, Sequence[Range]]:
        """Return weight file -> byte ranges of rows of a table, or of all rows for None. For a store of files.

        A store that cannot change files in place returns the files without ranges. Empty for a table that is not
        stored yet.
        """
        found = self.graph.find(table)
        return {} if found is None else {file: () for _, file in found.files}

    def entry_ranges(self, vector: str, indices: Sequence[int]) -> Mapping[str, Sequence[Range]]:
        """Return weight file -> byte ranges of entries of a per-token vector. For a store of files."""
        return {}

    def check_vector(self, name: str) -> None:  # noqa: B027 - most stores can write what they can read
        """Refuse a per-token vector that this store cannot write.

        Raises:
            UnsupportedError: It cannot be written.
        """

    def vocabulary(self, edit: Grow) -> Vocabulary:
        """Return the vocabulary of a `Grow` that has been checked."""
        return next(v for v in self.graph.vocabularies if v.name == edit.vocabulary)

    def grow(self, edit: Grow) -> None:
        """Add rows to a vocabulary or remove its last rows, and update `graph`. Completely or not at all.

        The edit has passed `check_growth`, and its rows and entries have the right shapes.
        """
        raise self._unsupported(edit)

    def invert_growth(self, edit: Grow) -> Grow:
        """Return the edit that undoes a `Grow`, which has not been applied yet."""
        if edit.count > 0:
            return Grow(edit.vocabulary, -edit.count, {}, {}, self.growth_state(edit))
        vocabulary = self.vocabulary(edit)
        rows, vectors = {}, {}
        for table in map(self.graph.table, vocabulary.tables):
            rows[table.name] = rows_of(self, table, tuple(range(table.shape[0] + edit.count, table.shape[0])))
        for name in vocabulary.vectors:
            vector = self.read_vector(name)
            vectors[name] = vector.take(range(vector.shape[0] + edit.count, vector.shape[0]))
        return Grow(edit.vocabulary, -edit.count, rows, vectors, self.growth_state(edit))

    def growth_state(self, edit: Grow) -> Mapping[str, bytes]:
        """Return the bytes that undoing a `Grow` exactly needs besides rows and entries: `Grow.saved`."""
        return {}

    def resized_files(self, vocabulary: str) -> Sequence[str]:
        """Return the files that are rewritten when a vocabulary is resized: weight files and small files."""
        return ()

    def weight_files(self) -> Collection[str]:
        """Return the files with tensors. For a store of files."""
        return [file for table in self.graph.tables for _, file in table.files]

    def check_untie(self, edit: Untie) -> None:
        """Refuse a head that cannot be untied.

        Raises:
            UnsupportedError: It cannot be untied.
        """
        table = self.graph.table(edit.table)
        outputs = [f"{site.module}.{site.parameter}" for site in table.sites if site.role == "output"]
        if not edit.undo and outputs != [edit.head]:
            raise UnsupportedEditError(
                "this head cannot be untied",
                where=f"{self.name}: {edit.table}",
                expected=f"one projection, {edit.head}",
                found=", ".join(outputs) or "none",
                hint="keep the tie, and suppress the tokens",
            )

    def untie(self, edit: Untie) -> None:
        """Untie a head or tie it again, and update `graph`. Completely or not at all.

        The edit has passed `check_untie`.
        """
        raise self._unsupported(edit)

    def invert_untie(self, edit: Untie) -> Untie:
        """Return the edit that undoes an `Untie`, which has not been applied yet."""
        name = edit.head if edit.undo else edit.table
        rows = rows_of(self, self.graph.table(name), edit.indices)
        return Untie(edit.table, edit.head, edit.indices, rows, not edit.undo, self.untie_state(edit))

    def untie_state(self, edit: Untie) -> Mapping[str, bytes]:
        """Return the bytes that undoing an `Untie` exactly needs besides rows: `Untie.saved`."""
        return {}

    def untie_footprint(self, edit: Untie) -> Footprint:
        """Return the files and bytes that an `Untie` changes."""
        return Footprint()

    def suppress(self, edit: Suppress) -> None:
        """Suppress tokens in the generation config, or undo that."""
        raise self._unsupported(edit)

    def invert_suppression(self, edit: Suppress) -> Suppress:
        """Return the edit that undoes a `Suppress`, which has not been applied yet."""
        raise self._unsupported(edit)

    def expand_tokens(self, edit: AddTokens) -> tuple[Edit, ...]:
        """Return the edits that change the tokenizer of this store. Called before anything changes."""
        raise self._unsupported(edit)

    def expand_suppression(self, edit: Suppress) -> tuple[Edit, ...]:
        """Return the edits that suppress tokens in this store. Called before anything changes."""
        raise self._unsupported(edit)

    def invert_tokens(self, edit: AddTokens) -> tuple[AddTokens, ...]:
        """Return the edits that undo an `AddTokens`, in order. It has not been applied yet."""
        return (AddTokens(edit.tokens, remove=not edit.remove),)

    def change_tokens(self, edit: AddTokens) -> None:
        """Add tokens to the tokenizer or remove them. Completely or not at all."""
        raise UnsupportedEditError("this store has no tokenizer", where=self.name, found=edit.describe())

    def patch_file(self, edit: PatchFile) -> None:
        """Apply a `PatchFile` whose ``before`` has been checked."""
        raise UnsupportedEditError("this store has no files", where=self.name, found=edit.describe())

    def read_file(self, path: str) -> bytes | None:
        """Read a small file beside the weights; None if it does not exist."""
        raise UnsupportedEditError("this store has no files", where=self.name, found=path)

    def check_editable(self, table: Table) -> None:
        """Refuse a table whose rows are not plain float values.

        Raises:
            UnsupportedError: The table is quantised or has no values.
        """
        if table.dtype not in EDITABLE:
            raise UnsupportedError(
                "cannot set rows of a table with this dtype",
                where=f"{self.name}: {table.name}",
                expected=" or ".join(EDITABLE),
                found=table.dtype,
                hint="edit the model before it is quantised",
            )
        names = self.tensor_names()
        for name in self.copies(table):
            module = name.rpartition(".")[0]
            candidates = (start + scale for scale in _SCALES for start in (name, module, f"{module}.weight"))
            scales = next((candidate for candidate in candidates if candidate in names), None)
            if scales is not None:
                raise UnsupportedError(
                    "the table is quantised",
                    where=name,
                    expected="no tensor of scales beside the table",
                    found=scales,
                    hint="edit the model before it is quantised",
                )

    def check_writable(self, table: Table) -> None:  # noqa: B027 - most stores can write what they can read
        """Refuse a table whose rows can be read and trained, but not written in this store.

        Raises:
            UnsupportedError: It cannot be written.
        """

    def check_growth(self, vocabulary: Vocabulary, count: int) -> None:
        """Refuse a vocabulary that cannot be resized correctly.

        Raises:
            UnsupportedError: It cannot be resized.
        """
        for table in map(self.graph.table, vocabulary.tables):
            self.check_editable(table)
        names, rows = names_of(self.graph, vocabulary), row_counts_of(self.graph, vocabulary)
        found = find_growth_obstacle(as_mapping(self.config), names, rows)
        if found is not None:
            raise UnsupportedError(
                "this vocabulary cannot grow at its end",
                where=f"{self.name}: {vocabulary.name}",
                found=found,
                hint="use spare or reserved rows instead",
            )
        unknown = find_unknown_tensor(self.graph, vocabulary, self.tensor_shapes())
        if unknown is not None:
            raise UnsupportedError(
                "this vocabulary cannot grow, because another tensor may depend on its size",
                where=f"{self.name}: {vocabulary.name}",
                found=unknown,
                hint="use spare or reserved rows instead",
            )

    @abstractmethod
    def tensor_names(self) -> Collection[str]:
        """Return the names of all stored tensors."""

    def tensor_shapes(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Return name -> (dtype, shape) of all stored tensors, if the store can grow."""
        return {}

    def sync(self) -> None:  # noqa: B027 - most stores have nothing to do here
        """Make the edits durable: a store of files calls fsync."""

    def _unsupported(self, edit: Edit) -> UnsupportedEditError:
        return UnsupportedEditError("this store cannot do this edit", where=self.name, found=edit.describe())


def rows_of(store: Store, table: Table, indices: tuple[int, ...]) -> RawArray:
    """Read rows of a table, (K, D).

    Args:
        store: The store.
        table: One of its graph's tables.
        indices: Row numbers, (K,).

    Raises:
        PlanError: An index is out of range.
    """
    check_indices(table, indices)
    return store.read_rows(store.copies(table)[0], indices)


def entries_of(store: Store, name: str, indices: tuple[int, ...]) -> RawArray:
    """Read entries of a per-token vector, (K,)."""
    return store.read_vector(name).take(indices)


def check_indices(table: Table, indices: tuple[int, ...]) -> None:
    """Refuse row numbers that the table does not have.

    Raises:
        PlanError: A row number is out of range.
    """
    outside = [i for i in indices if not 0 <= i < table.shape[0]]
    if outside:
        raise PlanError(
            "rows out of range", where=table.name, expected=f"0 to {table.shape[0] - 1}", found=shorten(outside)
        )


def shorten(values: list[int], most: int = 8) -> str:
    """Format a list for a message: the first few values, and how many more there are."""
    text = ", ".join(map(str, values[:most]))
    return text if len(values) <= most else f"{text} and {len(values) - most} more"

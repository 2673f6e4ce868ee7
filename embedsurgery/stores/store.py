"""What a store is: where tables live, read and written by rows, whatever holds them.

A store knows nothing of surgeries or plans beyond single edits; ``checks.py`` checks a plan against one and ``base.py``
applies it. A store for another file format implements `Store` and gets every surgery.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from embedsurgery.errors import PlanError, UnsupportedEditError, UnsupportedError
from embedsurgery.graph import EmbeddingGraph, Table, Vocabulary
from embedsurgery.graph.config import as_mapping, obstacle
from embedsurgery.graph.vocabularies import names_of, rows_of_tables, unexplained
from embedsurgery.plan import AddTokens, Edit, Grow, PatchFile, Suppress, Untie
from embedsurgery.plan.edit import Footprint, Range
from embedsurgery.tensors.raw import EDITABLE, RawArray

_SCALES = ("_scale", "_scale_inv", ".scales", ".qzeros", ".absmax", ".quant_state", ".SCB", "_zero_point", ".g_idx")
"""What lies beside a quantised weight, as a suffix of its name or its module's."""


class Store(ABC):
    """Where tables live. All rows go in and out in the table's own dtype, as (n, D) whatever way they are stored."""

    graph: EmbeddingGraph
    """What is in the store; plans name tables as this graph does."""

    name: str
    """What the store is, for messages."""

    config: Any = None
    """The model's config, a mapping or an object; None where there is none."""

    directory: Path
    """The checkpoint directory, of a store of files; `Registry.open_store` sets it where the store has not."""

    refuse_links: bool = True
    """Whether a file with a second name is not written, of a store of files."""

    @property
    def claimed_graph(self) -> EmbeddingGraph:
        """The graph by names and headers alone: where both ends of a claimed tie are stored, the claim is believed."""
        return self.graph

    def within(self, work: Path) -> Store:
        """The same checkpoint for one that changes it in place and makes new files in ``work``."""
        return self

    def close(self) -> None:  # noqa: B027 - most stores hold nothing open
        """Let go of what the store holds, such as downloaded files."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def copies(self, table: Table) -> tuple[str, ...]:
        """The names under which separate copies of a table are stored, one for each memory; the first is read."""

    @abstractmethod
    def read_rows(self, name: str, indices: tuple[int, ...]) -> RawArray:
        """Rows of one copy, (K, D), in the order of the indices, which are in range."""

    @abstractmethod
    def write_rows(self, name: str, indices: tuple[int, ...], rows: RawArray) -> None:
        """Set rows of one copy; their dtype is the table's."""

    @abstractmethod
    def read_block(self, name: str, start: int, stop: int) -> RawArray:
        """Consecutive rows of one copy, (stop - start, D)."""

    @abstractmethod
    def write_block(self, name: str, start: int, rows: RawArray) -> None:
        """Set consecutive rows of one copy; their dtype is the table's."""

    def read_vector(self, name: str) -> RawArray:
        """A per-token vector of one of the graph's vocabularies, (V,)."""
        raise UnsupportedEditError("per-token vectors cannot be read here", where=self.name, found=name)

    def write_entries(self, name: str, indices: tuple[int, ...], entries: RawArray) -> None:
        """Set entries, (K,), of every copy of a per-token vector; rounded to the dtype of each."""
        raise UnsupportedEditError("per-token vectors cannot be written here", where=self.name, found=name)

    def row_ranges(self, table: str, indices: Sequence[int] | None) -> Mapping[str, Sequence[Range]]:
        """Weight file -> where rows of a table lie, of a store of files; None for all rows.

        A store that does not change in place names the files alone. Empty for a table that is not stored yet.
        """
        found = self.graph.find(table)
        return {} if found is None else {file: () for _, file in found.files}

    def entry_ranges(self, vector: str, indices: Sequence[int]) -> Mapping[str, Sequence[Range]]:
        """Weight file -> where entries of a per-token vector lie, of a store of files."""
        return {}

    def check_vector(self, name: str) -> None:  # noqa: B027 - most stores can write what they can read
        """Refuse a per-token vector that cannot be written here.

        Raises:
            UnsupportedError: It says why.
        """

    def vocabulary(self, edit: Grow) -> Vocabulary:
        """The vocabulary that a checked `Grow` names."""
        return next(v for v in self.graph.vocabularies if v.name == edit.vocabulary)

    def grow(self, edit: Grow) -> None:
        """Give a vocabulary more rows, or take its last ones away, and bring `graph` up to date: all or nothing.

        `check_growth` holds, and the edit's rows and entries have the right shapes.
        """
        raise UnsupportedEditError("this store cannot do this edit", where=self.name, found=edit.describe())

    def growth_undone(self, edit: Grow) -> Grow:
        """The edit that takes a `Grow` back, asked for before it is done."""
        if edit.count > 0:
            return Grow(edit.vocabulary, -edit.count, {}, {}, self.growth_saved(edit))
        vocabulary = self.vocabulary(edit)
        rows, vectors = {}, {}
        for table in map(self.graph.table, vocabulary.tables):
            rows[table.name] = rows_of(self, table, tuple(range(table.shape[0] + edit.count, table.shape[0])))
        for name in vocabulary.vectors:
            vector = self.read_vector(name)
            vectors[name] = vector.take(range(vector.shape[0] + edit.count, vector.shape[0]))
        return Grow(edit.vocabulary, -edit.count, rows, vectors, self.growth_saved(edit))

    def growth_saved(self, edit: Grow) -> Mapping[str, bytes]:
        """What the inverse of a `Grow` needs beside rows and entries to be exact."""
        return {}

    def resized_files(self, vocabulary: str) -> Sequence[str]:
        """The files that are rewritten when a vocabulary gets another number of rows, weights and others."""
        return ()

    def weight_files(self) -> Collection[str]:
        """The files that hold tensors, of a store of files."""
        return [file for table in self.graph.tables for _, file in table.files]

    def check_untie(self, edit: Untie) -> None:
        """Refuse a head that cannot get a table of its own.

        Raises:
            UnsupportedError: It says why.
        """
        table = self.graph.table(edit.table)
        outputs = [f"{site.module}.{site.parameter}" for site in table.sites if site.role == "output"]
        if not edit.undo and outputs != [edit.head]:
            raise UnsupportedEditError(
                "this head cannot get a table of its own",
                where=f"{self.name}: {edit.table}",
                expected=f"one projection, {edit.head}",
                found=", ".join(outputs) or "none",
                hint="keep the tie, and suppress the tokens",
            )

    def untie(self, edit: Untie) -> None:
        """Give a head a table of its own, or tie it again, and bring `graph` up to date: all or nothing.

        `check_untie` holds.
        """
        raise UnsupportedEditError("this store cannot do this edit", where=self.name, found=edit.describe())

    def untie_undone(self, edit: Untie) -> Untie:
        """The edit that takes an `Untie` back, asked for before it is done."""
        name = edit.head if edit.undo else edit.table
        rows = rows_of(self, self.graph.table(name), edit.indices)
        return Untie(edit.table, edit.head, edit.indices, rows, not edit.undo, self.untie_saved(edit))

    def untie_saved(self, edit: Untie) -> Mapping[str, bytes]:
        """What the inverse of an `Untie` needs beside rows to be exact."""
        return {}

    def untie_footprint(self, edit: Untie) -> Footprint:
        """What an `Untie` does to the files."""
        return Footprint()

    def suppress(self, edit: Suppress) -> None:
        """Change which tokens the generation config suppresses."""
        raise UnsupportedEditError("this store cannot do this edit", where=self.name, found=edit.describe())

    def suppression_undone(self, edit: Suppress) -> Suppress:
        """The edit that takes a `Suppress` back, asked for before it is done."""
        raise UnsupportedEditError("this store cannot do this edit", where=self.name, found=edit.describe())

    def expand_tokens(self, edit: AddTokens) -> tuple[Edit, ...]:
        """The edits that adding tokens comes to here; asked for before anything changes."""
        raise UnsupportedEditError("this store cannot do this edit", where=self.name, found=edit.describe())

    def expand_suppression(self, edit: Suppress) -> tuple[Edit, ...]:
        """The edits that suppressing tokens comes to here; asked for before anything changes."""
        raise UnsupportedEditError("this store cannot do this edit", where=self.name, found=edit.describe())

    def tokens_undone(self, edit: AddTokens) -> tuple[AddTokens, ...]:
        """The edits that take an `AddTokens` back, in order, asked for before it is done."""
        return (AddTokens(edit.tokens, remove=not edit.remove),)

    def change_tokens(self, edit: AddTokens) -> None:
        """Add tokens to the tokenizer beside the tables, or remove them: all or nothing."""
        raise UnsupportedEditError("no tokenizer lies beside this store", where=self.name, found=edit.describe())

    def patch_file(self, edit: PatchFile) -> None:
        """Do a `PatchFile`, whose ``before`` holds."""
        raise UnsupportedEditError("no files lie beside this store", where=self.name, found=edit.describe())

    def read_file(self, path: str) -> bytes | None:
        """The bytes of a small file beside the weights, None where there is none."""
        raise UnsupportedEditError("no files lie beside this store", where=self.name, found=path)

    def check_editable(self, table: Table) -> None:
        """Refuse a table whose rows are not plain numbers.

        Raises:
            UnsupportedError: The table is quantised, sharded or in some other way not what its rows say.
        """
        if table.dtype not in EDITABLE:
            raise UnsupportedError(
                "the rows of this table cannot be set",
                where=f"{self.name}: {table.name}",
                expected=" or ".join(EDITABLE),
                found=table.dtype,
                hint="edit the model before it is quantised",
            )
        names = self.tensor_names()
        for name in self.copies(table):
            module = name.rpartition(".")[0]
            beside = [s for s in _SCALES if name + s in names or module + s in names or f"{module}.weight{s}" in names]
            if beside:
                raise UnsupportedError(
                    "the table is quantised: a scale tensor lies beside it",
                    where=name,
                    found=beside[0],
                    hint="edit the model before it is quantised",
                )

    def check_writable(self, table: Table) -> None:  # noqa: B027 - most stores can write what they can read
        """Refuse a table whose rows can be read and trained, but not written here.

        Raises:
            UnsupportedError: It says why.
        """

    def check_growth(self, vocabulary: Vocabulary, count: int) -> None:
        """Refuse a vocabulary whose growing cannot be right.

        Raises:
            UnsupportedError: It says why.
        """
        for table in map(self.graph.table, vocabulary.tables):
            self.check_editable(table)
        names, rows = names_of(self.graph, vocabulary), rows_of_tables(self.graph, vocabulary)
        found = obstacle(as_mapping(self.config), names, rows)
        if found is not None:
            raise UnsupportedError(
                "this vocabulary cannot grow at its end",
                where=f"{self.name}: {vocabulary.name}",
                found=found,
                hint="take spare or reserved rows instead",
            )
        stranger = unexplained(self.graph, vocabulary, self.tensor_shapes())
        if stranger is not None:
            raise UnsupportedError(
                "this vocabulary cannot grow: it is not known what a new token has in this tensor",
                where=f"{self.name}: {vocabulary.name}",
                found=stranger,
                hint="take spare or reserved rows instead",
            )

    @abstractmethod
    def tensor_names(self) -> Collection[str]:
        """The names of everything that is stored, tables or not."""

    def tensor_shapes(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape) of everything that is stored, where the store can grow."""
        return {}

    def sync(self) -> None:  # noqa: B027 - most stores have nothing to do here
        """Make the edits durable, where that means something."""


def rows_of(store: Store, table: Table, indices: tuple[int, ...]) -> RawArray:
    """A table's rows as they are now, (K, D).

    Raises:
        PlanError: An index is out of range.
    """
    check_indices(table, indices)
    return store.read_rows(store.copies(table)[0], indices)


def entries_of(store: Store, name: str, indices: tuple[int, ...]) -> RawArray:
    """Entries of a per-token vector as they are now, (K,)."""
    return store.read_vector(name).take(indices)


def check_indices(table: Table, indices: tuple[int, ...]) -> None:
    """Refuse indices that are not rows of the table.

    Raises:
        PlanError: With the offending ones.
    """
    bad = [i for i in indices if not 0 <= i < table.shape[0]]
    if bad:
        raise PlanError(
            "rows that the table does not have",
            where=table.name,
            expected=f"0 to {table.shape[0] - 1}",
            found=shorten(bad),
        )


def shorten(values: list[int], most: int = 8) -> str:
    """A list for a message: the first few, and how many more."""
    text = ", ".join(map(str, values[:most]))
    return text if len(values) <= most else f"{text} and {len(values) - most} more"

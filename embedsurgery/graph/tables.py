"""The graph as frozen data: tables, their aliases and sites, and vocabularies.

Nothing here accesses a tensor or a file. ``from_modules.py`` builds graphs from modules, ``from_names.py`` from the
tensor names of a checkpoint or a state dict.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from embedsurgery.errors import TableError

Role = Literal["input", "output"]
Kind = Literal["vocabulary", "unknown"]


@dataclass(frozen=True)
class Site:
    """A module that uses a table.

    Attributes:
        module: Dotted module path; "" is the root.
        role: "input" for a lookup, "output" for a projection to logits.
        parameter: Attribute of the module that holds the table.
        scale: Factor that the lookup multiplies its rows by, None without one.
        bias: Full name of the per-token bias that is added to the logits, None without one.
        padding_idx: Row for which the lookup computes no gradient, None without one.
        transposed: Whether the parameter is stored (D, V).
    """

    module: str
    role: Role
    parameter: str = "weight"
    scale: float | None = None
    bias: str | None = None
    padding_idx: int | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Table:
    """A tensor of shape (V, D) whose rows are token ids, under all its names.

    Attributes:
        name: Parameter name, or the tensor's key on disk.
        aliases: Other names over the same memory. In a checkpoint, names that loading ties to this table, whether or
            not they are stored too.
        shape: (V, D), also if it is stored transposed.
        dtype: safetensors' string, such as "BF16".
        sites: The modules that use it, lookups first.
        kind: "vocabulary", or "unknown" for a table that may hold something else, such as positions, and is edited only
            when it is named.
        transposed: The names, of name and aliases, that are stored (D, V).
        files: In a checkpoint, (stored name, file) of each stored copy. Empty in memory.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    aliases: tuple[str, ...] = ()
    sites: tuple[Site, ...] = ()
    kind: Kind = "unknown"
    transposed: frozenset[str] = frozenset()
    files: tuple[tuple[str, str], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The name and every alias."""
        return (self.name, *self.aliases)

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the modules that hold the table, in the order of `names`."""
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name in self.names))

    @property
    def roles(self) -> tuple[Role, ...]:
        """The roles of its sites: "input", "output" or both, in that order."""
        found = {site.role for site in self.sites}
        return tuple(role for role in ("input", "output") if role in found)


@dataclass(frozen=True)
class Vocabulary:
    """Tables and per-token vectors that share their row numbers and grow together.

    Attributes:
        name: Name of its first table.
        tables: Names of its tables.
        vectors: Names of per-token vectors with V entries in their last axis, such as a head's bias.
        size: V of the first table.
    """

    name: str
    tables: tuple[str, ...]
    vectors: tuple[str, ...]
    size: int


@dataclass(frozen=True)
class EmbeddingGraph:
    """All tables of a model or checkpoint, the main input table first.

    Attributes:
        tables: Every table, of either kind.
        vocabularies: The tables with a row for each token, grouped by the row numbers that they share.
        input: Name of the table in which the whole model looks up its input ids, None if unknown.
        source: What was walked, for messages: a class name or a path.
    """

    tables: tuple[Table, ...]
    vocabularies: tuple[Vocabulary, ...] = ()
    input: str | None = None
    source: str = "model"
    _by_name: dict[str, Table] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._by_name.update({name: table for table in self.tables for name in table.names})

    def table(self, name: str) -> Table:
        """Return the table with this name or alias.

        Raises:
            TableError: There is none. The error lists the tables.
        """
        try:
            return self._by_name[name]
        except KeyError:
            raise self.table_error("there is no such table", repr(name)) from None

    def find(self, name: str) -> Table | None:
        """Return the table with this name or alias, None if there is none."""
        return self._by_name.get(name)

    def vocabulary_of(self, table: Table) -> Vocabulary:
        """Return the vocabulary that a table belongs to.

        Raises:
            TableError: It belongs to none: its rows may not be tokens.
        """
        for vocabulary in self.vocabularies:
            if table.name in vocabulary.tables:
                return vocabulary
        raise self.table_error("the rows of this table may not be tokens", f"{table.name} (vocabulary)")

    def select(self, targets: str | Iterable[str]) -> tuple[Table, ...]:
        """Return the tables that ``target_modules`` selects as in PEFT, each once and in the graph's order.

        Args:
            targets: A list of names. A name selects a parameter of that name, and modules whose path is the name or
                ends with it after a dot: "embed_tokens" selects "model.embed_tokens". Or one string: a regular
                expression for whole paths of modules or parameters or, if it matches none, a name.

        Raises:
            TableError: A target selects no table.
        """
        if isinstance(targets, str):
            try:
                pattern = re.compile(targets)
            except re.error:
                return self.select([targets])
            chosen = [t for t in self.tables if any(pattern.fullmatch(n) for n in (*t.modules, *t.names))]
            return tuple(chosen) if chosen else self.select([targets])
        chosen = []
        for target in targets:
            fits = [t for t in self.tables if target in t.names or any(_ends(n, target) for n in t.modules)]
            if not fits:
                raise self.table_error("target_modules selects no embedding table", repr(target))
            chosen.extend(fits)
        return tuple(t for t in self.tables if t in chosen)

    def main_input(self) -> Table:
        """Return the table of the model's input ids: `input`, else ``embed_tokens``, else the only vocabulary.

        Raises:
            TableError: There is none, or more than one. The error lists the tables.
        """
        if self.input is not None:
            return self.table(self.input)
        named = [t for t in self.tables if any(_ends(n, "embed_tokens") for n in t.modules)]
        if len(named) == 1:
            return named[0]
        vocabulary = [t for t in self.tables if t.kind == "vocabulary" and "input" in t.roles]
        if len(vocabulary) == 1:
            return vocabulary[0]
        raise self.table_error("the input embeddings cannot be identified")

    def table_error(self, what: str, expected: str | None = None) -> TableError:
        """Return an error that lists the tables."""
        found = ", ".join(f"{t.name} {list(t.shape)} ({t.kind})" for t in self.tables) or "no embedding table"
        hint = "name a table in target_modules" if self.tables else None
        return TableError(what, where=self.source, expected=expected, found=found, hint=hint)


def _ends(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("." + suffix)

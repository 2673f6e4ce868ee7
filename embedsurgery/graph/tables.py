"""What the walkers return: tables, their aliases and sites, and vocabularies, as frozen data.

Nothing here touches a tensor or a file. ``walker.py`` makes graphs from modules, ``names.py`` from the tensor names
of a checkpoint or a state dict.
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
        scale: Factor that the lookup multiplies its rows by, None where there is none.
        bias: Full name of the per-token bias that is added to the projection, None where there is none.
        padding_idx: Row that the lookup gives no gradient, None where there is none.
        transposed: The parameter is stored (D, V).
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
    """One vocabulary-indexed memory of shape (V, D); rows are token ids.

    Attributes:
        name: Parameter name, or the tensor's key on disk.
        aliases: Other names over the same memory. In a checkpoint: names that loading ties to this table,
            whether they are stored again or not.
        shape: (V, D), whatever way round it is stored.
        dtype: safetensors' string, such as "BF16".
        sites: Where it is used.
        kind: "vocabulary", or "unknown" for a table that may as well hold positions: edited only when named.
        transposed: The names (of name and aliases) that are stored (D, V).
        files: In a checkpoint: stored name -> file, one entry for each stored copy. Empty in memory.
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
        """Paths of the modules that hold the table under any name, in the order of `names`."""
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
    """All tables of a model or checkpoint; the main input table comes first.

    Attributes:
        tables: Every table, of either kind.
        vocabularies: The tables of kind "vocabulary", grouped by the row numbers they share.
        input: Name of the table that the whole model looks its input ids up in, None where nothing says which.
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
        """The table with exactly this parameter name, among names and aliases.

        Raises:
            TableError: There is none; the message lists those there are.
        """
        try:
            return self._by_name[name]
        except KeyError:
            raise self.no_table(f"no table is called {name!r}") from None

    def find(self, name: str) -> Table | None:
        """As `table`, with None in place of an error."""
        return self._by_name.get(name)

    def vocabulary_of(self, table: Table) -> Vocabulary:
        """The vocabulary that a table is of.

        Raises:
            TableError: It is of none: its rows may stand for something else than tokens.
        """
        for vocabulary in self.vocabularies:
            if table.name in vocabulary.tables:
                return vocabulary
        raise self.no_table(f"{table.name} is not known to be a vocabulary")

    def select(self, targets: str | Iterable[str]) -> tuple[Table, ...]:
        """The tables that PEFT's ``target_modules`` mean, in the graph's order, each once.

        Args:
            targets: A list of names, each of which must fit a module or parameter whole or at its end after a dot
                ("embed_tokens" fits "model.embed_tokens"); or one string, a regular expression for whole
                module paths, or else a name as in a list.

        Raises:
            TableError: A target that fits no table.
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
                raise self.no_table(f"target_modules names {target!r}, which is no embedding table")
            chosen.extend(fits)
        return tuple(t for t in self.tables if t in chosen)

    def main_input(self) -> Table:
        """The table of the model's input ids: `input`, else the one called ``embed_tokens``, else the one vocabulary.

        Raises:
            TableError: Neither is there, or several are called so; the message lists the candidates.
        """
        if self.input is not None:
            return self.table(self.input)
        named = [t for t in self.tables if any(_ends(n, "embed_tokens") for n in t.modules)]
        if len(named) == 1:
            return named[0]
        vocabulary = [t for t in self.tables if t.kind == "vocabulary" and "input" in t.roles]
        if len(vocabulary) == 1:
            return vocabulary[0]
        raise self.no_table("which table holds the input embeddings is not known")

    def no_table(self, what: str) -> TableError:
        """An error that lists what there is to choose from."""
        found = ", ".join(f"{t.name} {list(t.shape)} ({t.kind})" for t in self.tables) or "no embedding table at all"
        hint = "name one in target_modules" if self.tables else None
        return TableError(what, where=self.source, found=found, hint=hint)


def _ends(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("." + suffix)

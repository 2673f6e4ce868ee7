"""Plans rows, per-token entries and heads for the virtual tokens of a baked soft prompt.

The rows of the lookup's table are the virtual tokens' vectors, divided by the factor that the lookup multiplies by.

In a head that is untied from the lookup, a virtual token's row is the mean of the known tokens' rows. Its logit is then
the mean of their logits. By Jensen's inequality its probability is at most 1 / number of known tokens for every hidden
state, and greedy decoding never selects it. No finite row is less likely for every hidden state. A head with a bias
stays tied, because a large negative bias does better.

Ids and texts of the tokens come from ``baking.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedsurgery.errors import UnsupportedError, warn
from embedsurgery.graph import Table, Vocabulary
from embedsurgery.initializers.initializer import NewToken, TableView
from embedsurgery.initializers.methods import Mean
from embedsurgery.plan import Edit, Grow, SetEntries, SetRows, Suppress, Token, Untie
from embedsurgery.surgeries.soft_prompt.bake_config import BakeConfig
from embedsurgery.surgeries.soft_prompt.lookup_scale import LookupScale, scale_of
from embedsurgery.surgeries.surgery import BakeContext
from embedsurgery.tensors.raw import RawArray
from embedsurgery.tokenizer.known import KnownTokens

INERT_BIAS = -10_000.0
"""Bias of tokens that are never to be generated: finite in fp16, and the exponential of such a logit is zero."""


@dataclass(frozen=True)
class VocabularyEdits:
    """Plans the edits of tables and vectors for new tokens.

    Attributes:
        context: The base.
        table: The lookup's table.
        vocabulary: The table's vocabulary.
        known: The tokens of the base's tokenizer.
        config: The options.
        new: The virtual tokens.
        prompt: Their vectors, F32 (n, D).
    """

    context: BakeContext
    table: Table
    vocabulary: Vocabulary
    known: KnownTokens
    config: BakeConfig
    new: Sequence[Token]
    prompt: np.ndarray[Any, np.dtype[np.float32]]

    def edits(self) -> Iterator[Edit]:
        """Yield the edits. They update `BakeContext.state`.

        Raises:
            UnsupportedError: The vocabulary's tables have different numbers of rows.
        """
        state, size = self.context.state, self.context.state.sizes[self.vocabulary.name]
        grown = max(size, max(token.id for token in self.new) + 1)
        multiple = self.config.pad_to_multiple_of
        if grown > size and multiple:
            grown = -(-grown // multiple) * multiple
        tables = self._tables()
        beyond = list(range(size, grown))
        spare = tuple(token.id for token in self.new if token.id < size)
        if beyond:
            rows = {name: self._rows_for(table, name, beyond) for name, table in tables.items()}
            entries = {name: self._inert_entries(len(beyond)) for name in self.vocabulary.vectors}
            yield Grow(self.vocabulary.name, len(beyond), rows, entries)
            state.sizes[self.vocabulary.name] = grown
        if spare:
            for name, table in tables.items():
                yield SetRows(name, spare, self._rows_for(table, name, spare))
            for name in self.vocabulary.vectors:
                yield SetEntries(name, spare, self._inert_entries(len(spare)))
        yield from self._untie_heads(tables, [*spare, *beyond])
        if any("output" in table.roles for table in tables.values()):
            yield Suppress(tuple(sorted({*spare, *beyond})))  # rows that only pad the table are no tokens either

    def _tables(self) -> dict[str, Table]:
        """Return name -> table of the vocabulary, with the heads that earlier edits untied."""
        found = {name: self.context.store.graph.table(name) for name in self.vocabulary.tables}
        shortest = min(found.values(), key=lambda table: table.shape[0])
        if shortest.shape[0] < self.vocabulary.size:  # a new id would be another token's row in the longer table
            raise UnsupportedError(
                "the tables of this vocabulary have different numbers of rows",
                where=shortest.name,
                expected=f"{self.vocabulary.size} rows",
                found=shortest.shape[0],
                hint="attach the prompt instead of baking it",
            )
        # A head untied by another prompt of the same merge is not in the store's graph yet. Its rows change as well.
        return found | {head: found[name] for name, head in self.context.state.untied_heads.items() if name in found}

    def _untie_heads(self, tables: Mapping[str, Table], ids: Sequence[int]) -> Iterator[Untie]:
        """Give each tied head a table of its own, unless a bias keeps the tokens from being generated."""
        for name, table in tables.items():
            outputs = [f"{site.module}.{site.parameter}" for site in table.sites if site.role == "output"]
            if not outputs or "input" not in table.roles or self._has_bias(table) or self.config.tied == "keep":
                continue
            if name in self.context.state.untied_heads or name in self.context.state.untied_heads.values():
                continue
            yield Untie(name, outputs[0], tuple(ids), self._mean_rows(table, len(ids)))
            self.context.state.untied_heads[name] = outputs[0]

    def _has_bias(self, table: Table) -> bool:
        """Whether every projection by a table has a bias of this vocabulary."""
        biases = [site.bias for site in table.sites if site.role == "output"]
        one = len(self.vocabulary.vectors) > 0 and len(biases) == 1
        return one or (bool(biases) and all(bias in self.vocabulary.vectors for bias in biases))

    def _rows_for(self, table: Table, name: str, ids: Sequence[int]) -> RawArray:
        """Return rows for some ids: the prompt's in the lookup's table, and else the mean of the known tokens' rows."""
        if name != self.table.name:
            return self._mean_rows(table, len(ids))
        rows = np.array(self._mean_rows(table, len(ids)).float32())
        place = {token.id: number for number, token in enumerate(self.new)}
        scale = self._lookup_scale().in_dtype(table.dtype)
        for number, index in enumerate(ids):
            if index in place:
                rows[number] = (self.prompt[place[index]].astype(np.float64) / scale).astype(np.float32)
        return RawArray.of(rows)

    def _mean_rows(self, table: Table, count: int) -> RawArray:
        # Rows behind the last known token belong to no token.
        known = min(self.known.next_id, table.shape[0])
        mean = self.context.state.means.get(table.name)
        if mean is None:
            view = TableView.of_table(self.context.store, table, known)
            mean = RawArray.of(Mean().rows(view, [NewToken("", 0)], None, []).astype(np.float32))
            self.context.state.means[table.name] = mean
        return mean.take([0] * count)

    def _inert_entries(self, count: int) -> RawArray:
        return RawArray.of(np.full(count, INERT_BIAS, dtype=np.float32))

    def _lookup_scale(self) -> LookupScale:
        scale = scale_of(self.table, self.context.store.config)
        if scale is None:
            warn(
                f"{self.context.store.name} does not say by which factor its lookup multiplies the rows of "
                f"{self.table.name}; using 1"
            )
            return LookupScale()
        return scale

"""What an initialiser is, and what it sees: new tokens, and a table by rows and by blocks.

An initialiser says which text it wants tokenised and gives rows; it reads no tokenizer, writes no table and knows no
store. A head's bias is a table of one column to it, so that every table and vector is initialised in its own space.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from embedsurgery.errors import ConfigError, TokenIndexError, UnsupportedError
from embedsurgery.graph import Role, Table
from embedsurgery.stores.store import Store, shorten
from embedsurgery.tensors.raw import EDITABLE, RawArray

ROWS = 256
"""Rows of a block. The same for every table and store: sums of floats depend on how they are grouped, and a seed
must give the same rows wherever the table lies and however much a store reads at a time."""


@dataclass(frozen=True)
class NewToken:
    """A token whose row is to start.

    Attributes:
        content: Its text; empty for a row of padding that no token names.
        id: Its row.
        parts: Ids of existing tokens: those of the text that the initialiser asked for.
    """

    content: str
    id: int
    parts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Ask:
    """What an initialiser wants to know of the tokenizer.

    Attributes:
        text: A text whose sub-tokens it wants.
        single: The text is to be one existing token: its content, or what the tokenizer makes one token of.
    """

    text: str
    single: bool = False


@dataclass(frozen=True)
class TableView:
    """A table, or a per-token vector as a table of one column, to be read.

    Attributes:
        name: The table's name in the store's graph; random rows depend on it.
        shape: (V, D); D is 1 for a vector.
        dtype: As stored, safetensors' string.
        roles: "input", "output" or both.
        known: How many of the first rows belong to tokens that the tokenizer had before. Only they count for
            means and scales: spare rows behind them hold whatever training left there.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    roles: tuple[Role, ...]
    known: int
    _block: Callable[[int, int], RawArray] = field(repr=False, compare=False)
    _rows: Callable[[tuple[int, ...]], RawArray] = field(repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.known <= self.shape[0]:
            raise ConfigError(
                "more tokens than the table has rows",
                where=self.name,
                expected=f"0 to {self.shape[0]}",
                found=self.known,
            )

    @classmethod
    def of_table(cls, store: Store, table: Table, known: int) -> TableView:
        """A view of one of the store's tables.

        Raises:
            UnsupportedError: Its rows are not plain numbers.
            ConfigError: It has fewer rows than ``known``.
        """
        store.check_editable(table)
        name = store.copies(table)[0]

        def block(start: int, stop: int) -> RawArray:
            return store.read_block(name, start, stop)

        def rows(indices: tuple[int, ...]) -> RawArray:
            return store.read_rows(name, indices)

        return cls(table.name, table.shape, table.dtype, table.roles, known, block, rows)

    @classmethod
    def of_vector(cls, store: Store, name: str, known: int, roles: tuple[Role, ...] = ("output",)) -> TableView:
        """A view (V, 1) of one of the store's per-token vectors, which is read once and held.

        Raises:
            UnsupportedError: Its entries are not plain numbers.
            ConfigError: It has fewer entries than ``known``.
        """
        vector = store.read_vector(name)
        if vector.dtype not in EDITABLE:
            raise UnsupportedError(
                "the entries of this vector cannot be set",
                where=f"{store.name}: {name}",
                expected=" or ".join(EDITABLE),
                found=vector.dtype,
            )

        def rows(indices: Sequence[int]) -> RawArray:
            part = vector.take(indices)
            return RawArray(part.dtype, (len(indices), 1), part.data)

        def block(start: int, stop: int) -> RawArray:
            return rows(range(start, stop))

        return cls(name, (vector.shape[0], 1), vector.dtype, roles, known, block, rows)

    def rows(self, indices: Sequence[int]) -> npt.NDArray[np.float32]:
        """Rows by number, (K, D), in the order of the indices; exact but for F64.

        Raises:
            TokenIndexError: The table does not have them.
        """
        bad = [i for i in indices if not 0 <= i < self.shape[0]]
        if bad:
            raise TokenIndexError(
                "rows that the table does not have",
                where=self.name,
                expected=f"0 to {self.shape[0] - 1}",
                found=shorten(bad),
            )
        return self._rows(tuple(int(i) for i in indices)).float32()

    def blocks(self) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """(start, rows (n, D)) of consecutive blocks of up to `ROWS` rows that cover the known rows and no others."""
        for start in range(0, self.known, ROWS):
            yield start, self._block(start, min(start + ROWS, self.known)).float32()


def sound(rows: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which rows of (n, D) hold neither NaN nor infinity, (n,)."""
    return np.asarray(np.isfinite(rows).all(axis=1))


class Initializer(ABC):
    """A way for new rows to start. Stateless; the first line of its docstring is shown to users."""

    def ask(self, token: NewToken, argument: str | None) -> Ask | None:
        """The text to tokenise for this token: its ids come back as ``token.parts``. None where none is needed."""
        return None

    @abstractmethod
    def rows(
        self,
        view: TableView,
        tokens: Sequence[NewToken],
        argument: str | None,
        streams: Sequence[np.random.Generator],
    ) -> npt.NDArray[Any]:
        """How the tokens' rows start in one table.

        Args:
            view: The table as it is.
            tokens: The n new tokens, with their parts.
            argument: What the user wrote behind the colon, None where the record names no argument.
            streams: A source of randomness for each token, of its own and for this table alone: what is drawn from
                it does not depend on the other tokens.

        Returns:
            float32 or float64 (n, D), in the order of the tokens.

        Raises:
            ConfigError: The rows cannot start like that in this table.
        """


@dataclass(frozen=True)
class InitializerRecord:
    """What the registry holds of an initialiser.

    Attributes:
        name: Its name, once among all plugins; no colon in it.
        initializer: The technique.
        argument: What its argument is called, such as "TOKEN": users then write NAME:TOKEN. None where it takes none.
    """

    name: str
    initializer: Initializer
    argument: str | None = None

    @property
    def usage(self) -> str:
        """How a user writes it."""
        return self.name if self.argument is None else f"{self.name}:{self.argument}"

    @property
    def summary(self) -> str:
        """The first line of the initialiser's docstring."""
        return (inspect.getdoc(type(self.initializer)) or "").partition("\n")[0]

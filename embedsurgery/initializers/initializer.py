"""`Initializer`, the contract of a method that computes initial rows, and the `TableView` that it reads.

An initialiser returns the text to tokenise and then the rows. It never accesses a tokenizer or a store, and writes
nothing. A head's bias is a table of one column to it, so every table and vector is initialised in its own space.
``initial_rows.py`` calls initialisers.
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

BLOCK_ROWS = 256
"""Rows per block, equal for every table and store.

The result of a sum of floats depends on how it is grouped, and a seed must give the same rows in every store.
"""


@dataclass(frozen=True)
class NewToken:
    """A token that needs an initial row.

    Attributes:
        content: Its text; empty for a padding row without a token.
        id: Its row.
        parts: Ids of the sub-tokens of the text that the initialiser asked for.
    """

    content: str
    id: int
    parts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Ask:
    """A request of an initialiser: the text whose sub-tokens it needs.

    Attributes:
        text: The text.
        single: Whether it must be one existing token: a token's content, or a text that the tokenizer encodes as one.
    """

    text: str
    single: bool = False


@dataclass(frozen=True)
class TableView:
    """A read-only view of a table, or of a per-token vector as a table of one column.

    Attributes:
        name: The table's name in the store's graph. Random rows depend on it.
        shape: (V, D); D is 1 for a vector.
        dtype: safetensors' string of the stored dtype.
        roles: "input", "output" or both.
        known: Number of the first rows, which belong to the tokenizer's existing tokens. Means and scales use only
            these: the spare rows after them have arbitrary values.
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
                "the number of known rows is invalid",
                where=self.name,
                expected=f"0 to {self.shape[0]}",
                found=self.known,
            )

    @classmethod
    def of_table(cls, store: Store, table: Table, known: int) -> TableView:
        """Return a view of one of the store's tables.

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
        """Return a view (V, 1) of one of the store's per-token vectors, which is read once and kept.

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
        """Read rows, fp32 (K, D), in the order of the indices. Exact for every dtype but F64.

        Raises:
            TokenIndexError: The table does not have the rows.
        """
        bad = [i for i in indices if not 0 <= i < self.shape[0]]
        if bad:
            raise TokenIndexError(
                "the table does not have these rows",
                where=self.name,
                expected=f"0 to {self.shape[0] - 1}",
                found=shorten(bad),
            )
        return self._rows(tuple(int(i) for i in indices)).float32()

    def blocks(self) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """Iterate (start, rows (n, D)) of consecutive blocks of at most `BLOCK_ROWS` rows that cover the known rows."""
        for start in range(0, self.known, BLOCK_ROWS):
            yield start, self._block(start, min(start + BLOCK_ROWS, self.known)).float32()


def find_finite_rows(rows: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return which rows of (n, D) have neither NaN nor infinity, (n,)."""
    return np.asarray(np.isfinite(rows).all(axis=1))


class Initializer(ABC):
    """A method that computes initial rows. Stateless; the first line of its docstring is shown to users."""

    def ask(self, token: NewToken, argument: str | None) -> Ask | None:
        """Return the text to tokenise for this token, None if none is needed. Its ids are then ``token.parts``."""
        return None

    @abstractmethod
    def rows(
        self,
        view: TableView,
        tokens: Sequence[NewToken],
        argument: str | None,
        streams: Sequence[np.random.Generator],
    ) -> npt.NDArray[Any]:
        """Compute the initial rows of the tokens in one table.

        Args:
            view: The table.
            tokens: The n new tokens, with their parts.
            argument: What the user wrote after the colon, None if the record has no argument.
            streams: A random stream for each token and this table, so that rows do not depend on other tokens.

        Returns:
            float32 or float64 (n, D), in the order of the tokens.

        Raises:
            ConfigError: The method does not apply to this table.
        """


@dataclass(frozen=True)
class InitializerRecord:
    """An initialiser in the registry.

    Attributes:
        name: Its name, unique among all plugins and without a colon.
        initializer: The initialiser.
        argument: Placeholder of its argument, such as "TOKEN" in NAME:TOKEN. None if it does not accept one.
    """

    name: str
    initializer: Initializer
    argument: str | None = None

    @property
    def usage(self) -> str:
        """What a user writes: NAME, or NAME:ARGUMENT."""
        return self.name if self.argument is None else f"{self.name}:{self.argument}"

    @property
    def summary(self) -> str:
        """The first line of the initialiser's docstring."""
        return (inspect.getdoc(type(self.initializer)) or "").partition("\n")[0]

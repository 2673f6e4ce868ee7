"""The contract of an initialiser of new rows, as a suite of tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from embedsurgery.initializers import NewToken, TableView, initial_rows, parse_init, with_parts
from embedsurgery.plan import SetRows
from embedsurgery.raw import RawArray
from embedsurgery.registry import registry
from embedsurgery.stores.base import Store
from embedsurgery.stores.tensors import module_store, state_dict_store
from embedsurgery.testing.base import Contract
from embedsurgery.testing.models import INPUT, ROWS, WIDTH, TinyModel, bits, state_bits

KNOWN = ROWS - 4
"""Rows of the kit's tables that belong to tokens; those behind them are spare, and hold what no row should start as."""


class InitializerContract(Contract):
    """What every initialiser holds to: a subclass names one as a user would.

    Attributes:
        init: NAME or NAME:ARGUMENT.
        tokens: Texts of new tokens; sub-tokens of a text are its words, ``t0`` to ``t19``.
        ids: Their rows: by default spare ones.
        draws: Whether another seed gives other rows.
    """

    init: str
    tokens: Sequence[str] = ("t3 t4", "t5", "t7 t8 t9")
    ids: Sequence[int] = (KNOWN, KNOWN + 1, KNOWN + 2)
    draws = False

    def make_store(self, tensors: Mapping[str, torch.Tensor]) -> Store:
        """A store over the kit's tensors."""
        return state_dict_store(tensors)

    def rows(self, store: Store, name: str = INPUT, *, seed: int = 0, only: slice = slice(None)) -> RawArray:
        """How the tokens' rows start in one table, (n, D)."""
        record, argument = parse_init(self.init, registry().initializers)
        known = {f"t{number}": number for number in range(KNOWN)}
        asked = [NewToken(text, index) for text, index in zip(self.tokens, self.ids, strict=True)][only]
        found = with_parts(record, argument, asked, lambda text: [known[w] for w in text.split()], known.get)
        view = TableView.of_table(store, store.graph.table(name), KNOWN)
        return initial_rows(record, argument, view, found, seed)

    def tensors(self, spare: float = 1000.0) -> dict[str, torch.Tensor]:
        """A model's tensors, with large numbers in the spare rows."""
        tensors = dict(TinyModel(tied=False).state_dict())
        for value in tensors.values():
            if value.shape == (ROWS, WIDTH):
                value[KNOWN:] = spare
        return tensors

    def test_shape_and_numbers(self) -> None:
        """A finite fp32 row a token, in every table, and the table as it was."""
        tensors = self.tensors()
        before = {name: bits(value) for name, value in tensors.items()}
        store = self.make_store(tensors)
        for table in store.graph.tables:
            rows = self.rows(store, table.name)
            assert (rows.dtype, rows.shape) == ("F32", (len(self.tokens), WIDTH))
            assert np.isfinite(rows.float32()).all()
        assert {name: bits(value) for name, value in tensors.items()} == before

    def test_the_same_again(self) -> None:
        """A seed gives the same rows each time, and another seed others only where the initialiser draws."""
        store = self.make_store(self.tensors())
        assert self.rows(store) == self.rows(store)
        assert (self.rows(store) != self.rows(store, seed=1)) == self.draws

    def test_a_row_does_not_depend_on_the_tokens_beside_it(self) -> None:
        """One at a time gives what all together give."""
        store = self.make_store(self.tensors())
        together = self.rows(store).float32()
        for number in range(len(self.tokens)):
            alone = self.rows(store, only=slice(number, number + 1)).float32()
            np.testing.assert_allclose(alone[0], together[number], rtol=1e-5, atol=1e-6)

    def test_spare_rows_do_not_count(self) -> None:
        """What training left behind the last token is in no mean and no scale."""
        if self.init == "current":
            pytest.skip("gives the spare rows themselves")
        few, many = (self.rows(self.make_store(self.tensors(spare))) for spare in (0.0, 1e6))
        assert few == many

    def test_the_same_wherever_the_table_lies(self) -> None:
        """In a model as in a state dict."""
        model = TinyModel(tied=False)
        model.load_state_dict(self.tensors())
        before = state_bits(model)
        assert self.rows(module_store(model)) == self.rows(self.make_store(self.tensors()))
        assert state_bits(model) == before

    def test_each_table_in_its_own_space(self) -> None:
        """Rows of a projection come from the projection: its scale is not the lookup's."""
        tensors: dict[str, Any] = self.tensors()
        tensors["lm_head.weight"] = tensors["lm_head.weight"] * 0
        rows = self.rows(self.make_store(tensors), "lm_head.weight").float32()
        if self.init != "current":
            assert np.abs(rows).max() < 1e-6

    def test_the_rows_can_be_set(self) -> None:
        """They are what a plan takes."""
        rows = self.rows(self.make_store(self.tensors()))
        assert SetRows(INPUT, tuple(self.ids), rows).rows.to("BF16").shape == rows.shape

"""The contract of an initialiser of new rows, as a suite of tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import embedsurgery as es
from embedsurgery.initializers import NewToken, TableView, initial_rows, parse_init, with_parts
from embedsurgery.plugins.current import registry
from embedsurgery.stores.modules import module_store
from embedsurgery.stores.state_dicts import state_dict_store
from embedsurgery.stores.store import Store
from embedsurgery.tensors.raw import RawArray
from embedsurgery.testing.base import Contract
from embedsurgery.testing.models import (
    DTYPES,
    INPUT,
    OUTPUT,
    ROWS,
    WIDTH,
    TinyModel,
    bits,
    model_config,
    state_bits,
    tokenizer_json,
)

KNOWN = ROWS - 4
"""Rows of the kit's tables that belong to tokens; those behind them are spare, and hold what no row should start as."""


class InitializerContract(Contract):
    """What every initialiser holds to: a subclass names one as a user would.

    Attributes:
        init: NAME or NAME:ARGUMENT.
        tokens: Texts of new tokens; sub-tokens of a text are its words, ``t0`` to ``t19``.
        ids: Their rows: by default spare ones.
        draws: Whether another seed gives other rows.
        takes_spare_rows: Whether the rows are what lies at their ids; else nothing behind the last token counts.
    """

    init: str
    tokens: Sequence[str] = ("t3 t4", "t5", "t7 t8 t9")
    ids: Sequence[int] = (KNOWN, KNOWN + 1, KNOWN + 2)
    draws = False
    takes_spare_rows = False

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
        """What training left behind the last token is in no mean and no scale; or is just what the rows are."""
        few, many = (self.rows(self.make_store(self.tensors(spare))) for spare in (0.0, 1e6))
        if self.takes_spare_rows:
            assert not few.float32().any()
            assert (many.float32() == 1e6).all()
        else:
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
        tensors[OUTPUT] = tensors[OUTPUT] * 0
        rows = self.rows(self.make_store(tensors), OUTPUT).float32()
        assert np.abs(rows).max() < 1e-6

    @pytest.mark.parametrize("dtype", ["F32", "F16"])
    def test_new_tokens_in_a_checkpoint_start_so(self, dtype: str, tmp_path: Path) -> None:
        """`add_tokens_checkpoint` gives them these rows, rounded once and finite, and leaves every other row."""
        before = {name: value.to(DTYPES[dtype]) for name, value in self.tensors().items()}
        store, known = self.make_store(before), tokenizer_json(KNOWN)
        places = [place for place, text in enumerate(self.tokens) if text not in known["model"]["vocab"]]
        wanted = {table.name: self.rows(store, table.name).take(places) for table in store.graph.tables}
        base = tmp_path / "base"
        base.mkdir()
        save_file(before, base / "model.safetensors", {"format": "pt"})
        (base / "config.json").write_text(json.dumps(model_config(tied=False)))
        (base / "tokenizer.json").write_text(json.dumps(known))
        texts = [self.tokens[place] for place in places]
        report = es.add_tokens_checkpoint(base, texts, tmp_path / "out", init=self.init)
        ids = [report.tokens[text] for text in texts]
        assert ids == list(range(KNOWN, KNOWN + len(ids)))
        after = load_file(tmp_path / "out" / "model.safetensors")
        for name, value in after.items():
            rest = [row for row in range(len(value)) if name not in wanted or row not in ids]
            assert bits(value[rest]) == bits(before[name][rest])
            if name in wanted:
                assert torch.isfinite(value[ids]).all()
                assert bits(value[ids]) == wanted[name].to(dtype).data

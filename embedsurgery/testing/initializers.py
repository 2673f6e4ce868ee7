"""The contract of an initialiser of new rows, as a test suite."""

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
from embedsurgery.initializers import NewToken, TableView, add_parts, compute_initial_rows, parse_init
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
"""Rows of the kit's tables that belong to tokens. The last four are spare, with values that no new row should have."""


class InitializerContract(Contract):
    """The tests that every initialiser passes. A subclass names the initialiser as a user would.

    Attributes:
        init: NAME or NAME:ARGUMENT.
        tokens: Texts of new tokens. A text's sub-tokens are its words, which are among ``t0`` to ``t19``.
        ids: Their rows, spare ones by default.
        draws: Whether the initialiser draws random numbers, so that another seed gives other rows.
        takes_spare_rows: Whether new rows are the table's current rows at their ids. Otherwise spare rows must not
            influence them.
    """

    init: str
    tokens: Sequence[str] = ("t3 t4", "t5", "t7 t8 t9")
    ids: Sequence[int] = (KNOWN, KNOWN + 1, KNOWN + 2)
    draws = False
    takes_spare_rows = False

    def make_store(self, tensors: Mapping[str, torch.Tensor]) -> Store:
        """Return a store over the kit's tensors."""
        return state_dict_store(tensors)

    def rows(self, store: Store, name: str = INPUT, *, seed: int = 0, only: slice = slice(None)) -> RawArray:
        """Return the tokens' new rows in one table, float32 (n, D)."""
        record, argument = parse_init(self.init, registry().initializers)
        known = {f"t{number}": number for number in range(KNOWN)}
        new = [NewToken(text, index) for text, index in zip(self.tokens, self.ids, strict=True)][only]
        tokens = add_parts(record, argument, new, lambda text: [known[w] for w in text.split()], known.get)
        view = TableView.of_table(store, store.graph.table(name), KNOWN)
        return compute_initial_rows(record, argument, view, tokens, seed)

    def tensors(self, spare: float = 1000.0) -> dict[str, torch.Tensor]:
        """Return a model's tensors, with ``spare`` in the spare rows."""
        tensors = dict(TinyModel(tied=False).state_dict())
        for value in tensors.values():
            if value.shape == (ROWS, WIDTH):
                value[KNOWN:] = spare
        return tensors

    def test_rows_are_finite_float32(self) -> None:
        """Every table gets one finite float32 row per token, and stays as it was."""
        tensors = self.tensors()
        before = {name: bits(value) for name, value in tensors.items()}
        store = self.make_store(tensors)
        for table in store.graph.tables:
            rows = self.rows(store, table.name)
            assert (rows.dtype, rows.shape) == ("F32", (len(self.tokens), WIDTH))
            assert np.isfinite(rows.float32()).all()
        assert {name: bits(value) for name, value in tensors.items()} == before

    def test_rows_depend_on_seed_only_if_drawn(self) -> None:
        """A seed gives the same rows each time; another seed gives other rows if and only if ``draws``."""
        store = self.make_store(self.tensors())
        assert self.rows(store) == self.rows(store)
        assert (self.rows(store) != self.rows(store, seed=1)) == self.draws

    def test_each_row_is_independent_of_other_tokens(self) -> None:
        """Tokens one at a time get the rows that they get together."""
        store = self.make_store(self.tensors())
        together = self.rows(store).float32()
        for number in range(len(self.tokens)):
            alone = self.rows(store, only=slice(number, number + 1)).float32()
            np.testing.assert_allclose(alone[0], together[number], rtol=1e-5, atol=1e-6)

    def test_spare_rows_are_ignored(self) -> None:
        """Values in spare rows do not change the new rows; if ``takes_spare_rows``, they are the new rows."""
        few, many = (self.rows(self.make_store(self.tensors(spare))) for spare in (0.0, 1e6))
        if self.takes_spare_rows:
            assert not few.float32().any()
            assert (many.float32() == 1e6).all()
        else:
            assert few == many

    def test_same_rows_in_model_and_state_dict(self) -> None:
        """A table of a model gives the rows that it gives in a state dict."""
        model = TinyModel(tied=False)
        model.load_state_dict(self.tensors())
        before = state_bits(model)
        assert self.rows(module_store(model)) == self.rows(self.make_store(self.tensors()))
        assert state_bits(model) == before

    def test_head_rows_come_from_the_head(self) -> None:
        """New rows of an untied head have the head's scale, here zero, and not that of the input table."""
        tensors: dict[str, Any] = self.tensors()
        tensors[OUTPUT] = tensors[OUTPUT] * 0
        rows = self.rows(self.make_store(tensors), OUTPUT).float32()
        assert np.abs(rows).max() < 1e-6

    @pytest.mark.parametrize("dtype", ["F32", "F16"])
    def test_add_tokens_checkpoint_writes_these_rows(self, dtype: str, tmp_path: Path) -> None:
        """`add_tokens_checkpoint` writes these rows, rounded once and finite, and keeps every other row."""
        before = {name: value.to(DTYPES[dtype]) for name, value in self.tensors().items()}
        store, known = self.make_store(before), tokenizer_json(KNOWN)
        positions = [position for position, text in enumerate(self.tokens) if text not in known["model"]["vocab"]]
        expected = {table.name: self.rows(store, table.name).take(positions) for table in store.graph.tables}
        base = tmp_path / "base"
        base.mkdir()
        save_file(before, base / "model.safetensors", {"format": "pt"})
        (base / "config.json").write_text(json.dumps(model_config(tied=False)))
        (base / "tokenizer.json").write_text(json.dumps(known))
        texts = [self.tokens[position] for position in positions]
        report = es.add_tokens_checkpoint(base, texts, tmp_path / "out", init=self.init)
        ids = [report.tokens[text] for text in texts]
        assert ids == list(range(KNOWN, KNOWN + len(ids)))
        after = load_file(tmp_path / "out" / "model.safetensors")
        for name, value in after.items():
            rest = [row for row in range(len(value)) if name not in expected or row not in ids]
            assert bits(value[rest]) == bits(before[name][rest])
            if name in expected:
                assert torch.isfinite(value[ids]).all()
                assert bits(value[ids]) == expected[name].to(dtype).data

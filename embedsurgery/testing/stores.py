"""The contract of a store, as a suite of tests."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from embedsurgery.errors import EmbedSurgeryError, PlanError, UnsupportedError
from embedsurgery.graph.architectures import ARCHITECTURES
from embedsurgery.plan import Blocks, Edit, Plan, SetBlocks, SetRows, Undo
from embedsurgery.plugins.hookspecs import StoreRecord
from embedsurgery.stores.apply import apply
from embedsurgery.stores.checks import check
from embedsurgery.stores.store import Store, rows_of
from embedsurgery.tensors.convert import from_raw, to_raw
from embedsurgery.tensors.raw import RawArray
from embedsurgery.testing.base import Contract
from embedsurgery.testing.models import DTYPES, INPUT, OUTPUT, bits

V, D = 11, 6
INDICES = (7, 0, 3)


class StoreContract(Contract):
    """What every store holds to: a subclass says how a home of tables is made, opened, and read by other means.

    Attributes:
        dtypes: The dtypes that it holds.
        ties: Whether the projection is the lookup's table: the homes that there are.
        record: What the registry holds of it, where it is a checkpoint format.
    """

    dtypes: ClassVar[tuple[str, ...]] = ("F32", "BF16", "F16", "F64")
    ties: ClassVar[tuple[bool, ...]] = (True, False)
    record: StoreRecord | None = None
    parameters: ClassVar[dict[str, str]] = {"dtype": "dtypes", "tied": "ties"}

    # -- what a subclass gives -----------------------------------------------------------------------------------

    @abstractmethod
    def make(self, folder: Path, tensors: Mapping[str, torch.Tensor], *, tied: bool) -> Any:
        """A home for tensors; of two names with one tensor it holds one memory, as its kind does."""

    @abstractmethod
    def open(self, home: Any) -> Store:
        """A new store over a home as it is now."""

    @abstractmethod
    def read(self, home: Any) -> dict[str, torch.Tensor]:
        """Copies of all tensors, by other means than the store's; a tie may be under either name, or both."""

    # -- what the tests are made of ------------------------------------------------------------------------------

    def home(self, folder: Path, *, tied: bool, dtype: str) -> Any:
        """A home of a small model, of random bit patterns: subnormals, infinities, NaNs with payloads."""
        embed = _patterns((V, D), dtype, 1)
        head = embed if tied else _patterns((V, D), dtype, 2)
        tensors = {
            INPUT: embed,
            "model.filler.weight": _patterns((3 * V, D), dtype, 3),
            "model.norm.weight": _patterns((D,), dtype, 4),
            OUTPUT: head,
        }
        (folder / "home").mkdir()
        return self.make(folder / "home", tensors, tied=tied)

    def edited(
        self, before: Mapping[str, torch.Tensor], indices: Any, rows: torch.Tensor, *, tied: bool, name: str = INPUT
    ) -> Any:
        """What `read` gives when rows of the lookup's table, or of the one that ``name`` names, have become others."""
        after = {name: value.clone() for name, value in before.items()}
        for changed in (INPUT, OUTPUT) if tied else (name,):
            if changed in after:
                after[changed][torch.tensor(list(indices))] = rows.to(after[changed].dtype)
        return after

    # -- the tests -----------------------------------------------------------------------------------------------

    def test_it_finds_the_tables(self, tied: bool, dtype: str, tmp_path: Path) -> None:
        """Of the right shape and dtype, tied where they are."""
        store = self.open(self.home(tmp_path, tied=tied, dtype=dtype))
        table = store.graph.table(INPUT)
        assert (table.shape, table.dtype) == ((V, D), dtype)
        assert (store.graph.find(OUTPUT) is table) == tied
        assert len(set(store.copies(table))) == len(store.copies(table)) > 0

    def test_rows_are_read_in_the_order_asked_for(self, tied: bool, dtype: str, tmp_path: Path) -> None:
        """Bit for bit."""
        home = self.home(tmp_path, tied=tied, dtype=dtype)
        store, held = self.open(home), self.read(home)[INPUT]
        for indices in ((5,), (9, 2, 10), tuple(range(V)), ()):
            assert bits(from_raw(rows_of(store, store.graph.table(INPUT), indices))) == bits(held[list(indices)])
        name = store.copies(store.graph.table(INPUT))[0]
        assert bits(from_raw(store.read_block(name, 2, 5))) == bits(held[2:5])

    @pytest.mark.parametrize("given", ["F32", "BF16", "F16"])
    def test_rows_are_rounded_once(self, tied: bool, dtype: str, given: str, tmp_path: Path) -> None:
        """And nothing else changes; the undo, saved and loaded, restores every bit, and can be undone."""
        home = self.home(tmp_path, tied=tied, dtype=dtype)
        before, rows = self.read(home), _rows(len(INDICES)).to(DTYPES[given])
        undo = apply(Plan((SetRows(INPUT, INDICES, to_raw(rows)),)), self.open(home))
        after = self.edited(before, INDICES, rows, tied=tied)
        _same(self.read(home), after)
        undo.save(tmp_path / "undo.safetensors")
        redo = apply(Undo.load(tmp_path / "undo.safetensors"), self.open(home))
        _same(self.read(home), before)
        apply(redo, self.open(home))
        _same(self.read(home), after)

    def test_whole_tables_go_block_by_block(
        self, tied: bool, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each block is made from the rows as they are; the undo comes from a file."""
        monkeypatch.setattr("embedsurgery.plan.blocks.BLOCK_BYTES", 100)
        home = self.home(tmp_path, tied=tied, dtype=dtype)
        before, rows, seen = self.read(home), _rows(V), []

        def block(start: int, stop: int, current: RawArray) -> RawArray:
            seen.append(current.data)
            return to_raw(rows[start:stop])

        undo = apply(Plan((SetBlocks(INPUT, Blocks((V, D), "F32", block)),)), self.open(home), spill=tmp_path)
        assert len(seen) > 1
        assert b"".join(seen) == bits(before[INPUT])
        _same(self.read(home), self.edited(before, range(V), rows, tied=tied))
        apply(undo, self.open(home), spill=tmp_path)
        _same(self.read(home), before)

    def test_a_block_that_fails_takes_everything_back(
        self, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """There is no half state."""
        monkeypatch.setattr("embedsurgery.plan.blocks.BLOCK_BYTES", 100)

        def block(start: int, stop: int, current: RawArray) -> RawArray:
            if stop == V:
                raise KeyboardInterrupt
            return to_raw(_rows(stop - start))

        home = self.home(tmp_path, tied=tied, dtype=self.dtypes[0])
        before = self.read(home)
        with pytest.raises(KeyboardInterrupt):
            apply(Plan((SetBlocks(INPUT, Blocks((V, D), "F32", block)),)), self.open(home), spill=tmp_path)
        _same(self.read(home), before)

    def test_the_projection_names_its_rows(self, tied: bool, tmp_path: Path) -> None:
        """A plan that names it edits the one table of a tied home, and else that of its own alone."""
        home = self.home(tmp_path, tied=tied, dtype=self.dtypes[0])
        before = self.read(home)
        apply(Plan((SetRows(OUTPUT, INDICES, to_raw(_rows(3))),)), self.open(home))
        _same(self.read(home), self.edited(before, INDICES, _rows(3), tied=tied, name=OUTPUT))

    @pytest.mark.parametrize("bad", ["past the end", "negative", "twice", "narrow", "integers", "no table", "overlap"])
    def test_a_bad_plan_is_refused_before_anything_changes(self, tied: bool, bad: str, tmp_path: Path) -> None:
        """With an error of embedsurgery's, on one line."""
        raw = to_raw(_rows(1))
        make: dict[str, Callable[[], tuple[Edit, ...]]] = {
            "past the end": lambda: (SetRows(INPUT, (V,), raw),),
            "negative": lambda: (SetRows(INPUT, (-1,), raw),),
            "twice": lambda: (SetRows(INPUT, (4, 4), to_raw(_rows(2))),),
            "narrow": lambda: (SetRows(INPUT, (4,), to_raw(_rows(1)[:, 1:])),),
            "integers": lambda: (SetRows(INPUT, (4,), to_raw(_rows(1).to(torch.int64))),),
            "no table": lambda: (SetRows("model.nowhere.weight", (4,), raw),),
            "overlap": lambda: (SetRows(INPUT, (4,), raw), SetRows(INPUT, (4,), raw)),
        }
        home = self.home(tmp_path, tied=tied, dtype=self.dtypes[0])
        before = self.read(home)
        for act in (check, apply):
            with pytest.raises(PlanError) as caught:
                act(Plan((SetRows(INPUT, (1,), raw), *make[bad]())), self.open(home))
            assert isinstance(caught.value, EmbedSurgeryError)
            assert "\n" not in str(caught.value)
        _same(self.read(home), before)

    def test_integers_are_refused(self, tmp_path: Path) -> None:
        """A quantised table is not what its rows say."""
        (tmp_path / "home").mkdir()
        table = torch.arange(V * D, dtype=torch.int8).reshape(V, D)
        home = self.make(tmp_path / "home", {INPUT: table.clone()}, tied=True)
        with pytest.raises(UnsupportedError):
            apply(Plan((SetRows(INPUT, (1,), to_raw(_rows(1))),)), self.open(home))
        _same(self.read(home), {INPUT: table})

    def test_the_record_knows_its_own(self, tmp_path: Path) -> None:
        """A checkpoint format recognises its directories and no others, and opens them; and it has a record."""
        home = self.home(tmp_path, tied=self.ties[0], dtype=self.dtypes[0])
        (tmp_path / "empty").mkdir()
        if self.record is None:
            assert not isinstance(home, (str, Path)), "a home on disk is a checkpoint format's: name its record"
            return
        assert self.record.recognises(tmp_path / "home")
        assert not self.record.recognises(tmp_path / "empty")
        assert self.record.open(tmp_path / "home", ARCHITECTURES).graph == self.open(home).graph


def _patterns(shape: tuple[int, ...], dtype: str, seed: int) -> torch.Tensor:
    """Random bit patterns of a dtype."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.Size(shape).numel() * DTYPES[dtype].itemsize
    data = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
    return data.view(DTYPES[dtype]).reshape(shape)


def _rows(count: int) -> torch.Tensor:
    """Numbers of every size, some of which overflow fp16."""
    generator = torch.Generator().manual_seed(9)
    size = 10.0 ** torch.randint(-9, 7, (count, D), generator=generator)
    return torch.randn((count, D), generator=generator) * size


def _same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Every byte of every tensor."""
    assert found.keys() == expected.keys()
    assert not [name for name in found if bits(found[name]) != bits(expected[name])]

"""The contract of a store, as a test suite."""

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
from embedsurgery.stores.checks import check_plan
from embedsurgery.stores.store import Store, rows_of
from embedsurgery.tensors.convert import from_raw, to_raw
from embedsurgery.tensors.raw import RawArray
from embedsurgery.testing.base import Contract
from embedsurgery.testing.models import DTYPES, INPUT, OUTPUT, bits

V, D = 11, 6
INDICES = (7, 0, 3)


class StoreContract(Contract):
    """The tests that every store passes.

    A subclass says how to make a home, the thing that a store is opened over (a directory, a model, a state dict), how
    to open it, and how to read it without the store.

    Attributes:
        dtypes: The dtypes that the store supports.
        ties: Whether to test homes whose head is tied to the input table, untied ones, or both.
        record: The `StoreRecord` of a checkpoint format, None for a store in memory.
    """

    dtypes: ClassVar[tuple[str, ...]] = ("F32", "BF16", "F16", "F64")
    ties: ClassVar[tuple[bool, ...]] = (True, False)
    record: StoreRecord | None = None
    parameters: ClassVar[dict[str, str]] = {"dtype": "dtypes", "tied": "ties"}

    # -- to implement in a subclass ------------------------------------------------------------------------------

    @abstractmethod
    def make(self, folder: Path, tensors: Mapping[str, torch.Tensor], *, tied: bool) -> Any:
        """Make a home of tensors in a folder. Two names with one tensor object are tied, as the format ties them."""

    @abstractmethod
    def open(self, home: Any) -> Store:
        """Open a new store over a home."""

    @abstractmethod
    def read(self, home: Any) -> dict[str, torch.Tensor]:
        """Return copies of all tensors, read without the store. A tied table may have either name, or both."""

    # -- helpers of the tests ------------------------------------------------------------------------------------

    def home(self, folder: Path, *, tied: bool, dtype: str) -> Any:
        """Make a home of a small model with random bit patterns: subnormals, infinities, NaNs with payloads."""
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

    def expect_rows(
        self, before: Mapping[str, torch.Tensor], indices: Any, rows: torch.Tensor, *, tied: bool, name: str = INPUT
    ) -> Any:
        """Return what `read` must give after rows of a table were set."""
        after = {name: value.clone() for name, value in before.items()}
        for changed in (INPUT, OUTPUT) if tied else (name,):
            if changed in after:
                after[changed][torch.tensor(list(indices))] = rows.to(after[changed].dtype)
        return after

    # -- the tests -----------------------------------------------------------------------------------------------

    def test_graph_has_the_tables(self, tied: bool, dtype: str, tmp_path: Path) -> None:
        """The graph has both tables with their shape and dtype, and their tie."""
        store = self.open(self.home(tmp_path, tied=tied, dtype=dtype))
        table = store.graph.table(INPUT)
        assert (table.shape, table.dtype) == ((V, D), dtype)
        assert (store.graph.find(OUTPUT) is table) == tied
        assert len(set(store.copies(table))) == len(store.copies(table)) > 0

    def test_rows_are_read_in_the_given_order(self, tied: bool, dtype: str, tmp_path: Path) -> None:
        """Rows come in the order of their indices, bit for bit; so do blocks."""
        home = self.home(tmp_path, tied=tied, dtype=dtype)
        store, table = self.open(home), self.read(home)[INPUT]
        for indices in ((5,), (9, 2, 10), tuple(range(V)), ()):
            assert bits(from_raw(rows_of(store, store.graph.table(INPUT), indices))) == bits(table[list(indices)])
        name = store.copies(store.graph.table(INPUT))[0]
        assert bits(from_raw(store.read_block(name, 2, 5))) == bits(table[2:5])

    @pytest.mark.parametrize("given", ["F32", "BF16", "F16"])
    def test_set_rows_rounds_once_and_is_undone(self, tied: bool, dtype: str, given: str, tmp_path: Path) -> None:
        """Rows are rounded once and nothing else changes. The undo, saved and loaded, restores every bit."""
        home = self.home(tmp_path, tied=tied, dtype=dtype)
        before, rows = self.read(home), _random_rows(len(INDICES)).to(DTYPES[given])
        undo = apply(Plan((SetRows(INPUT, INDICES, to_raw(rows)),)), self.open(home))
        after = self.expect_rows(before, INDICES, rows, tied=tied)
        _assert_same_bits(self.read(home), after)
        undo.save(tmp_path / "undo.safetensors")
        redo = apply(Undo.load(tmp_path / "undo.safetensors"), self.open(home))
        _assert_same_bits(self.read(home), before)
        apply(redo, self.open(home))
        _assert_same_bits(self.read(home), after)

    def test_set_blocks_is_undone(
        self, tied: bool, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A whole table is set block by block, each made from the current rows. The undo is kept in a file."""
        monkeypatch.setattr("embedsurgery.plan.blocks.BLOCK_BYTES", 100)  # several blocks per table
        home = self.home(tmp_path, tied=tied, dtype=dtype)
        before, rows, seen = self.read(home), _random_rows(V), []

        def block(start: int, stop: int, current: RawArray) -> RawArray:
            seen.append(current.data)
            return to_raw(rows[start:stop])

        undo = apply(Plan((SetBlocks(INPUT, Blocks((V, D), "F32", block)),)), self.open(home), spill=tmp_path)
        assert len(seen) > 1
        assert b"".join(seen) == bits(before[INPUT])
        _assert_same_bits(self.read(home), self.expect_rows(before, range(V), rows, tied=tied))
        apply(undo, self.open(home), spill=tmp_path)
        _assert_same_bits(self.read(home), before)

    def test_failed_block_restores_everything(
        self, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If a block fails, the blocks before it are restored."""
        monkeypatch.setattr("embedsurgery.plan.blocks.BLOCK_BYTES", 100)

        def block(start: int, stop: int, current: RawArray) -> RawArray:
            if stop == V:
                raise KeyboardInterrupt
            return to_raw(_random_rows(stop - start))

        home = self.home(tmp_path, tied=tied, dtype=self.dtypes[0])
        before = self.read(home)
        with pytest.raises(KeyboardInterrupt):
            apply(Plan((SetBlocks(INPUT, Blocks((V, D), "F32", block)),)), self.open(home), spill=tmp_path)
        _assert_same_bits(self.read(home), before)

    def test_plan_can_name_the_head(self, tied: bool, tmp_path: Path) -> None:
        """A plan that names the head edits the shared table if it is tied, and only the head's table if not."""
        home = self.home(tmp_path, tied=tied, dtype=self.dtypes[0])
        before = self.read(home)
        apply(Plan((SetRows(OUTPUT, INDICES, to_raw(_random_rows(3))),)), self.open(home))
        _assert_same_bits(self.read(home), self.expect_rows(before, INDICES, _random_rows(3), tied=tied, name=OUTPUT))

    @pytest.mark.parametrize("bad", ["past the end", "negative", "twice", "narrow", "integers", "no table", "overlap"])
    def test_invalid_plan_changes_nothing(self, tied: bool, bad: str, tmp_path: Path) -> None:
        """An invalid plan is refused by a `PlanError` on one line, before anything changes."""
        raw = to_raw(_random_rows(1))
        make: dict[str, Callable[[], tuple[Edit, ...]]] = {
            "past the end": lambda: (SetRows(INPUT, (V,), raw),),
            "negative": lambda: (SetRows(INPUT, (-1,), raw),),
            "twice": lambda: (SetRows(INPUT, (4, 4), to_raw(_random_rows(2))),),
            "narrow": lambda: (SetRows(INPUT, (4,), to_raw(_random_rows(1)[:, 1:])),),
            "integers": lambda: (SetRows(INPUT, (4,), to_raw(_random_rows(1).to(torch.int64))),),
            "no table": lambda: (SetRows("model.nowhere.weight", (4,), raw),),
            "overlap": lambda: (SetRows(INPUT, (4,), raw), SetRows(INPUT, (4,), raw)),
        }
        home = self.home(tmp_path, tied=tied, dtype=self.dtypes[0])
        before = self.read(home)
        for function in (check_plan, apply):
            with pytest.raises(PlanError) as caught:
                function(Plan((SetRows(INPUT, (1,), raw), *make[bad]())), self.open(home))
            assert isinstance(caught.value, EmbedSurgeryError)
            assert "\n" not in str(caught.value)
        _assert_same_bits(self.read(home), before)

    def test_integer_table_is_refused(self, tmp_path: Path) -> None:
        """Rows of a table of integers cannot be set: a quantised table's values are not its stored numbers."""
        (tmp_path / "home").mkdir()
        table = torch.arange(V * D, dtype=torch.int8).reshape(V, D)
        home = self.make(tmp_path / "home", {INPUT: table.clone()}, tied=True)
        with pytest.raises(UnsupportedError):
            apply(Plan((SetRows(INPUT, (1,), to_raw(_random_rows(1))),)), self.open(home))
        _assert_same_bits(self.read(home), {INPUT: table})

    def test_record_recognises_and_opens(self, tmp_path: Path) -> None:
        """A checkpoint format has a record, which recognises and opens its directories and no others."""
        home = self.home(tmp_path, tied=self.ties[0], dtype=self.dtypes[0])
        (tmp_path / "empty").mkdir()
        if self.record is None:
            assert not isinstance(home, (str, Path)), "the home is a path, so this is a checkpoint format: set record"
            return
        assert self.record.recognises(tmp_path / "home")
        assert not self.record.recognises(tmp_path / "empty")
        assert self.record.open(tmp_path / "home", ARCHITECTURES).graph == self.open(home).graph


def _patterns(shape: tuple[int, ...], dtype: str, seed: int) -> torch.Tensor:
    """Return random bit patterns of a dtype."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.Size(shape).numel() * DTYPES[dtype].itemsize
    data = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
    return data.view(DTYPES[dtype]).reshape(shape)


def _random_rows(count: int) -> torch.Tensor:
    """Return numbers of all magnitudes, some of which overflow fp16."""
    generator = torch.Generator().manual_seed(9)
    size = 10.0 ** torch.randint(-9, 7, (count, D), generator=generator)
    return torch.randn((count, D), generator=generator) * size


def _assert_same_bits(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert not [name for name in found if bits(found[name]) != bits(expected[name])]

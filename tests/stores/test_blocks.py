"""Edits of whole tables: bounded memory, blocks computed from the current rows, and the temporary file of the undo."""

from __future__ import annotations

import contextlib
import gc
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from embedsurgery.errors import CheckpointError, PlanError
from embedsurgery.plan import Blocks, Plan, SetBlocks, SetRows
from embedsurgery.stores.apply import apply
from embedsurgery.tensors.convert import from_raw, to_raw
from embedsurgery.tensors.raw import RawArray
from tests.support.comparing import bits
from tests.support.errors import raises
from tests.support.homes import DTYPES, EMBED, HOMES, Case, FileCase

ROWS, WIDTH, BLOCK = 1000, 8, 4096
CASES = [
    (home, layout, dtype)
    for home, kind in HOMES.items()
    for layout in kind.layouts
    for dtype in ("F32", "BF16")
    if layout != "transposed"
]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedsurgery.plan.blocks.BLOCK_BYTES", BLOCK)


@pytest.fixture
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    home, layout, dtype = request.param
    (tmp_path / "home").mkdir()
    made = HOMES[home].make(tmp_path / "home", layout, DTYPES[dtype], rows=ROWS, width=WIDTH)
    numbers = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(3))  # NaN + 1 proves nothing
    apply(Plan((SetRows(made.table, tuple(range(ROWS)), to_raw(numbers)),)), made.store())
    return made


class Halve:
    """Computes new rows from current ones, and records its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, RawArray]] = []

    def __call__(self, start: int, stop: int, current: RawArray) -> RawArray:
        self.calls.append((start, stop, current))
        return to_raw(from_raw(current).float() * 0.5 + 1)


@pytest.mark.parametrize("case", CASES, ids=["-".join(c).replace(" ", "_") for c in CASES], indirect=True)
def test_a_delta_runs_in_bounded_memory(case: Case, tmp_path: Path) -> None:
    before, halve = case.read(), Halve()
    undo = apply(Plan((SetBlocks(case.table, Blocks((ROWS, WIDTH), "F32", halve)),)), case.store(), spill=tmp_path)
    held = before[case.stored[0]]
    after = case.read()
    for name, tensor in after.items():
        expected = (held.float() * 0.5 + 1).to(held.dtype) if name in case.stored else before[name]
        assert bits(tensor) == bits(expected), name
    starts = [start for start, _, _ in halve.calls]
    stops = [stop for _, stop, _ in halve.calls]
    assert starts == [0, *stops[:-1]]
    assert stops[-1] == ROWS
    assert len(halve.calls) > 3
    assert max(len(current.data) for _, _, current in halve.calls) <= BLOCK
    assert b"".join(current.data for _, _, current in halve.calls) == bits(held)
    assert apply(undo, case.store(), spill=tmp_path).edits[0].table == case.table
    assert {n: bits(t) for n, t in case.read().items()} == {n: bits(t) for n, t in before.items()}


@pytest.mark.parametrize("home", HOMES)
def test_the_file_of_an_undo_is_removed_with_it(home: str, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "spill").mkdir()
    case = HOMES[home].make(tmp_path / "home", "untied", torch.float32, rows=ROWS, width=WIDTH)
    undo = apply(
        Plan((SetBlocks(EMBED, Blocks((ROWS, WIDTH), "F32", Halve())),)), case.store(), spill=tmp_path / "spill"
    )
    assert sum(p.stat().st_size for p in (tmp_path / "spill").rglob("*") if p.is_file()) > ROWS * WIDTH * 4
    del undo
    gc.collect()
    assert list((tmp_path / "spill").rglob("*")) == []


def test_the_file_of_an_undo_is_in_the_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    case = HOMES["state dict"].make(tmp_path, "untied", torch.float32, rows=ROWS, width=WIDTH)
    undo = apply(Plan((SetBlocks(EMBED, Blocks((ROWS, WIDTH), "F32", Halve())),)), case.store())
    (folder,) = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    redo = apply(undo, case.store())
    del undo, redo
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_edit_leaves_no_spill(tmp_path: Path) -> None:
    def block(start: int, stop: int, current: RawArray) -> RawArray:
        raise ValueError("no")

    case = HOMES["state dict"].make(tmp_path, "untied", torch.float32, rows=ROWS, width=WIDTH)
    with contextlib.suppress(ValueError):
        apply(Plan((SetBlocks(EMBED, Blocks((ROWS, WIDTH), "F32", block)),)), case.store(), spill=tmp_path)
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_spill_leaves_no_spill(tmp_path: Path) -> None:
    """The file becomes shorter between opening and reading, so saving the old rows fails half way."""
    for name in ("home", "spill"):
        (tmp_path / name).mkdir()
    case = HOMES["file"].make(tmp_path / "home", "untied", torch.float32, rows=ROWS, width=WIDTH)
    assert isinstance(case, FileCase)
    store = case.store()
    with open(case.files()[0], "r+b") as file:
        file.truncate(store.checkpoint.entry(EMBED).begin + ROWS * WIDTH * 2)  # type: ignore[attr-defined]
    with raises(CheckpointError, expected="bytes at"):
        apply(Plan((SetBlocks(EMBED, Blocks((ROWS, WIDTH), "F32", Halve())),)), store, spill=tmp_path / "spill")
    gc.collect()
    assert list((tmp_path / "spill").iterdir()) == []


def test_computed_blocks_cannot_be_saved(tmp_path: Path) -> None:
    plan = Plan((SetBlocks(EMBED, Blocks((ROWS, WIDTH), "F32", Halve())),))
    with raises(PlanError, where=EMBED):
        plan.save(tmp_path / "plan.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_whose_blocks_cannot_be_read_leaves_no_file(tmp_path: Path) -> None:
    rows = RawArray.of(np.ones((ROWS, WIDTH), np.float32))
    Plan((SetBlocks(EMBED, Blocks.of(rows)),)).save(tmp_path / "one.safetensors")
    plan = Plan.load(tmp_path / "one.safetensors")
    with open(tmp_path / "one.safetensors", "r+b") as file:
        file.truncate(ROWS * WIDTH * 3)
    with raises(CheckpointError, expected="bytes at"):
        plan.save(tmp_path / "two.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["one.safetensors"]

"""The contract of a store, tested in every home, layout and dtype (see ``homes.py``)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from embedsurgery.errors import EmbedSurgeryError, PlanError, UnsupportedError
from embedsurgery.plan import AddTokens, Blocks, Edit, PatchFile, Plan, SetBlocks, SetRows, Token, Undo
from embedsurgery.stores.apply import apply
from embedsurgery.stores.checks import check_plan
from embedsurgery.stores.store import rows_of
from embedsurgery.tensors.convert import from_raw, to_raw
from embedsurgery.tensors.raw import RawArray
from tests.support.comparing import bits
from tests.support.errors import check_error, raises
from tests.support.homes import DTYPES, EMBED, FLOATS, HEAD, HOMES, LAST, Case, D, V, W
from tests.support.store_rows import assert_same, new_rows, raw

INDICES = (7, 0, 3)
ALL = [(home, layout, dtype) for home, kind in HOMES.items() for layout in kind.layouts for dtype in FLOATS]
EACH_LAYOUT = [(home, layout, "BF16") for home, kind in HOMES.items() for layout in kind.layouts]
"""For tests whose result does not depend on the dtype."""


def _ids(cases: list[tuple[str, str, str]]) -> list[str]:
    return ["-".join(case).replace(" ", "_") for case in cases]


@pytest.fixture
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    home, layout, dtype = request.param
    folder = tmp_path / "home"
    folder.mkdir()
    return HOMES[home].make(folder, layout, DTYPES[dtype])


every = pytest.mark.parametrize("case", ALL, ids=_ids(ALL), indirect=True)
each_layout = pytest.mark.parametrize("case", EACH_LAYOUT, ids=_ids(EACH_LAYOUT), indirect=True)


def set_rows(case: Case, indices: tuple[int, ...] = INDICES, table: str | None = None) -> SetRows:
    return SetRows(table or case.table, indices, to_raw(new_rows(len(indices))))


@every
@pytest.mark.parametrize("given", FLOATS)
def test_rows_are_rounded_once_and_nothing_else_changes(case: Case, given: str) -> None:
    rows = new_rows(len(INDICES), dtype=DTYPES[given])
    before, identity = case.read(), case.identity()
    apply(Plan((SetRows(case.table, INDICES, to_raw(rows)),)), case.store())
    assert_same(case.read(), case.expect_edited(before, INDICES, rows))
    assert case.identity() == identity


@every
def test_undo_restores_every_bit(case: Case, tmp_path: Path) -> None:
    before, identity = case.read(), case.identity()
    undo = apply(Plan((set_rows(case),)), case.store())
    undo.save(tmp_path / "undo.safetensors")
    edited = case.read()
    redo = apply(undo, case.store())
    assert_same(case.read(), before)
    apply(redo, case.store())
    assert_same(case.read(), edited)
    loaded = Undo.load(tmp_path / "undo.safetensors")
    assert loaded == undo
    apply(loaded, case.store())
    assert_same(case.read(), before)
    assert case.identity() == identity


@every
def test_blocks_set_every_row_and_undo(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedsurgery.plan.blocks.BLOCK_BYTES", 100)
    before, identity, rows = case.read(), case.identity(), new_rows(V)
    undo = apply(Plan((SetBlocks(case.table, Blocks.of(to_raw(rows))),)), case.store(), spill=tmp_path)
    edited = case.expect_edited(before, range(V), rows)
    assert_same(case.read(), edited)
    undo.save(tmp_path / "undo.safetensors")
    apply(undo, case.store(), spill=tmp_path)
    assert_same(case.read(), before)
    apply(Plan((SetBlocks(case.table, Blocks.of(to_raw(rows))),)), case.store(), spill=tmp_path)
    del undo
    apply(Undo.load(tmp_path / "undo.safetensors"), case.store(), spill=tmp_path)
    assert_same(case.read(), before)
    assert case.identity() == identity


@every
def test_rows_are_read_in_the_order_of_the_indices(case: Case) -> None:
    store = case.store()
    table = store.graph.table(case.table)
    held = case.read()[case.stored[0]]
    assert (table.shape, table.dtype) == ((V, D), to_raw(held).dtype)
    for indices in ((5,), (9, 2, 10), tuple(range(V)), ()):
        found = rows_of(store, table, indices)
        assert found.shape == (len(indices), D)
        assert bits(from_raw(found)) == bits(held[list(indices)])


@each_layout
def test_a_tie_has_one_table_with_its_names(case: Case) -> None:
    graph = case.store().graph
    names = {name: table.name for table in graph.tables for name in table.names}
    assert {EMBED, HEAD} <= names.keys()
    tied = len(case.stored) > 1 or HEAD not in case.read() or EMBED not in case.read()
    assert names[case.table] == case.table
    assert (names[HEAD] == names[EMBED]) == tied
    assert graph.table(case.table).roles == (("input", "output") if tied else ("input",))


@each_layout
def test_an_alias_names_the_same_rows(case: Case) -> None:
    store = case.store()
    for alias in store.graph.table(case.table).aliases:
        before = case.read()
        undo = apply(Plan((set_rows(case, table=alias),)), store)
        assert_same(case.read(), case.expect_edited(before, INDICES, new_rows(len(INDICES))))
        apply(undo, case.store())
        assert_same(case.read(), before)


@each_layout
def test_several_edits_and_one_without_rows(case: Case) -> None:
    before = case.read()
    plan = Plan((set_rows(case, (1,)), set_rows(case, (2, 0), LAST), set_rows(case, (4,)), set_rows(case, (), LAST)))
    undo = apply(plan, case.store())
    expected = case.expect_edited(case.expect_edited(before, (1,), new_rows(1)), (4,), new_rows(1))
    expected[LAST][[2, 0]] = new_rows(2).to(expected[LAST].dtype)
    assert_same(case.read(), expected)
    apply(undo, case.store())
    assert_same(case.read(), before)


def whole(table: str, rows: int = V, width: int = D) -> SetBlocks:
    return SetBlocks(table, Blocks.of(raw(rows, width)))


EditsOf = Callable[[Case], tuple[Edit, ...]]
OUT_OF_RANGE, TWICE = f"0 to {V - 1}", "each row once"
BAD: dict[str, tuple[EditsOf, type[EmbedSurgeryError], dict[str, object]]] = {
    "one past the end": (
        lambda c: (SetRows(c.table, (0, V), raw(2, D)),),
        PlanError,
        {"expected": OUT_OF_RANGE, "found": V},
    ),
    "negative": (
        lambda c: (SetRows(c.table, (-1,), raw(1, D)),),
        PlanError,
        {"expected": OUT_OF_RANGE, "found": -1},
    ),
    "duplicate": (
        lambda c: (SetRows(c.table, (4, 4), raw(2, D)),),
        PlanError,
        {"expected": TWICE, "found": 4},
    ),
    "overlap of two edits": (
        lambda c: (SetRows(c.table, (4, 5), raw(2, D)), set_rows(c, (6, 5))),
        PlanError,
        {"expected": TWICE, "found": 5},
    ),
    "overlap with the whole": (
        lambda c: (SetRows(c.table, (4,), raw(1, D)), whole(c.table)),
        PlanError,
        {"expected": TWICE, "found": 4},
    ),
    "the whole twice": (
        lambda c: (whole(c.table), whole(c.table)),
        PlanError,
        {"expected": TWICE, "found": 1},
    ),
    "too narrow": (
        lambda c: (SetRows(c.table, (4,), raw(1, D - 1)),),
        PlanError,
        {"expected": f"(1, {D})", "found": f"(1, {D - 1})"},
    ),
    "too few": (
        lambda c: (SetRows(c.table, (4, 5), raw(1, D)),),
        PlanError,
        {"expected": f"(2, {D})", "found": f"(1, {D})"},
    ),
    "flat": (
        lambda c: (SetRows(c.table, (4,), raw(D)),),
        PlanError,
        {"expected": f"(1, {D})", "found": f"({D},)"},
    ),
    "integers": (lambda c: (SetRows(c.table, (4,), raw(1, D, dtype="I64")),), PlanError, {"found": "I64"}),
    "bytes": (lambda c: (SetRows(c.table, (4,), raw(1, D, dtype="I8")),), PlanError, {"found": "I8"}),
    "no such table": (
        lambda c: (SetRows("model.nowhere.weight", (4,), raw(1, D)),),
        PlanError,
        {"expected": "model.nowhere.weight"},
    ),
    "no such table to fill": (
        lambda c: (whole("model.nowhere.weight"),),
        PlanError,
        {"expected": "model.nowhere.weight"},
    ),
    "not a table": (
        lambda c: (SetRows("model.norm.weight", (4,), raw(1, D)),),
        PlanError,
        {"expected": "model.norm.weight"},
    ),
    "whole, too few": (
        lambda c: (whole(c.table, V - 1),),
        PlanError,
        {"expected": [V, D], "found": [V - 1, D]},
    ),
    "whole, too wide": (
        lambda c: (whole(c.table, V, D + 1),),
        PlanError,
        {"expected": [V, D], "found": [V, D + 1]},
    ),
    "tokens without a tokenizer": (lambda c: (AddTokens((Token("<x>", 3),)),), EmbedSurgeryError, {}),
    "a file": (lambda c: (PatchFile("config.json", b"{}", b"[]"),), EmbedSurgeryError, {}),
    "a path": (lambda c: (PatchFile("../config.json", b"{}", None),), PlanError, {"found": "../config.json"}),
}
"""Edits that are refused, the type of the error, and its fields."""


@each_layout
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_edit_is_refused_before_anything_changes(case: Case, bad: str, tmp_path: Path) -> None:
    make, error, fields = BAD[bad]
    before, identity = case.read(), case.identity()
    plan = Plan((set_rows(case, (0,), LAST), set_rows(case, (1,)), *make(case), set_rows(case, (8,))))
    for act in (check_plan, apply):
        with pytest.raises(error) as caught:
            act(plan, case.store())
        check_error(caught.value, **fields)
    assert_same(case.read(), before)
    assert case.identity() == identity
    assert [p.name for p in tmp_path.iterdir()] == ["home"]


@each_layout
def test_a_block_that_raises_undoes_everything(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedsurgery.plan.blocks.BLOCK_BYTES", 100)

    def block(start: int, stop: int, current: RawArray) -> RawArray:
        if stop == V:
            raise KeyboardInterrupt
        return to_raw(new_rows(stop - start))

    before = case.read()
    edits = (set_rows(case, (0, 2), LAST), SetBlocks(case.table, Blocks((V, D), "F32", block)))
    with pytest.raises(KeyboardInterrupt):
        apply(Plan(edits), case.store(), spill=tmp_path / "home")
    assert_same(case.read(), before)


WRONG = {"a row short": (-1, D), "a row too many": (1, D), "too narrow": (0, D - 1), "too wide": (0, D + 1)}


@each_layout
@pytest.mark.parametrize("wrong", WRONG)
def test_a_block_of_the_wrong_shape_undoes_everything(case: Case, wrong: str, tmp_path: Path) -> None:
    before, (more, width) = case.read(), WRONG[wrong]
    blocks = Blocks((V, D), "F32", lambda start, stop, current: to_raw(new_rows(stop - start + more, width)))
    with raises(PlanError, where=case.table, found=width):
        apply(Plan((set_rows(case, (0, 2), LAST), SetBlocks(case.table, blocks))), case.store(), spill=tmp_path)
    assert_same(case.read(), before)


@each_layout
def test_a_failed_write_undoes_the_earlier_ones(case: Case) -> None:
    before = case.read()
    plan = Plan((set_rows(case, (1, 2)), set_rows(case, (5,)), set_rows(case, (0, 8), LAST)))
    with case.make_last_read_only(), pytest.raises((OSError, RuntimeError, EmbedSurgeryError)):
        apply(plan, case.store())
    assert_same(case.read(), before)


TYPES = [
    (home, dtype)
    for home in HOMES
    for dtype in ("int8", "uint8", "int32", "bool", "float8_e4m3fn", "float8_e5m2", "complex64")
]


@pytest.mark.parametrize(("home", "dtype"), TYPES)
@pytest.mark.parametrize("edit", [SetRows(EMBED, (1,), raw(1, D)), whole(EMBED)], ids=["rows", "whole"])
def test_other_dtypes_are_refused(home: str, dtype: str, edit: Edit, tmp_path: Path) -> None:
    table = torch.arange(V * D).reshape(V, D).to(getattr(torch, dtype))
    store = HOMES[home].make_store(tmp_path, table.clone())
    assert store.graph.table(EMBED).shape == (V, D)
    before = [p.read_bytes() for p in sorted(tmp_path.iterdir())]
    with raises(UnsupportedError, where=EMBED, expected="F64", found=store.graph.table(EMBED).dtype):
        apply(Plan((edit,)), store)
    assert [p.read_bytes() for p in sorted(tmp_path.iterdir())] == before


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_inv", "scales", "absmax"])
def test_a_table_with_scales_beside_it_is_refused(home: str, suffix: str, tmp_path: Path) -> None:
    name = EMBED.removesuffix("weight") + suffix
    beside = {name: torch.ones(V)}
    store = HOMES[home].make_store(tmp_path, torch.ones(V, D, dtype=torch.bfloat16), beside)
    with raises(UnsupportedError, where=EMBED, found=name):
        apply(Plan((SetRows(EMBED, (1,), raw(1, D)),)), store)


def test_the_shapes_of_the_suite_tell_rows_from_columns() -> None:
    assert len({V, D, W}) == 3

"""Growing a vocabulary, tested in every home, layout and dtype (see ``homes.py``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedsurgery.errors import PlanError
from embedsurgery.plan import Blocks, Edit, Grow, Plan, SetBlocks, SetEntries, SetRows, Undo
from embedsurgery.stores.apply import apply
from embedsurgery.stores.checks import check_plan
from embedsurgery.stores.store import rows_of
from embedsurgery.tensors.convert import from_raw, to_raw
from embedsurgery.tensors.raw import RawArray
from tests.support.comparing import bits, contents
from tests.support.errors import check_error, raises
from tests.support.homes import DTYPES, FLOATS, HOMES, LAST, Case, D, FileCase, ModuleCase, V, W
from tests.support.store_rows import assert_same, new_rows, raw

N = 3
ALL = [
    (home, layout, dtype, bias)
    for home, kind in HOMES.items()
    for layout in kind.layouts
    for dtype in FLOATS
    for bias in (True, False)
]
EACH_LAYOUT = [(home, layout, "BF16", True) for home, kind in HOMES.items() for layout in kind.layouts]


def _ids(cases: list[tuple[str, str, str, bool]]) -> list[str]:
    return ["-".join([*case[:3], "bias" if case[3] else "plain"]).replace(" ", "_") for case in cases]


@pytest.fixture
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    home, layout, dtype, bias = request.param
    folder = tmp_path / "home"
    folder.mkdir()
    return HOMES[home].make(folder, layout, DTYPES[dtype], **({} if bias else {"bias": False}))


every = pytest.mark.parametrize("case", ALL, ids=_ids(ALL), indirect=True)
each_layout = pytest.mark.parametrize("case", EACH_LAYOUT, ids=_ids(EACH_LAYOUT), indirect=True)


def growth(case: Case, count: int = N, dtype: str = "F32") -> Grow:
    """New rows for every table and entries for every vector of the main vocabulary, all different."""
    graph = case.store().graph
    vocabulary = graph.vocabulary_of(graph.table(case.table))
    numbers = iter(range(100))

    def values(*shape: int) -> RawArray:
        return to_raw((new_rows(shape[0], shape[1] if len(shape) > 1 else 1) + next(numbers)).reshape(shape)).to(dtype)

    rows = {name: values(count, D) for name in vocabulary.tables}
    return Grow(vocabulary.name, count, rows, {name: values(count) for name in vocabulary.vectors})


def expect_grown(case: Case, before: dict[str, torch.Tensor], edit: Grow) -> dict[str, torch.Tensor]:
    """The tensors that `read` must return after growing."""
    after = {name: tensor.clone() for name, tensor in before.items()}
    graph = case.store().graph
    of = {name: table for table in edit.rows for name in graph.table(table).names if name in before}
    for name, part in [(n, edit.rows[t]) for n, t in of.items()] + list(edit.vectors.items()):
        new = from_raw(part).to(before[name].dtype)
        turned = name in case.transposed
        after[name] = torch.cat([before[name], new.t() if turned else new], dim=1 if turned else 0)
    return after


def everything(case: Case) -> object:
    """Everything that an undo must restore: bytes of files, and integer attributes of modules."""
    if isinstance(case, FileCase):
        return contents(case.folder)
    if isinstance(case, ModuleCase):
        modules = case.model.named_modules()
        return {name: {k: v for k, v in vars(m).items() if type(v) is int} for name, m in modules}
    return sorted(case.read())


@every
def test_tables_and_vectors_grow_and_nothing_else_changes(case: Case) -> None:
    before, edit, store = case.read(), growth(case), case.store()
    expected = expect_grown(case, before, edit)
    apply(Plan((edit,)), store)
    assert_same(case.read(), expected)
    assert {n: t.shape for n, t in case.read().items()} == {n: t.shape for n, t in expected.items()}
    for graph in (store.graph, case.store().graph):
        vocabulary = graph.vocabulary_of(graph.table(case.table))
        assert {graph.table(name).shape for name in vocabulary.tables} == {(V + N, D)}
        assert vocabulary.size == V + N
        assert graph.table(LAST).shape == (W, D)
    assert store.graph.tables == case.store().graph.tables


@every
def test_undo_and_redo_and_a_plan_in_a_file(case: Case, tmp_path: Path) -> None:
    before, held, edit = case.read(), everything(case), growth(case)
    undo = apply(Plan((edit,)), case.store())
    undo.save(tmp_path / "undo.safetensors")
    after, held_after = case.read(), everything(case)
    redo = apply(undo, case.store())
    assert_same(case.read(), before)
    assert everything(case) == held
    redo.save(tmp_path / "redo.safetensors")
    apply(Undo.load(tmp_path / "redo.safetensors"), case.store())
    assert_same(case.read(), after)
    assert everything(case) == held_after
    loaded = Undo.load(tmp_path / "undo.safetensors")
    assert loaded == undo
    apply(loaded, case.store())
    assert_same(case.read(), before)
    assert everything(case) == held


@each_layout
@pytest.mark.parametrize("given", FLOATS)
def test_new_rows_are_rounded_once(case: Case, given: str) -> None:
    edit = growth(case, dtype=given)
    expected = expect_grown(case, case.read(), edit)
    apply(Plan((edit,)), case.store())
    assert_same(case.read(), expected)


@each_layout
def test_ties_stay_and_no_others_appear(case: Case) -> None:
    def ties(tensors: dict[str, torch.Tensor]) -> list[set[str]]:
        found: dict[int, set[str]] = {}
        for name, tensor in tensors.items():
            found.setdefault(tensor.untyped_storage().data_ptr(), set()).add(name)
        return sorted(found.values(), key=sorted)

    def memory() -> dict[str, torch.Tensor]:
        model = getattr(case, "model", None)
        return dict(model.named_parameters(remove_duplicate=False)) if model is not None else dict(case.values)  # type: ignore[attr-defined]

    if isinstance(case, FileCase):
        before = [table.files for table in case.store().graph.tables]
        apply(Plan((growth(case),)), case.store())
        assert [table.files for table in case.store().graph.tables] == before
        return
    before = ties(memory())
    undo = apply(Plan((growth(case),)), case.store())
    assert ties(memory()) == before
    apply(undo, case.store())
    assert ties(memory()) == before


@each_layout
def test_later_edits_see_the_new_rows(case: Case, tmp_path: Path) -> None:
    before, held, edit = case.read(), everything(case), growth(case)
    rows = {name: new_rows(2) + 7 for name in edit.rows}
    first, last = to_raw(new_rows(1)), to_raw(new_rows(1) - 3)
    later = [SetRows(name, (V + 1, 2), to_raw(part)) for name, part in rows.items()]
    plan = Plan((SetRows(LAST, (1,), first), edit, *later, SetRows(LAST, (2,), last)))
    store = case.store()
    expected = expect_grown(case, before, edit)
    for name, part in rows.items():
        for alias in (n for n in store.graph.table(name).names if n in expected):
            view = expected[alias].t() if alias in case.transposed else expected[alias]
            view[[V + 1, 2]] = part.to(view.dtype)
    for index, part in ((1, first), (2, last)):
        expected[LAST][[index]] = from_raw(part).to(expected[LAST].dtype)
    undo = apply(plan, store)
    assert_same(case.read(), expected)
    table = store.graph.table(case.table)
    assert bits(from_raw(rows_of(store, table, (V + 1,)))) == bits(rows[table.name][:1].to(expected[case.table].dtype))
    undo.save(tmp_path / "undo.safetensors")
    apply(Undo.load(tmp_path / "undo.safetensors"), case.store())
    assert_same(case.read(), before)
    assert everything(case) == held


@each_layout
def test_a_whole_table_after_it_has_grown(case: Case, tmp_path: Path) -> None:
    before, held, edit = case.read(), everything(case), growth(case)
    whole = new_rows(V + N)
    undo = apply(Plan((edit, SetBlocks(case.table, Blocks.of(to_raw(whole))))), case.store(), spill=tmp_path)
    after = case.read()
    for name in case.stored:
        view = after[name].t() if name in case.transposed else after[name]
        assert bits(view) == bits(whole.to(view.dtype))
    apply(undo, case.store(), spill=tmp_path)
    assert_same(case.read(), before)
    assert everything(case) == held


@each_layout
def test_vectors_are_read_flat(case: Case) -> None:
    store = case.store()
    (name,) = store.graph.vocabulary_of(store.graph.table(case.table)).vectors
    found = store.read_vector(name)
    assert found.shape == (V,)
    assert bits(from_raw(found)) == bits(case.read()[name])


@each_layout
@pytest.mark.parametrize("given", FLOATS)
def test_entries_of_vectors(case: Case, given: str, tmp_path: Path) -> None:
    """They are set in every copy, before and after growing, rounded once to each dtype, and restored."""
    before, held, edit = case.read(), everything(case), growth(case)
    (name,) = case.store().graph.vocabulary_of(case.store().graph.table(case.table)).vectors
    early = RawArray.of(np.asarray([0.1, -3.7], np.float32)).to(given)
    late = RawArray.of(np.asarray([5.3], np.float32)).to(given)
    plan = Plan((SetEntries(name, (4, 1), early), edit, SetEntries(name, (V + 1,), late)))
    expected = expect_grown(case, before, edit)
    copies = [n for n in expected if expected[n].shape[-1] == V + N and n.endswith("bias")]
    assert name in copies
    for copy in copies:
        expected[copy][..., [4, 1]] = from_raw(early).to(expected[copy].dtype)
        expected[copy][..., [V + 1]] = from_raw(late).to(expected[copy].dtype)
    undo = apply(plan, case.store())
    assert_same(case.read(), expected)
    undo.save(tmp_path / "undo.safetensors")
    assert Undo.load(tmp_path / "undo.safetensors") == undo
    apply(Undo.load(tmp_path / "undo.safetensors"), case.store())
    assert_same(case.read(), before)
    assert everything(case) == held


@each_layout
def test_bad_entries_change_nothing(case: Case) -> None:
    before = everything(case)
    (name,) = case.store().graph.vocabulary_of(case.store().graph.table(case.table)).vectors
    one = RawArray.of(np.ones(1, np.float32))
    column, integers = RawArray.of(np.ones((1, 1), np.float32)), RawArray.of(np.ones(1, np.int64))
    bad: dict[str, tuple[SetEntries, dict[str, object]]] = {
        "past the end": (SetEntries(name, (V,), one), {"where": name, "expected": f"0 to {V - 1}", "found": V}),
        "negative": (SetEntries(name, (-1,), one), {"where": name, "expected": f"0 to {V - 1}", "found": -1}),
        "twice": (SetEntries(name, (1,), one), {"where": name, "expected": "once", "found": 1}),
        "too many": (SetEntries(name, (2, 3), one), {"where": name, "expected": "(2,)", "found": "(1,)"}),
        "a column": (SetEntries(name, (2,), column), {"where": name, "expected": "(1,)", "found": "(1, 1)"}),
        "integers": (SetEntries(name, (2,), integers), {"where": name, "found": "I64"}),
        "no vector": (SetEntries("nowhere.bias", (2,), one), {"expected": "nowhere.bias", "found": name}),
        "a table": (SetEntries(case.table, (2,), one), {"expected": case.table, "found": name}),
    }
    for kind, (edit, fields) in bad.items():
        with raises(PlanError, **fields):
            apply(Plan((SetEntries(name, (1,), one), edit)), case.store())
        assert everything(case) == before, kind


def _without(arrays: Any, name: str) -> dict[str, RawArray]:
    return {key: array for key, array in arrays.items() if key != name}


BAD: dict[str, Callable[[Case, Grow], tuple[Edit, ...]]] = {
    "no such vocabulary": lambda c, g: (replace(g, vocabulary="nowhere"),),
    "a table of no vocabulary": lambda c, g: (replace(g, vocabulary=LAST),),
    "no rows at all": lambda c, g: (replace(g, rows={}),),
    "no entries": lambda c, g: (replace(g, vectors={}),),
    "rows of another table": lambda c, g: (replace(g, rows={**g.rows, LAST: raw(N, D)}),),
    "a table missing": lambda c, g: (replace(g, rows=_without(g.rows, next(iter(g.rows)))),),
    "entries of another tensor": lambda c, g: (replace(g, vectors={**g.vectors, "model.norm.weight": raw(N)}),),
    "too few rows": lambda c, g: (replace(g, rows={n: raw(N - 1, D) for n in g.rows}),),
    "rows too narrow": lambda c, g: (replace(g, rows={n: raw(N, D - 1) for n in g.rows}),),
    "flat rows": lambda c, g: (replace(g, rows={n: raw(N * D) for n in g.rows}),),
    "rows of integers": lambda c, g: (replace(g, rows={n: raw(N, D, dtype="I64") for n in g.rows}),),
    "entries of bytes": lambda c, g: (replace(g, vectors={n: raw(N, dtype="I8") for n in g.vectors}),),
    "too many entries": lambda c, g: (replace(g, vectors={n: raw(N + 1) for n in g.vectors}),),
    "a count of 0": lambda c, g: (
        Grow(g.vocabulary, 0, {n: raw(0, D) for n in g.rows}, {n: raw(0) for n in g.vectors}),
    ),
    "all rows removed": lambda c, g: (Grow(g.vocabulary, -V, {}, {}),),
    "more than all rows removed": lambda c, g: (Grow(g.vocabulary, -V - 1, {}, {}),),
    "shrinking with rows": lambda c, g: (replace(g, count=-N),),
    "twice": lambda c, g: (g, g),
    "growing and shrinking": lambda c, g: (g, Grow(g.vocabulary, -N, {}, {})),
    "a row beyond": lambda c, g: (g, SetRows(c.table, (V + N,), raw(1, D))),
    "a new row before growing": lambda c, g: (SetRows(c.table, (V,), raw(1, D)), g),
    "a removed row": lambda c, g: (Grow(g.vocabulary, -N, {}, {}), SetRows(c.table, (V - 1,), raw(1, D))),
    "a whole table of the old shape": lambda c, g: (g, SetBlocks(c.table, Blocks.of(raw(V, D)))),
    "a new row twice": lambda c, g: (g, *[SetRows(c.table, (V,), raw(1, D))] * 2),
}


FIELDS: dict[str, dict[str, object]] = {
    "no such vocabulary": {"expected": "nowhere"},
    "rows of another table": {"found": LAST},
    "entries of another tensor": {"found": "model.norm.weight"},
    "too few rows": {"expected": f"({N}, {D})", "found": f"({N - 1}, {D})"},
    "rows too narrow": {"expected": f"({N}, {D})", "found": f"({N}, {D - 1})"},
    "flat rows": {"expected": f"({N}, {D})", "found": f"({N * D},)"},
    "rows of integers": {"found": "I64"},
    "entries of bytes": {"found": "I8"},
    "too many entries": {"expected": f"({N},)", "found": f"({N + 1},)"},
    "a count of 0": {"expected": f"-1 to {1 - V}", "found": 0},
    "all rows removed": {"expected": f"-1 to {1 - V}", "found": -V},
    "more than all rows removed": {"expected": f"-1 to {1 - V}", "found": -V - 1},
    "twice": {"expected": "one Grow"},
    "growing and shrinking": {"expected": "one Grow"},
    "a row beyond": {"expected": f"0 to {V + N - 1}", "found": V + N},
    "a new row before growing": {"expected": f"0 to {V - 1}", "found": V},
    "a removed row": {"expected": f"0 to {V - N - 1}", "found": V - 1},
    "a whole table of the old shape": {"expected": [V + N, D], "found": [V, D]},
    "a new row twice": {"expected": "each row once", "found": V},
}
"""Fields of the error, where they do not depend on the home."""


@each_layout
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_growth_is_refused_before_anything_changes(case: Case, bad: str) -> None:
    before, held, identity = case.read(), everything(case), case.identity()
    plan = Plan((SetRows(LAST, (0,), raw(1, D)), *BAD[bad](case, growth(case))))
    for act in (check_plan, apply):
        with pytest.raises(PlanError) as caught:
            act(plan, case.store())
        check_error(caught.value, **FIELDS.get(bad, {}))
    assert_same(case.read(), before)
    assert everything(case) == held
    assert case.identity() == identity


@each_layout
def test_a_failed_write_undoes_growing(case: Case) -> None:
    before, held, edit = case.read(), everything(case), growth(case)

    def block(start: int, stop: int, current: RawArray) -> RawArray:
        raise KeyboardInterrupt

    edits = (SetRows(case.table, (1,), raw(1, D)), edit, SetRows(case.table, (V, 0), raw(2, D)))
    plan = Plan((*edits, SetBlocks(LAST, Blocks((W, D), "F32", block))))
    with pytest.raises(KeyboardInterrupt):
        apply(plan, case.store())
    assert_same(case.read(), before)
    assert everything(case) == held


@each_layout
def test_shrinking_without_an_undo(case: Case) -> None:
    """A plan written by hand removes the last rows, and the sizes follow."""
    before = case.read()
    edit = growth(case)
    apply(Plan((Grow(edit.vocabulary, -2, {}, {}),)), case.store())
    after = case.read()
    table = case.store().graph.table(case.table)
    assert table.shape == (V - 2, D)
    for name in case.stored:
        kept = before[name][:, : V - 2] if name in case.transposed else before[name][: V - 2]
        assert bits(after[name]) == bits(kept)
    for name in set(before) - set(case.stored) - set(case.store().graph.table(case.table).names):
        assert after[name].shape[0] in (before[name].shape[0], V - 2)
        assert bits(after[name]) == bits(before[name][: after[name].shape[0]])


def test_the_suite_has_cases_with_and_without_vectors() -> None:
    assert {case[3] for case in ALL} == {True, False}

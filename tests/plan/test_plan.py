"""Plan files: a round trip of every edit, broken files, and plans applied to the small files of a checkpoint."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from embedsurgery.errors import CheckpointError, EmbedSurgeryError, PlanError
from embedsurgery.files.safetensors import TensorSource, encode_header, write_file
from embedsurgery.plan import AddTokens, Blocks, Edit, Grow, PatchFile, Plan, SetBlocks, SetRows, Token, Undo
from embedsurgery.plan.blocks import spans
from embedsurgery.stores.apply import apply
from embedsurgery.stores.shards import ShardStore
from embedsurgery.tensors.raw import RawArray
from tests.support.comparing import contents, tree
from tests.support.errors import raises

ODD = 't\u00e4ble \U0001f600 "quoted" \\ \n \x00 .weight'


def table(rows: int, width: int, dtype: str = "F32", seed: int = 0) -> RawArray:
    values = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    return RawArray.of(values, dtype)


def patch(path: str, after: bytes | None, before: bytes | None) -> PatchFile:
    return PatchFile.change(path, before, after)


EDITS: dict[str, Edit] = {
    "rows": SetRows("model.embed_tokens.weight", (7, 0, 3), table(3, 4)),
    "rows, bf16": SetRows("a.weight", (2**40,), table(1, 4, "BF16")),
    "rows, f64": SetRows("a.weight", (1,), RawArray.of(np.ones((1, 2)))),
    "no rows": SetRows("a.weight", (), table(0, 4)),
    "no width": SetRows("a.weight", (1, 2), table(2, 0)),
    "an odd name": SetRows(ODD, (1,), table(1, 2, "F16")),
    "blocks": SetBlocks("a.weight", Blocks.of(table(50, 3))),
    "blocks, bf16": SetBlocks("a.weight", Blocks.of(table(50, 3, "BF16"))),
    "no blocks": SetBlocks("a.weight", Blocks.of(table(0, 3))),
    "grow": Grow("a", 2, {"a": table(2, 3), ODD: table(2, 5, "BF16")}, {"bias": RawArray.of(np.ones(2, np.float32))}),
    "shrink": Grow("a", -2, {}, {}, {"a.safetensors": b"\x00\xff", "config.json": b"", ODD: b"x"}),
    "tokens": AddTokens((Token("<tool>", 9), Token(ODD, 10, special=True), Token("", 0))),
    "no tokens": AddTokens(()),
    "tokens removed": AddTokens((Token("<tool>", 9, replaces="[unused1]"), Token("b", 3, replaces="")), remove=True),
    "file": patch("config.json", b"\x00\xff new", b"old"),
    "empty file": patch("sub/x", b"", b""),
    "new file": patch("x", b"new", None),
    "file removed": patch(ODD, None, b"old"),
    "no file": patch("x", None, None),
}


def values(edit: Edit) -> Any:
    """An edit as plain values, with its blocks read."""
    if isinstance(edit, SetBlocks):
        blocks = edit.blocks
        nothing = RawArray(blocks.dtype, (0, blocks.shape[1]), b"")
        data = [blocks.block(a, b, nothing) for a, b in blocks.spans()]
        assert [part.shape[0] for part in data] == [b - a for a, b in blocks.spans()]
        return edit.table, blocks.shape, blocks.dtype, b"".join(part.data for part in data)
    return edit


@pytest.mark.parametrize("name", EDITS)
def test_every_edit_survives_a_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedsurgery.plan.blocks.BLOCK_BYTES", 100)
    path = tmp_path / "plan.safetensors"
    plan = Plan((EDITS[name],))
    plan.save(path)
    loaded = Plan.load(path)
    assert [values(edit) for edit in loaded.edits] == [values(edit) for edit in plan.edits]
    assert [type(edit) for edit in loaded.edits] == [type(EDITS[name])]
    assert loaded.describe() == plan.describe()
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_a_plan_of_all_edits_with_facts(tmp_path: Path) -> None:
    plan = Plan(tuple(EDITS.values()) * 2, {"adapter": ODD, "written": ["a", None, 1.5], "deep": {"x": [True]}})
    plan.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    assert [values(edit) for edit in loaded.edits] == [values(edit) for edit in plan.edits]
    assert loaded.facts == plan.facts
    with safe_open(tmp_path / "plan", "np") as file:
        assert json.loads(file.metadata()["embedsurgery.plan"])["format"] == 1
        assert file.get_tensor("0.rows").tobytes() == table(3, 4).data
        assert file.get_tensor("0.indices").tolist() == [7, 0, 3]


def test_no_edit_at_all(tmp_path: Path) -> None:
    Plan(()).save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan") == Plan(())


def test_a_plan_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "plan").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        Plan(()).save(tmp_path / "plan")
    assert (tmp_path / "plan").read_bytes() == b"mine"


@pytest.mark.parametrize(("rows", "pitch", "block"), [(10, 3, 7), (10, 100, 7), (1, 1, 1), (0, 4, 8), (5, 0, 3)])
def test_spans_cover_every_row_once(rows: int, pitch: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedsurgery.plan.blocks.BLOCK_BYTES", block)
    parts = list(spans(rows, pitch))
    assert [row for start, stop in parts for row in range(start, stop)] == list(range(rows))
    assert all(start < stop for start, stop in parts)
    assert all((stop - start) * pitch <= max(block, pitch) for start, stop in parts)


def write(path: Path, text: str, **tensors: RawArray) -> Path:
    path.unlink(missing_ok=True)
    write_file(path, {n: TensorSource.of(raw) for n, raw in tensors.items()}, {"embedsurgery.plan": text})
    return path


BODIES: dict[str, Any] = {
    "newer": {"format": 2, "edits": [], "facts": {}},
    "no format": {"edits": [], "facts": {}},
    "no facts": {"format": 1, "edits": []},
    "a list": [1],
    "null": None,
    "edits are null": {"format": 1, "edits": None, "facts": {}},
    "facts are a number": {"format": 1, "edits": [], "facts": 3},
    "an edit is a string": {"format": 1, "edits": ["SetRows"], "facts": {}},
    "an unknown edit": {"format": 1, "edits": [{"edit": "Eval"}], "facts": {}},
    "no tensors": {"format": 1, "edits": [{"edit": "SetRows", "table": "a"}], "facts": {}},
    "no blocks": {"format": 1, "edits": [{"edit": "SetBlocks", "table": "a"}], "facts": {}},
    "infinite id": {
        "format": 1,
        "edits": [{"edit": "AddTokens", "tokens": [{"content": "a", "id": float("inf"), "special": False}]}],
        "facts": {},
    },
    "infinite count": {
        "format": 1,
        "edits": [{"edit": "Grow", "vocabulary": "a", "count": float("inf"), "rows": [], "vectors": [], "saved": []}],
        "facts": {},
    },
    "no bytes": {
        "format": 1,
        "edits": [{"edit": "PatchFile", "path": "a", "removed": False, "before": None}],
        "facts": {},
    },
    "a hash that is a number": {
        "format": 1,
        "edits": [{"edit": "PatchFile", "path": "a", "removed": True, "before": 3}],
        "facts": {},
    },
    "replaces a number": {
        "format": 1,
        "edits": [
            {
                "edit": "AddTokens",
                "remove": False,
                "tokens": [{"content": "a", "id": 1, "special": False, "replaces": 3}],
            }
        ],
        "facts": {},
    },
}


FIELDS: dict[str, dict[str, Any]] = {
    "newer": {"expected": 1, "found": 2},
    "no format": {"found": "format"},
    "no facts": {"found": "facts"},
    "an unknown edit": {"found": "Eval"},
    "no tensors": {"found": "0.indices"},
    "no blocks": {"found": "0.blocks"},
    "infinite id": {"found": "OverflowError"},
    "infinite count": {"found": "OverflowError"},
    "no bytes": {"found": "0.after"},
    "a hash that is a number": {"found": "3"},
    "replaces a number": {"found": "3"},
}
"""Fields of the error, for bodies of which one value is wrong."""


@pytest.mark.parametrize("name", BODIES)
def test_a_broken_plan_is_refused(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "plan", json.dumps(BODIES[name]))
    with raises(PlanError, where=path, **FIELDS.get(name, {})):
        Plan.load(path)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"format":' * 5000, "1" * 5000, "NaN"])
def test_text_that_is_not_a_plan_is_refused(text: str, tmp_path: Path) -> None:
    with raises(PlanError, where=tmp_path / "plan"):
        Plan.load(write(tmp_path / "plan", text))


ROWS = {"format": 1, "edits": [{"edit": "SetRows", "table": "a"}], "facts": {}}
INDICES: dict[str, RawArray] = {
    "fractions": RawArray.of(np.array([1.5, 2.5])),
    "infinite": RawArray.of(np.array([np.inf, 1])),
    "nan": RawArray.of(np.array([np.nan, 1])),
    "a matrix": RawArray.of(np.array([[1, 2], [3, 4]])),
    "a column": RawArray.of(np.array([[1], [2]])),
    "a number": RawArray.of(np.array(3)),
    "bytes": RawArray("I8", (2,), b"\x01\x02"),
    "bits": RawArray("BF16", (2,), b"\x01\x00\x02\x00"),
}


@pytest.mark.parametrize("name", INDICES)
def test_indices_that_are_not_row_numbers_are_refused(name: str, tmp_path: Path) -> None:
    with raises(PlanError, where=tmp_path / "plan", found=repr(INDICES[name])):
        Plan.load(write(tmp_path / "plan", json.dumps(ROWS), **{"0.indices": INDICES[name], "0.rows": table(2, 3)}))


@pytest.mark.parametrize("shape", [(), (4,), (2, 2, 2)])
def test_blocks_that_are_not_a_matrix_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    body = {"format": 1, "edits": [{"edit": "SetBlocks", "table": "a"}], "facts": {}}
    with raises(PlanError, where=tmp_path / "plan"):
        Plan.load(write(tmp_path / "plan", json.dumps(body), **{"0.blocks": RawArray.of(np.ones(shape, np.float32))}))


def test_other_files_are_refused(tmp_path: Path) -> None:
    write_file(tmp_path / "model", {"a": TensorSource.of(table(1, 1))}, {"format": "pt"})
    with raises(PlanError, where=tmp_path / "model", found="embedsurgery.plan"):
        Plan.load(tmp_path / "model")
    (tmp_path / "text").write_text("hello, this is not a plan")
    for name in ("text", "missing", "."):
        with raises(CheckpointError, where=tmp_path / name):
            Plan.load(tmp_path / name)


_SETTINGS = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@_SETTINGS
@given(data=st.data())
def test_any_bytes_anywhere(tmp_path: Path, data: st.DataObject) -> None:
    """A file with changed bytes loads, or is refused by an embedsurgery error."""
    path = tmp_path / "whole"
    if not path.exists():
        Plan((EDITS["rows"], EDITS["grow"], EDITS["tokens"], EDITS["file"], EDITS["blocks"])).save(path)
    blob = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "broken").write_bytes(blob[: data.draw(st.sampled_from([None, None, 7, 50, len(blob) - 1]))])
    with contextlib.suppress(PlanError, CheckpointError):
        Plan.load(tmp_path / "broken")


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["SetRows", "SetBlocks", "Grow", "AddTokens", "PatchFile", "rows", "edits", "AAAA"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["edit", "table", "rows", "count", "tokens", "id", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@_SETTINGS
@given(data=st.data())
def test_any_value_anywhere(tmp_path: Path, data: st.DataObject) -> None:
    whole = tmp_path / "whole"
    if not whole.exists():
        Plan((EDITS["rows"], EDITS["grow"], EDITS["tokens"], EDITS["file"])).save(whole)
    blob = whole.read_bytes()
    size = 8 + int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8:size])
    body = json.loads(header["__metadata__"]["embedsurgery.plan"])
    place: Any = body
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.booleans()):
            place[key] = data.draw(_JSON)
            break
        place = place[key]
    header["__metadata__"]["embedsurgery.plan"] = json.dumps(body)
    text = json.dumps(header).encode()
    (tmp_path / "broken").write_bytes(len(text).to_bytes(8, "little") + text + blob[size:])
    with contextlib.suppress(PlanError, CheckpointError):
        Plan.load(tmp_path / "broken").describe()


# -- small files of a checkpoint ---------------------------------------------------------------------------------------


FILES = {
    "changed": patch("README.md", b"new", "kept byte for byte: \u00e9\r\n".encode()),
    "emptied": patch("README.md", b"", "kept byte for byte: \u00e9\r\n".encode()),
    "removed": patch("sub/deeper/empty", None, b""),
    "new": patch("added_tokens.json", b"{}", None),
    "deep": patch("sub/deeper/empty", b"\x00", b""),
    "nothing": patch("nowhere", None, None),
}


@pytest.mark.parametrize("name", FILES)
def test_a_small_file_changes_and_comes_back(name: str, base: Path, tmp_path: Path) -> None:
    edit, before = FILES[name], tree(base)
    undo = apply(Plan((edit,)), ShardStore.open(base))
    expected = {path: data for path, (data, _, _) in before.items()} | {edit.path: edit.after}
    assert contents(base) == {path: data for path, data in expected.items() if data is not None}
    assert all(tree(base)[p][1] == before[p][1] for p in before if p in tree(base))
    undo.save(tmp_path / "undo")
    apply(Undo.load(tmp_path / "undo"), ShardStore.open(base))
    assert contents(base) == {path: data for path, (data, _, _) in before.items()}


def test_several_files_and_rows_at_once(base: Path) -> None:
    before = contents(base)
    rows = SetRows("model.embed_tokens.weight", (1,), table(1, 16))
    undo = apply(Plan((FILES["changed"], rows, FILES["removed"], FILES["new"])), ShardStore.open(base))
    assert contents(base)["added_tokens.json"] == b"{}"
    apply(undo, ShardStore.open(base))
    assert contents(base) == before


@pytest.mark.parametrize(
    "edit",
    [
        patch("README.md", b"new", b"something else"),
        patch("README.md", b"new", None),
        patch("nowhere", b"new", b"old"),
        patch("../out", b"x", None),
        patch("/tmp/out", b"x", None),
        patch("sub/../../out", b"x", None),
        patch("", b"x", None),
        patch(".", b"x", None),
        patch("a\0b", b"x", None),
        patch("a//b", b"x", None),
        patch("link/out", b"x", None),
        patch("linked", b"x", b"outside"),
        patch("sub", b"x", None),
        patch("none/such/dir", b"x", None),
    ],
    ids=str,
)
def test_a_file_that_cannot_be_patched_changes_nothing(edit: PatchFile, base: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_bytes(b"outside")
    (base / "link").symlink_to(tmp_path / "outside")
    (base / "linked").symlink_to(tmp_path / "outside/file")
    before = contents(tmp_path)
    rows = SetRows("model.embed_tokens.weight", (1,), table(1, 16))
    with pytest.raises(EmbedSurgeryError):
        apply(Plan((FILES["removed"], rows, edit)), ShardStore.open(base))
    assert contents(tmp_path) == before


def test_a_file_patched_twice(base: Path) -> None:
    """The second patch sees what the first one wrote, or the plan is refused; it is never applied in part."""
    before = contents(base)
    was = (base / "README.md").read_bytes()
    first = patch("README.md", b"one", was)
    try:
        undo = apply(Plan((first, patch("README.md", b"two", b"one"))), ShardStore.open(base))
    except PlanError:
        assert contents(base) == before
    else:
        assert contents(base)["README.md"] == b"two"
        apply(undo, ShardStore.open(base))
        assert contents(base) == before
    with pytest.raises(PlanError):
        apply(Plan((first, patch("README.md", b"two", was))), ShardStore.open(base))
    assert contents(base) == before


def test_a_plans_header_is_plain_json() -> None:
    assert json.loads(encode_header({ODD: ("F32", (1,))}, {})[8:])[ODD]["shape"] == [1]

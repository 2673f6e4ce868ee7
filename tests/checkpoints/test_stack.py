"""Stacks of merges: exact unmerging in every possible order, merge records, and hashes of files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

import embedsurgery as es
from embedsurgery.checkpoints.hashes import hash_files
from embedsurgery.checkpoints.records import adapter_sha256
from embedsurgery.errors import CheckpointError, ConfigError, PlanError
from embedsurgery.plan import Undo
from embedsurgery.tensors.raw import RawArray
from tests.support.comparing import contents
from tests.support.errors import raises
from tests.support.made import make_adapter
from tests.support.models import INPUT, save, tiny
from tests.support.processes import cli

pytestmark = pytest.mark.filterwarnings("ignore:.*processes that have these files mapped")

EMBED = INPUT["llama-tied"]
RECORDS = ".embedsurgery/merges"


def plain(folder: Path) -> dict[str, bytes]:
    """Everything outside ``.embedsurgery``."""
    return {path: data for path, data in contents(folder).items() if not path.startswith(".embedsurgery/")}


def check_sound(folder: Path) -> None:
    assert [check for check in es.verify_checkpoint(folder) if not check.ok] == []


class Stack:
    """A checkpoint to merge into and unmerge from, each time into a new directory or in place."""

    def __init__(self, base: Path, folder: Path, in_place: bool = False) -> None:
        self.base, self.folder, self.in_place = base, folder, in_place
        self.count = 0
        self.now = base
        if in_place:
            self.now = folder / "here"
            es.merge_checkpoint(base, make_adapter(base, [0]), self.now)
            es.unmerge_checkpoint(self.now, in_place=True)

    def _output(self) -> dict[str, Any]:
        if self.in_place:
            return {"in_place": True}
        self.count += 1
        return {"output": self.folder / f"step{self.count}"}

    def _follow(self, output: dict[str, Any]) -> None:
        self.now = output.get("output", self.now)

    def merge(self, piece: str) -> None:
        output = self._output()
        if piece.startswith("<"):
            es.add_tokens_checkpoint(self.now, piece, init="zeros", **output)
        else:
            rows = {"a": [1, 2], "b": [5], "c": [9, 30, 4]}[piece]
            es.merge_checkpoint(
                self.now, make_adapter(self.base, rows, seed=ord(piece)).save(self.folder / piece), **output
            )
        self._follow(output)

    def unmerge(self, **which: Any) -> None:
        output = self._output()
        es.unmerge_checkpoint(self.now, **which, **output)
        self._follow(output)


def build(base: Path, folder: Path, pieces: Sequence[str]) -> dict[str, bytes]:
    stack = Stack(base, folder)
    for piece in pieces:
        stack.merge(piece)
    return plain(stack.now)


PIECES = ("a", "b", "<one>", "<two>")
"""Rows of two adapters, and two growths, of which only the last can be unmerged."""


ORDERS = [order for order in permutations(PIECES) if order.index("a") < order.index("b")]


@pytest.mark.parametrize("order", ORDERS, ids="".join)
def test_every_order(order: tuple[str, ...], tmp_path: Path) -> None:
    in_place, shards = ORDERS.index(order) % 2 == 1, ORDERS.index(order) % 4 > 1
    base = save(tiny("llama-untied"), tmp_path / "base", shards=shards)
    before = contents(base)
    stack = Stack(base, tmp_path, in_place)
    steps = [plain(stack.now)]
    for piece in order:
        stack.merge(piece)
        steps.append(plain(stack.now))
        check_sound(stack.now)
    whole = contents(stack.now)
    (tmp_path / "other").mkdir()
    for number, piece in enumerate(order, 1):
        rest = [other for other in order if other != piece]
        if piece == "<one>" or piece == "<two>":
            later = [other for other in order[number:] if other.startswith("<")]
            if later:
                name = f"merge {order.index(later[0]) + 1}"
                with raises(PlanError, where=f"merge {number}", found=f"{name} (add_tokens)"):
                    es.unmerge_checkpoint(stack.now, tmp_path / "none", adapter=str(number))
                continue
        out = tmp_path / f"without{number}"
        es.unmerge_checkpoint(stack.now, out, adapter=piece if piece.isalpha() else str(number))
        (tmp_path / f"fresh{number}").mkdir()
        assert plain(out) == build(base, tmp_path / f"fresh{number}", rest)
        check_sound(out)
        assert [r.number for r in es.list_merges(out)] == [n for n in (1, 2, 3, 4) if n != number]
        es.unmerge_checkpoint(out, tmp_path / f"all{number}", all=True)
        assert contents(tmp_path / f"all{number}") == before
    assert contents(stack.now) == whole
    es.unmerge_checkpoint(stack.now, tmp_path / "all", all=True)
    assert contents(tmp_path / "all") == before
    for count in (3, 2, 1, 0):
        stack.unmerge()
        assert plain(stack.now) == steps[count]
    assert contents(stack.now) == before


@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in place"])
def test_unmerging_from_under_others_and_merging_again(in_place: bool, base: Path, tmp_path: Path) -> None:
    """A merge unmerged from under others leaves a tombstone, which goes when no later merge is left."""
    stack = Stack(base, tmp_path, in_place)
    for piece in "abc":
        stack.merge(piece)
    stack.unmerge(adapter="b")
    tombstone = stack.now / RECORDS / "0002.removed.json"
    assert json.loads(tombstone.read_text()) == {
        "adapter": "b",
        "surgery": "trainable_tokens",
        "files": ["model.safetensors"],
    }
    stack.merge("b")
    assert [(r.number, r.adapter) for r in es.list_merges(stack.now)] == [(1, "a"), (3, "c"), (4, "b")]
    check_sound(stack.now)
    stack.unmerge()
    stack.unmerge(adapter="a")
    assert sorted(p.name for p in (stack.now / RECORDS).iterdir()) == [
        "0001.removed.json",
        "0002.removed.json",
        "0003.safetensors",
    ]
    check_sound(stack.now)
    stack.unmerge()
    assert contents(stack.now) == contents(base)


def test_a_removed_record_is_reported(base: Path, tmp_path: Path) -> None:
    stack = Stack(base, tmp_path)
    for piece in "abc":
        stack.merge(piece)
    (stack.now / RECORDS / "0002.safetensors").unlink()
    assert [c.name for c in es.verify_checkpoint(stack.now) if not c.ok] == ["merges"]


def test_adapters_are_named_by_name_number_or_hash(base: Path, tmp_path: Path) -> None:
    stack = Stack(base, tmp_path)
    for piece in "abc":
        stack.merge(piece)
    twin = make_adapter(base, [20], seed=3)
    es.merge_checkpoint(stack.now, twin.save(tmp_path / "sub" / "a"), tmp_path / "four")
    with raises(CheckpointError, expected="'a'", found="merge 1 (a), merge 4 (a)"):
        es.unmerge_checkpoint(tmp_path / "four", tmp_path / "out", adapter="a")
    with raises(CheckpointError, expected="'nobody'", found="merge 1 (a), merge 2 (b)"):
        es.unmerge_checkpoint(tmp_path / "four", tmp_path / "out", adapter="nobody")
    with raises(ConfigError, found=("all", "'a'")):
        es.unmerge_checkpoint(tmp_path / "four", tmp_path / "out", adapter="a", all=True)
    for number, which in enumerate(("1", adapter_sha256(make_adapter(base, [1, 2], seed=ord("a")))[:8])):
        es.unmerge_checkpoint(tmp_path / "four", tmp_path / f"out{number}", adapter=which)
        assert [r.number for r in es.list_merges(tmp_path / f"out{number}")] == [2, 3, 4]


def test_a_later_adapter_on_the_merged_rows_is_named(base: Path, tmp_path: Path) -> None:
    es.merge_checkpoint(base, make_adapter(base, [5, 6]).save(tmp_path / "first"), tmp_path / "one")
    second = make_adapter(tmp_path / "one", [6, 8], seed=2)
    es.merge_checkpoint(tmp_path / "one", second.save(tmp_path / "second"), tmp_path / "two")
    done = cli("unmerge", tmp_path / "two", "-o", tmp_path / "out", "--adapter", "first")
    assert done.returncode == 1
    assert "merge 2 (second)" in done.stderr
    assert "row 6 of model.embed_tokens.weight" in done.stderr
    assert cli("unmerge", tmp_path / "two", "-o", tmp_path / "x", "--adapter", "first", "--all").returncode == 2
    assert not (tmp_path / "out").exists()
    check_sound(tmp_path / "two")
    assert cli("unmerge", tmp_path / "two", "-o", tmp_path / "out", "--all").returncode == 0
    assert contents(tmp_path / "out") == contents(base)


def test_an_adapter_on_grown_rows_keeps_the_growth(base: Path, tmp_path: Path) -> None:
    es.add_tokens_checkpoint(base, "<one>", tmp_path / "grown")
    (index,) = es.list_merges(tmp_path / "grown")[0].tokens
    adapter = make_adapter(tmp_path / "grown", [3, index])
    es.merge_checkpoint(tmp_path / "grown", adapter, tmp_path / "two")
    check_sound(tmp_path / "two")
    with raises(PlanError, where="merge 1", found=("merge 2", f"row {index} of {EMBED}")):
        es.unmerge_checkpoint(tmp_path / "two", tmp_path / "none", adapter="1")
    es.add_tokens_checkpoint(tmp_path / "two", "<two>", tmp_path / "three")
    check_sound(tmp_path / "three")
    with raises(PlanError, where="merge 1", found="merge 3 (add_tokens)"):
        es.unmerge_checkpoint(tmp_path / "three", tmp_path / "none", adapter="1")
    es.unmerge_checkpoint(tmp_path / "three", tmp_path / "out", adapter="2")
    check_sound(tmp_path / "out")
    es.unmerge_checkpoint(tmp_path / "out", tmp_path / "back", all=True)
    assert contents(tmp_path / "back") == contents(base)


# -- log ---------------------------------------------------------------------------------------------------------------


def test_the_log_lists_the_merges(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, [11, 3])
    es.merge_checkpoint(base, [(adapter.save(tmp_path / "mine"), 0.5)], tmp_path / "one")
    es.add_tokens_checkpoint(tmp_path / "one", "<tool>", tmp_path / "two")
    first, second = es.list_merges(tmp_path / "two")
    assert (first.number, first.adapter, first.weight, first.surgery) == (1, "mine", 0.5, "trainable_tokens")
    assert first.adapter_sha256 == adapter_sha256(adapter)
    assert (first.base_model, first.rows, first.files) == ("org/base", {EMBED: 2}, ("model.safetensors",))
    assert first.tokens == {11: "t11", 3: "t3"}
    assert (first.version, first.time[:2] if first.time else "") == (es.__version__, "20")
    fingerprint = adapter.manifest.tables[0].fingerprint
    assert fingerprint is not None
    assert first.base[EMBED] == {"dtype": fingerprint.dtype, "sha256": dict(fingerprint.sha256)}
    assert (second.number, second.adapter, second.surgery, list(second.tokens.values())) == (
        2,
        None,
        "add_tokens",
        ["<tool>"],
    )
    assert set(second.files) == {"model.safetensors", "config.json", "tokenizer.json"}
    assert es.list_merges(base) == ()

    text = cli("log", tmp_path / "two")
    assert text.returncode == 0
    (line,) = (line for line in text.stdout.splitlines() if "mine" in line)
    assert text.stdout.index("add_tokens") < text.stdout.index(line)
    assert "0.5" in line
    merges = json.loads(cli("log", tmp_path / "two", "--json").stdout)["merges"]
    assert [m["number"] for m in merges] == [1, 2]
    assert merges[0]["base"] == {EMBED: first.base[EMBED]}
    none = cli("log", base)
    assert (none.returncode, none.stdout.count("\n")) == (0, 1)
    assert str(base) in none.stdout
    missing = cli("log", tmp_path / "nowhere")
    assert (missing.returncode, missing.stdout) == (1, "")


# -- hashes ------------------------------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


def bad(folder: Path) -> dict[str, str]:
    return {c.name: c.detail for c in es.verify_checkpoint(folder, full=True) if not c.ok}


def test_every_byte_against_what_was_recorded(tmp_path: Path) -> None:
    base = save(tiny("llama-untied"), tmp_path / "base", shards=True)
    es.merge_checkpoint(base, make_adapter(base, [5]).save(tmp_path / "a"), tmp_path / "merged", hashes=True)
    recorded = Undo.load(tmp_path / "merged" / RECORDS / "0001.safetensors").facts["sha256"]
    assert recorded == hash_files(tmp_path / "merged")
    assert recorded == {p: hashlib.sha256(d).hexdigest() for p, d in plain(tmp_path / "merged").items()}
    checks = es.verify_checkpoint(tmp_path / "merged", full=True)
    assert all(c.ok for c in checks)
    assert {c.name for c in checks} >= plain(tmp_path / "merged").keys()
    for path in sorted(plain(tmp_path / "merged")):
        size = (tmp_path / "merged" / path).stat().st_size
        if size == 0 or path.endswith(".json"):
            continue
        flip(tmp_path / "merged" / path, size - 1)
        assert list(bad(tmp_path / "merged")) == [path] or "merge 1" in bad(tmp_path / "merged")
        assert "merge 1 (a)" in bad(tmp_path / "merged")[path]
        assert recorded[path][:12] in bad(tmp_path / "merged")[path]
        flip(tmp_path / "merged" / path, size - 1)
    assert bad(tmp_path / "merged") == {}
    (tmp_path / "merged" / "README.md").unlink()
    assert "merge 1 (a)" in bad(tmp_path / "merged")["README.md"]
    assert "sha256" not in bad(tmp_path / "merged")["README.md"]  # there is nothing to hash


def test_a_later_merge_leaves_the_hashes_of_what_it_does_not_touch(tmp_path: Path) -> None:
    base = save(tiny("llama-untied"), tmp_path / "base", shards=True)
    es.merge_checkpoint(base, make_adapter(base, [5]).save(tmp_path / "a"), tmp_path / "one", hashes=True)
    report = es.merge_checkpoint(tmp_path / "one", make_adapter(base, [8]).save(tmp_path / "b"), tmp_path / "two")
    checks = {c.name: c for c in es.verify_checkpoint(tmp_path / "two", full=True)}
    assert all(c.ok for c in checks.values())
    assert report.files[0] not in checks
    assert checks["no hash known"].detail.startswith(report.files[0])
    assert "--hash" in checks["no hash known"].detail
    assert "config.json" in checks
    es.merge_checkpoint(tmp_path / "two", make_adapter(base, [9]), tmp_path / "three", hashes=True)
    es.unmerge_checkpoint(tmp_path / "three", tmp_path / "under", adapter="a")  # the later hashes no longer hold
    assert bad(tmp_path / "under") == {}
    assert (
        report.files[0]
        in {c.name: c for c in es.verify_checkpoint(tmp_path / "under", full=True)}["no hash known"].detail
    )
    es.unmerge_checkpoint(tmp_path / "two", tmp_path / "back")
    assert {c.name for c in es.verify_checkpoint(tmp_path / "back", full=True)} >= plain(base).keys()
    assert bad(tmp_path / "back") == {}


def test_hashes_of_the_hub_count_for_files_that_no_merge_changed(tmp_path: Path) -> None:
    base = save(tiny("llama-untied"), tmp_path / "base", shards=True)
    notes = base / ".cache/huggingface/download"
    notes.mkdir(parents=True)
    for file in base.glob("*.safetensors"):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        (notes / f"{file.name}.metadata").write_text(f"{'0' * 40}\n{digest}\n1700000000.0\n")
    (notes / "config.json.metadata").write_text(
        f"{'0' * 40}\n{'1' * 40}\n1700000000.0\n"
    )  # git's hash, of a small file
    assert bad(base) == {}
    report = es.merge_checkpoint(base, make_adapter(base, [5]), tmp_path / "merged")
    assert bad(tmp_path / "merged") == {}
    seen = {c.name: c.detail for c in es.verify_checkpoint(tmp_path / "merged", full=True)}
    assert report.files[0] in seen["no hash known"]
    (other,) = [f.name for f in base.glob("*.safetensors") if f.name in seen][:1]
    assert "the Hub" in seen[other]
    assert hashlib.sha256((base / other).read_bytes()).hexdigest()[:12] in seen[other]
    flip(tmp_path / "merged" / other, (base / other).stat().st_size - 1)
    assert other in bad(tmp_path / "merged")


def test_verify_full_on_the_command_line(base: Path, tmp_path: Path) -> None:
    make_adapter(base, [5]).save(tmp_path / "a")
    assert cli("merge", base, tmp_path / "a", "-o", tmp_path / "merged", "--hash").returncode == 0
    assert cli("verify", tmp_path / "merged", "--full").returncode == 0
    flip(tmp_path / "merged" / "README.md", 3)
    assert cli("verify", tmp_path / "merged").returncode == 0
    found = cli("verify", tmp_path / "merged", "--full")
    assert found.returncode == 1
    assert "README.md" in found.stderr
    assert "merge 1 (a)" in found.stderr


@pytest.mark.parametrize("part", ["rows that were there", "facts"])
def test_a_record_with_a_flipped_bit_is_refused(part: str, base: Path, tmp_path: Path) -> None:
    """The displaced rows are the only copy of the base's: a damaged one is never written back."""
    es.merge_checkpoint(base, make_adapter(base, [5]), tmp_path / "merged")
    record = tmp_path / "merged" / RECORDS / "0001.safetensors"
    displaced = RawArray.of(Undo.load(record).edits[0].rows.float32()).data  # type: ignore[union-attr]
    data = record.read_bytes()
    flip(record, data.index(displaced) + 5 if part != "facts" else data.index(b"trainable_tokens"))
    data = record.read_bytes()
    digest = hashlib.sha256(data[:-32]).hexdigest()
    with raises(CheckpointError, where=record, expected=digest[:12], found=data[-32:].hex()[:12]):
        es.unmerge_checkpoint(tmp_path / "merged", tmp_path / "out")
    assert [c.name for c in es.verify_checkpoint(tmp_path / "merged") if not c.ok] == ["merge 1"]

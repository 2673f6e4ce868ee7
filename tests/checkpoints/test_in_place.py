"""Changes in place: the same bytes as in a new directory, what is refused, and what readers are told."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import embedsurgery as es
from embedsurgery.checkpoints.journal import Journal, join_ranges, roll_back, subtract_ranges
from embedsurgery.errors import (
    BusyError,
    ConfigError,
    EmbedSurgeryError,
    EmbedSurgeryWarning,
    PlanError,
    UnfinishedError,
    UnsupportedError,
)
from embedsurgery.plan import Blocks, PatchFile, Plan, SetBlocks, SetRows, Undo
from embedsurgery.plan.file_edits import FileState, PutFile, SetBytes
from embedsurgery.stores.apply import apply
from embedsurgery.stores.shards import ShardStore
from embedsurgery.tensors.raw import RawArray
from tests.support.comparing import contents, listing, tree
from tests.support.errors import check_error, raises
from tests.support.models import KINDS, save, tiny, trained
from tests.support.processes import cli

pytestmark = pytest.mark.filterwarnings("ignore:.*have these files mapped:embedsurgery.errors.EmbedSurgeryWarning")

INDICES = [3, 0, 39]
RECORD = ".embedsurgery/merges/0001.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An untied tiny Llama in shards, an adapter of it, and the two merged in a new directory."""
    folder = tmp_path_factory.mktemp("made")
    base = save(tiny("llama-untied"), folder / "base", shards=True)
    adapter = trained(tiny("llama-untied"), INDICES, target_modules=["embed_tokens", "lm_head"])
    es.merge_checkpoint(base, adapter, folder / "merged")
    return {"base": base, "adapter": adapter, "merged": folder / "merged"}


@pytest.fixture
def model(made: dict[str, Any], tmp_path: Path) -> Path:
    """A copy of the base that may be changed."""
    subprocess.run(["cp", "-a", made["base"], tmp_path / "model"], check=True)
    return tmp_path / "model"


def weights(folder: Path) -> dict[str, bytes]:
    """All files but the records, which hold the time of the merge."""
    return {name: data for name, data in contents(folder).items() if not name.startswith(".embedsurgery")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_in_place_is_what_a_new_directory_is(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = save(tiny(kind, dtype=dtype), tmp_path / "base")
    before = tree(base)
    adapter = trained(tiny(kind, dtype=dtype), INDICES)
    es.merge_checkpoint(base, adapter, tmp_path / "out")
    inodes = {p.name: p.stat().st_ino for p in base.iterdir()}
    report = es.merge_checkpoint(base, adapter, in_place=True)
    assert (report.done, report.in_place, report.output, report.copied) == (True, True, str(base), 0)
    assert weights(base) == weights(tmp_path / "out")
    assert inodes.items() <= {p.name: p.stat().st_ino for p in base.iterdir()}.items()
    assert all(check.ok for check in es.verify_checkpoint(base))
    after = tree(base)
    untouched = before.keys() - set(report.files)
    assert {name: after[name] for name in untouched} == {name: before[name] for name in untouched}
    es.unmerge_checkpoint(base, in_place=True)
    assert contents(base) == {name: data for name, (data, _, _) in before.items()}
    assert ".embedsurgery" not in listing(base)


def test_only_the_rows_are_written(model: Path, made: dict[str, Any], tmp_path: Path) -> None:
    before = contents(model)
    es.merge_checkpoint(model, made["adapter"], in_place=True)
    rows = len(INDICES) * 16 * 4
    for name, data in weights(model).items():
        changed = np.count_nonzero(np.frombuffer(data, np.uint8) != np.frombuffer(before[name], np.uint8))
        assert changed <= rows
    assert (model / RECORD).stat().st_size < 8_000 + 2 * rows


@pytest.mark.parametrize("spare", [0, 3])
def test_tokens_in_place(spare: int, tmp_path: Path) -> None:
    """Spare rows are overwritten; without any, new files replace the old ones."""
    from tests.support.models import VOCABULARY, write_tokenizer

    base = save(tiny("llama-untied"), tmp_path / "base", shards=True)
    write_tokenizer(base, VOCABULARY - spare)
    before = tree(base)
    inodes = {p.name: p.stat().st_ino for p in base.glob("*.safetensors")}
    es.add_tokens_checkpoint(base, ["<a>", "<b>"], tmp_path / "out")
    report = es.add_tokens_checkpoint(base, ["<a>", "<b>"], in_place=True)
    assert weights(base) == weights(tmp_path / "out")
    moved = [name for name, inode in inodes.items() if (base / name).stat().st_ino != inode]
    assert moved == ([] if spare else [name for name in inodes if name in report.files])
    assert bool(moved) == (spare == 0)
    es.unmerge_checkpoint(base, in_place=True)
    assert contents(base) == {name: data for name, (data, _, _) in before.items()}
    assert {n: m for n, (_, m, _) in tree(base).items()} == {n: m for n, (_, m, _) in before.items()}


def test_several_adapters_and_a_stack(model: Path, made: dict[str, Any], tmp_path: Path) -> None:
    before = contents(model)
    first = trained(tiny("llama-untied"), [7, 8], seed=5)
    second = trained(tiny("llama-untied"), [9], seed=6)
    es.merge_checkpoint(model, [first, second], in_place=True)
    es.merge_checkpoint(model, made["adapter"], in_place=True)
    assert len(list((model / ".embedsurgery/merges").iterdir())) == 3
    es.unmerge_checkpoint(model, in_place=True)
    es.unmerge_checkpoint(model, in_place=True, all=True)
    assert contents(model) == before


def test_a_dry_run_in_place_changes_nothing(model: Path, made: dict[str, Any]) -> None:
    before = tree(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = es.merge_checkpoint(model, made["adapter"], in_place=True, dry_run=True)
    assert (report.done, report.in_place) == (False, True)
    assert tree(model) == before
    os.link(model / report.files[0], model.parent / "other")
    with raises(UnsupportedError, where=report.files[0], found="2"):
        es.merge_checkpoint(model, made["adapter"], in_place=True, dry_run=True)


def second_name(model: Path, shard: Path) -> Path:
    os.link(shard, model.parent / "second")
    return model


def symlinked(model: Path, shard: Path) -> Path:
    shard.rename(model.parent / "blob")
    shard.symlink_to("../blob")
    return model


def directory_link(model: Path, shard: Path) -> Path:
    (model.parent / "link").symlink_to("model")
    return model.parent / "link"


def read_only(model: Path, shard: Path) -> Path:
    os.chmod(shard, 0o444)
    return model


def read_only_directory(model: Path, shard: Path) -> Path:
    os.chmod(model, 0o555)
    return model


@pytest.mark.parametrize(
    ("harm", "where", "fields"),
    [
        (second_name, ".safetensors", {"found": "2", "hint": "-o / output"}),
        (symlinked, ".safetensors", {"found": "../blob", "hint": "-o / output"}),
        (directory_link, "/link", {"found": "/model", "hint": "/model"}),
        (read_only, ".safetensors", {"found": "0444", "hint": "chmod u+w"}),
        (read_only_directory, "/model", {"found": "0555", "hint": "chmod u+w"}),
    ],
)
def test_links_shared_and_read_only_files_are_refused(
    harm: Callable[[Path, Path], Path], where: str, fields: dict[str, str], model: Path, made: dict[str, Any]
) -> None:
    shard = model / es.merge_checkpoint(model, made["adapter"], None, dry_run=True).files[0]
    named = harm(model, shard)
    before = tree(model)
    with raises(UnsupportedError, **fields) as caught:
        es.merge_checkpoint(named, made["adapter"], in_place=True)
    assert str(caught.value.where).endswith(where)
    if harm is not second_name:  # a file that is replaced may have other names: they keep the old bytes
        with raises(UnsupportedError, **fields):
            es.add_tokens_checkpoint(named, "<x>", in_place=True)
    assert tree(model) == before
    assert ".embedsurgery" not in listing(model)
    os.chmod(model, 0o755)


def test_growth_leaves_other_names_of_a_shard_alone(model: Path) -> None:
    shards = sorted(model.glob("*.safetensors"))
    before = {path.name: path.read_bytes() for path in shards}
    (model.parent / "others").mkdir()
    for path in shards:
        os.link(path, model.parent / "others" / path.name)
    es.add_tokens_checkpoint(model, "<x>", in_place=True)
    assert contents(model.parent / "others") == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_file_that_replaces_another_has_its_owner(model: Path) -> None:
    """Another user owns the checkpoint, and root replaces its files."""
    for path in (model, *model.rglob("*")):
        os.chown(path, 12345, 23456)
    es.add_tokens_checkpoint(model, "<x>", in_place=True)
    es.unmerge_checkpoint(model, in_place=True)
    es.add_tokens_checkpoint(model, "<x>", in_place=True)
    files = [path for path in model.rglob("*") if ".embedsurgery" not in path.parts]
    assert {(path.stat().st_uid, path.stat().st_gid) for path in files} == {(12345, 23456)}


def test_one_output_is_required(model: Path, made: dict[str, Any], tmp_path: Path) -> None:
    for options, fields in (
        ({"output": tmp_path / "out", "in_place": True}, {"found": tmp_path / "out"}),
        ({"in_place": True, "hardlink": True}, {"found": "hardlink"}),
        ({}, {"found": None, "hint": ("output", "in_place", "dry_run")}),
    ):
        with raises(ConfigError, **fields):  # type: ignore[arg-type]
            es.merge_checkpoint(model, made["adapter"], **options)  # type: ignore[arg-type]
    with raises(ConfigError, found="org/name"):
        es.merge_checkpoint("org/name", made["adapter"], in_place=True)
    for arguments in (["--in-place", "-o", "x"], ["--in-place", "--hardlink"], []):
        assert cli("unmerge", model, *arguments).returncode == 2


def test_processes_that_map_the_files_are_listed(model: Path, made: dict[str, Any]) -> None:
    first = model / es.merge_checkpoint(model, made["adapter"], None, dry_run=True).files[0]
    code = "import mmap, sys; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)\n"
    code += "print(1, flush=True); sys.stdin.read()"
    reader = subprocess.Popen(
        [sys.executable, "-c", code, str(first)], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert reader.stdout is not None
        reader.stdout.readline()
        with pytest.warns(EmbedSurgeryWarning, match=rf"{first.name}.* {reader.pid} \(python"):
            es.merge_checkpoint(model, made["adapter"], in_place=True)
    finally:
        reader.communicate()
    done = cli("unmerge", model, "--in-place")
    assert done.returncode == 0
    assert first.name in done.stderr
    assert str(model) in done.stdout.splitlines()[-1]


@contextmanager
def hold_lock(folder: Path, kind: int) -> Iterator[None]:
    """Hold the lock in another process."""
    ready, done = multiprocessing.get_context("fork").Pipe(), None
    pid = os.fork()
    if pid == 0:
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, kind)
        ready[1].send(1)
        ready[1].recv()
        os._exit(0)
    ready[0].recv()
    try:
        yield
    finally:
        ready[0].send(done)
        os.waitpid(pid, 0)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_two_at_once_one_is_refused(model: Path, made: dict[str, Any], tmp_path: Path) -> None:
    before = tree(model)
    with hold_lock(model, fcntl.LOCK_EX):
        for verb in (
            lambda: es.merge_checkpoint(model, made["adapter"], in_place=True),
            lambda: es.merge_checkpoint(model, made["adapter"], tmp_path / "out"),
            lambda: es.recover_checkpoint(model),
        ):
            with raises(BusyError, where=model):
                verb()
        Journal(model, {}).begin()
        Journal(model, {}).protect({}, ["config.json"])
        with raises(UnfinishedError, where=model, found=None) as caught:  # with `found`, the change was interrupted
            es.walk(model)
        assert "embedsurgery recover" not in caught.value.hint
        roll_back(model)
    with hold_lock(model, fcntl.LOCK_SH):  # somebody copies it
        with raises(BusyError, where=model):
            es.merge_checkpoint(model, made["adapter"], in_place=True)
        es.merge_checkpoint(model, made["adapter"], tmp_path / "out")
    assert tree(model) == before


def interrupted(model: Path, adapter: Any) -> dict[str, bytes]:
    """Leave a checkpoint as a kill in the middle would: half of the rows written, and the journal."""
    before = contents(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("embedsurgery.checkpoints.in_place._undo_change", lambda *_: None)

        def write_one(name: str, indices: Any, rows: Any, self: Any = None) -> None:
            raise RuntimeError("killed")

        patch.setattr(ShardStore, "sync", lambda self: write_one("", (), None))
        patch.setattr("embedsurgery.stores.apply.contextlib", None)
        real = ShardStore.write_rows
        count = []

        def once(self: ShardStore, name: str, indices: Any, rows: Any) -> None:
            count.append(name)
            if len(count) > 1:
                raise RuntimeError("killed")
            real(self, name, indices, rows)

        patch.setattr(ShardStore, "write_rows", once)
        with pytest.raises(RuntimeError, match="killed"):
            es.merge_checkpoint(model, adapter, in_place=True)
    return before


def test_every_command_refuses_an_unfinished_change(model: Path, made: dict[str, Any], tmp_path: Path) -> None:
    before = interrupted(model, made["adapter"])
    assert weights(model) != before
    made["adapter"].save(tmp_path / "adapter")
    there = contents(model)
    verbs = (
        ["inspect", model],
        ["merge", model, tmp_path / "adapter", "-o", tmp_path / "out"],
        ["merge", model, tmp_path / "adapter", "--in-place"],
        ["unmerge", model, "--in-place"],
        ["verify", model],
        ["log", model],
        ["extract", model, made["base"], "-o", tmp_path / "x"],
        ["extract", made["base"], model, "-o", tmp_path / "x"],
        ["show", tmp_path / "adapter", "--model", model],
        ["tokens", "add", model, "--token", "<x>", "-o", tmp_path / "out"],
    )
    from click.testing import CliRunner

    from embedsurgery.cli.main import cli as group

    for verb in verbs:
        result = CliRunner().invoke(group, [str(part) for part in verb])
        assert isinstance(result.exception, UnfinishedError), (verb, result.output, result.exception)
        check_error(result.exception, where=model, hint=f"embedsurgery recover {model}")
    assert contents(model) == there
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "model"]
    done = cli("recover", model, "--json")
    assert done.returncode == 0
    restored = json.loads(done.stdout)["restored"]
    assert set(restored) >= {name for name, data in there.items() if before.get(name) != data and name in before}
    assert restored
    assert contents(model) == before
    done = cli("recover", model)
    assert done.returncode == 0
    assert str(model) in done.stdout
    body = json.loads(cli("recover", model, "--json").stdout)
    assert body == {"directory": str(model), "restored": [], "finished": False, "removed": []}
    assert cli("recover", model / "nowhere").returncode == 1


def test_recovery_restores_the_times_too(model: Path, made: dict[str, Any]) -> None:
    before = tree(model)
    interrupted(model, made["adapter"])
    es.recover_checkpoint(model)
    assert tree(model) == before


DAMAGES: dict[str, dict[str, str]] = {
    "byte": {"where": "0001.safetensors"},
    "cut": {"where": "0001.safetensors"},
    "seal": {"where": "0001.safetensors"},
    "empty": {"where": "0001.safetensors"},
    "time": {"where": "0001.safetensors", "found": "mtime_ns"},
    "resized": {"where": ".safetensors", "expected": ""},
    "replaced": {"where": ".safetensors", "expected": ""},
    "other edits": {"expected": "", "found": "a"},
    "path": {"expected": "", "found": "'../outside'"},
    "kept": {"expected": "", "found": "'../../outside'"},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_journal_that_is_damaged_or_lies_is_not_followed(damage: str, model: Path, made: dict[str, Any]) -> None:
    interrupted(model, made["adapter"])
    part = next((model / ".embedsurgery/journal").glob("*.safetensors"))
    plan, data = Undo.load(part, sealed=True), part.read_bytes()
    there = contents(model)
    edits: tuple[Any, ...] = plan.edits
    ranges = next(edit for edit in edits if isinstance(edit, SetBytes))
    if damage in ("byte", "cut", "seal", "empty"):
        place = len(data) // 2
        flipped = bytes([data[place] ^ 1])
        part.write_bytes(
            {
                "byte": data[:place] + flipped + data[place + 1 :],
                "cut": data[:-40],
                "empty": b"",
                "seal": data[:-1] + bytes([data[-1] ^ 1]),
            }[damage]
        )
    elif damage in ("resized", "replaced"):
        file = model / ranges.path
        file.write_bytes(file.read_bytes() + b"x" if damage == "resized" else bytes(file.stat().st_size))
    else:
        state = FileState(3, "0" * 64, 0)
        forged = {
            "other edits": SetRows("a", (0,), RawArray("F32", (1, 1), bytes(4))),
            "path": replace(ranges, path="../outside", chunks=lambda: iter([bytes(ranges.size)])),
            "kept": PutFile("config.json", "../../outside", state),
            "time": replace(
                ranges, state=replace(ranges.state, mtime_ns=10**30), chunks=lambda: iter([bytes(ranges.size)])
            ),
        }[damage]
        (model.parent / "outside").write_bytes((model / ranges.path).read_bytes())
        part.unlink()
        Plan((forged,)).save(part)
    there = contents(model)
    with raises(UnfinishedError, hint=".embedsurgery/journal", **DAMAGES[damage]) as caught:
        es.recover_checkpoint(model)
    if damage in ("resized", "replaced"):
        assert str(caught.value.where) == str(model / ranges.path)
    assert contents(model) == there
    with raises(UnfinishedError, hint=f"embedsurgery recover {model}"):
        es.walk(model)


def test_a_journal_reaches_through_no_link(model: Path) -> None:
    """A hostile checkpoint, whose journal would write elsewhere."""
    outside = model.parent / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"theirs")
    (model / "link").symlink_to(outside)
    (model / "linked.safetensors").symlink_to(outside / "file")
    folder = model / ".embedsurgery/journal"
    folder.mkdir(parents=True)
    state = FileState.of(outside / "file")
    data = SetBytes("linked.safetensors", ((0, 3),), state, lambda: iter([b"our"]))
    for edit in (PatchFile("link/file", None, None), data, PatchFile("..", None, None), PatchFile("link", None, None)):
        Plan((edit,)).save(folder / "0001.safetensors")
        if edit.path == "link":  # the link itself is the checkpoint's own
            es.recover_checkpoint(model)
            assert not (model / "link").is_symlink()
        else:
            with pytest.raises(EmbedSurgeryError):
                es.recover_checkpoint(model)
            (folder / "0001.safetensors").unlink()
    assert contents(outside) == {"file": b"theirs"}


def test_a_plan_with_an_edit_of_a_journal_is_refused(model: Path) -> None:
    state = FileState.of(model / "config.json")
    for edit in (
        PutFile("config.json", "0001-0.kept", state),
        SetBytes("config.json", ((0, 1),), state, lambda: iter([b"x"])),
    ):
        with raises(PlanError, found="config.json", hint="embedsurgery recover"):
            apply(Plan((edit,)), ShardStore.open(model))


def test_an_error_in_the_middle_takes_everything_back(model: Path, made: dict[str, Any]) -> None:
    before = tree(model)
    with pytest.MonkeyPatch.context() as patch:

        def refuse(*_: object) -> None:
            raise RuntimeError("in the middle")

        patch.setattr("embedsurgery.checkpoints.writing._refuse_new_ties", refuse)
        with pytest.raises(RuntimeError, match="in the middle"):
            es.merge_checkpoint(model, made["adapter"], in_place=True)
    assert tree(model) == before
    assert ".embedsurgery" not in listing(model)


def test_a_failed_rollback_is_reported(model: Path, made: dict[str, Any]) -> None:
    before = contents(model)
    with pytest.MonkeyPatch.context() as patch:

        def fail(*_: object) -> None:
            raise OSError(5, "Input/output error")

        patch.setattr(ShardStore, "sync", fail)
        patch.setattr("embedsurgery.checkpoints.in_place.roll_back", fail)
        with raises(UnfinishedError, where=model, found="Input/output error", hint=f"embedsurgery recover {model}"):
            es.merge_checkpoint(model, made["adapter"], in_place=True)
    es.recover_checkpoint(model)
    assert contents(model) == before


def test_a_whole_table_in_place_in_bounded_memory(tmp_path: Path) -> None:
    """The journal is streamed; a failure half way restores every block."""
    from embedsurgery.checkpoints.footprint import footprint_of
    from embedsurgery.checkpoints.in_place import change_in_place

    base = save(tiny("llama-untied"), tmp_path / "base", shards=True)
    before = tree(base)
    table = ShardStore.open(base).graph.main_input()
    rows = RawArray.of(np.ones(table.shape, np.float32))

    def change(base: Path, plan: Plan) -> None:
        with change_in_place(base, ()) as journal:
            store = ShardStore.open(base, journal.folder)
            footprint = footprint_of(plan, store)
            journal.protect(footprint.ranges, footprint.files)
            apply(plan, store, spill=journal.folder)
            raise RuntimeError("after all")

    def half(start: int, stop: int, current: RawArray) -> RawArray:
        if start >= 20:
            raise RuntimeError("half way")
        return RawArray.of(np.ones((stop - start, table.shape[1]), np.float32))

    for blocks in (Blocks(table.shape, "F32", half), Blocks.of(rows)):
        plan = Plan((SetBlocks(table.name, blocks),))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("embedsurgery.plan.blocks.BLOCK_BYTES", 10 * table.shape[1] * 4)
            patch.setattr("embedsurgery.plan.serial.CHUNK", 1000)
            with pytest.raises(RuntimeError, match=r"half way|after all"):
                change(base, plan)
        assert tree(base) == before


def test_ranges() -> None:
    assert join_ranges([(4, 6), (0, 2), (2, 3), (5, 9), (7, 7)]) == [(0, 3), (4, 9)]
    assert subtract_ranges([(0, 10)], [(2, 3), (5, 7)]) == [(0, 2), (3, 5), (7, 10)]
    assert subtract_ranges([(0, 10), (20, 30)], [(0, 30)]) == []
    assert subtract_ranges([(3, 5)], [(0, 3), (5, 9)]) == [(3, 5)]

"""Broken and hostile files, read by every command: one clear line, soon, in little memory, and nothing changed.

``tests/files/test_safetensors.py`` and ``tests/adapters/test_adapter.py`` test what a single reader refuses; the fuzzer
(``test_fuzz.py``) finds what nobody thought of.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import embedsurgery as es
from embedsurgery.cli.main import main
from embedsurgery.errors import CheckpointError, EmbedSurgeryError, PlanError
from embedsurgery.files.safetensors import TensorSource, read_header, write_file
from embedsurgery.plan import Grow, PatchFile, Plan, SetRows
from embedsurgery.tensors.raw import RawArray
from tests.fuzz.seeds import build
from tests.support.comparing import contents, listing
from tests.support.errors import raises

SHARD = "model-00001-of-00002.safetensors"
OTHER = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
EMBED = "model.embed_tokens.weight"


@pytest.fixture(scope="session")
def built_seeds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build(tmp_path_factory.mktemp("seeds"))


@pytest.fixture
def seeds(built_seeds: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Copies of the fuzzer's seeds, which a test may change."""
    names = ("sharded", "sharded-rows", "sharded-new", "sharded-merged")
    return {name: Path(shutil.copytree(built_seeds[name], tmp_path / name)) for name in names}


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Run a command in this process and return its exit code and stderr; it must take less than a second."""
    begun = time.process_time()
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in arguments])
    assert time.process_time() - begun < 1
    code = left.value.code
    assert isinstance(code, int)
    return code, capsys.readouterr().err


def commands(seeds: dict[str, Path], out: Path) -> dict[str, tuple[object, ...]]:
    """Name -> arguments, for each that reads a checkpoint."""
    base = seeds["sharded"]
    return {
        "inspect": ("inspect", base),
        "verify": ("verify", base, "--full"),
        "show": ("show", seeds["sharded-rows"], "--model", base),
        "merge": ("merge", base, seeds["sharded-rows"], "-o", out),
        "merge in place": ("merge", base, seeds["sharded-rows"], "--in-place"),
        "merge new tokens": ("merge", base, seeds["sharded-new"], "-o", out),
        "tokens add": ("tokens", "add", base, "--token", "<x>", "--init", "zeros", "-o", out),
        "extract": ("extract", base, seeds["sharded-merged"], "-o", out),
        "extract from": ("extract", seeds["sharded-merged"], base, "-o", out),
        "unmerge": ("unmerge", base, "-o", out),
    }


# -- broken checkpoints ------------------------------------------------------------------------------------------------


def change_header(change: Callable[[dict[str, Any]], Any], data: int = 0) -> Callable[[Path], None]:
    """Change a shard's header; ``data`` bytes more or fewer follow it."""

    def spoil(folder: Path) -> None:
        raw = (folder / SHARD).read_bytes()
        size = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:size])
        change(header)
        text = json.dumps(header).encode()
        body = raw[size:] + bytes(data) if data >= 0 else raw[size:data]
        (folder / SHARD).write_bytes(len(text).to_bytes(8, "little") + text + body)

    return spoil


def write_header(text: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / SHARD).write_bytes(len(text).to_bytes(8, "little") + text) and None


def change_json(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        body = json.loads((folder / name).read_text())
        change(body)
        (folder / name).write_text(json.dumps(body))

    return spoil


def write_text(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def replace_file(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return spoil


def point_index_at(value: str) -> Callable[[Path], None]:
    return change_json(INDEX, lambda b: b["weight_map"].update({EMBED: value}))


def store_twice(folder: Path) -> None:
    """The table in the other shard too, as an index that disagrees with its shards may hide."""
    values = read_header(folder / SHARD).entries
    raw = (folder / SHARD).read_bytes()
    sources = {n: TensorSource(e.dtype, e.shape, (raw[e.begin : e.end],)) for n, e in values.items()}
    other = (folder / OTHER).read_bytes()
    for n, e in read_header(folder / OTHER).entries.items():
        sources[n] = TensorSource(e.dtype, e.shape, (other[e.begin : e.end],))
    (folder / OTHER).unlink()
    write_file(folder / OTHER, sources, {"format": "pt"})


def shift_offsets(header: dict[str, Any], name: str, by: int) -> None:
    header[name]["data_offsets"] = [offset + by for offset in header[name]["data_offsets"]]


BROKEN: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "a duplicate key": (write_header(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":1}'), (SHARD, "'a'")),
    "a deep header": (write_header(b'{"a":' * 50_000 + b"1" + b"}" * 50_000), (SHARD, "JSON")),
    "an overlap": (change_header(lambda h: shift_offsets(h, "model.norm.weight", -2)), (SHARD, "112", "110")),
    "a hole": (change_header(lambda h: shift_offsets(h, "model.norm.weight", 2), 2), (SHARD, "112", "114")),
    "bytes at the end": (change_header(lambda h: None, 3), (SHARD, "336", "339")),
    "a shard cut short": (change_header(lambda h: None, -3), (SHARD, "336", "333")),
    "an unknown dtype": (change_header(lambda h: h[EMBED].update(dtype="F4")), (SHARD, EMBED, "BOOL", "found F4")),
    "a wrong shape": (change_header(lambda h: h[EMBED].update(shape=[99, 4])), (SHARD, EMBED, "792", "112")),
    "an absolute path in the index": (point_index_at("/etc/passwd"), (INDEX, "'/etc/passwd'")),
    "a path up in the index": (point_index_at("../sharded-merged/" + SHARD), (INDEX, f"'../sharded-merged/{SHARD}'")),
    "a path down in the index": (point_index_at("sub/" + SHARD), (INDEX, f"'sub/{SHARD}'")),
    "another file in the index": (point_index_at("config.json"), (INDEX, "'config.json'")),
    "a list for the weight_map": (change_json(INDEX, lambda b: b.update(weight_map=[SHARD])), (INDEX, "weight_map")),
    "a number in the weight_map": (
        change_json(INDEX, lambda b: b["weight_map"].update({EMBED: 3})),
        (INDEX, "weight_map"),
    ),
    "a shard that is missing": (
        point_index_at("model-00009-of-00002.safetensors"),
        ("model-00009-of-00002", "No such file"),
    ),
    "a tensor in the wrong shard": (point_index_at(OTHER), (INDEX, EMBED, OTHER)),
    "a tensor in two shards": (store_twice, (INDEX, EMBED, SHARD, OTHER)),
    "an index that is not JSON": (write_text(INDEX, "{"), (INDEX, "JSON")),
    "an index that is a list": (write_text(INDEX, "[]"), (INDEX, "found list")),
    "a deep index": (write_text(INDEX, "[" * 100_000), (INDEX, "1,000", "100,000")),
    "a config that is a list": (write_text("config.json", "[]"), ("config.json", "found list")),
    "a config that is a string": (write_text("config.json", '"x"'), ("config.json", "found str")),
    "a config that is not JSON": (write_text("config.json", "{]"), ("config.json", "JSON")),
    "a config in another encoding": (
        lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}") and None,
        ("config.json", "utf-8"),
    ),
    "a stale model.safetensors": (
        lambda f: shutil.copy(f / OTHER, f / "model.safetensors") and None,
        (" model.safetensors", INDEX),
    ),
    "a FIFO for a shard": (replace_file(SHARD, os.mkfifo), (SHARD, "regular file")),
    "a device for a shard": (replace_file(SHARD, lambda p: p.symlink_to("/dev/zero")), (SHARD, "regular file")),
    "a directory for a shard": (replace_file(SHARD, os.mkdir), (SHARD, "regular file")),
    "a FIFO for the index": (replace_file(INDEX, os.mkfifo), (INDEX, "regular file")),
    "a FIFO for the config": (replace_file("config.json", os.mkfifo), ("config.json", "regular file")),
    "a device for the config": (
        replace_file("config.json", lambda p: p.symlink_to("/dev/zero")),
        ("config.json", "regular file"),
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_checkpoint_is_refused_by_every_command(
    fault: str, seeds: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, parts = BROKEN[fault]
    spoil(seeds["sharded"])
    before = listing(tmp_path)
    for command, arguments in commands(seeds, tmp_path / "out").items():
        code, stderr = run(capsys, *arguments)
        assert code == 1, command
        assert stderr.startswith("embedsurgery: "), command
        assert stderr.count("\n") == 1, command
        for part in parts:
            assert part in stderr, (command, stderr)
    assert listing(tmp_path) == before


def add_scale(folder: Path) -> None:
    name = EMBED + "_scale"
    change_header(lambda h: h.update({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}))(folder)
    change_json(INDEX, lambda b: b["weight_map"].update({name: SHARD}))(folder)


UNEDITABLE: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "a scale beside the table": (add_scale, (EMBED, "_scale")),
    "a table of bytes": (change_header(lambda h: h[EMBED].update(dtype="I8", shape=[28, 4])), (EMBED, "found I8")),
    "a table of eight-bit floats": (
        change_header(lambda h: h[EMBED].update(dtype="F8_E4M3", shape=[14, 8])),
        (EMBED, "expected", "8"),
    ),
    "an empty table": (
        change_header(
            lambda h: (h[EMBED].update(shape=[0, 4], data_offsets=[0, 0]), shift_offsets(h, "model.norm.weight", -112)),
            -112,
        ),
        (),
    ),
}


@pytest.mark.parametrize("fault", UNEDITABLE)
def test_a_table_that_cannot_be_edited(
    fault: str, seeds: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It can be inspected, and changing its rows is refused."""
    spoil, parts = UNEDITABLE[fault]
    spoil(seeds["sharded"])
    before = contents(tmp_path)
    for command, arguments in commands(seeds, tmp_path / "out").items():
        code, stderr = run(capsys, *arguments)
        if command.startswith(("merge", "unmerge", "tokens")):
            assert code == 1, command
            assert command == "unmerge" or all(part in stderr for part in parts), (command, stderr)
        assert code in (0, 1), command
        assert stderr.count("\n") == code, (command, stderr)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert contents(tmp_path) == before


TOKENIZERS: dict[str, Callable[[Path], None]] = {
    "a list": write_text("tokenizer.json", "[]"),
    "deep": write_text("tokenizer.json", "[" * 100_000 + "]" * 100_000),
    "no model": change_json("tokenizer.json", lambda b: b.pop("model")),
    "ids that are not numbers": change_json("tokenizer.json", lambda b: b["model"].update(vocab={"a": "b", "c": -1})),
    "ids past the end of everything": change_json("tokenizer.json", lambda b: b["model"]["vocab"].update(t3=2**63)),
    "a FIFO": replace_file("tokenizer.json", os.mkfifo),
    "a FIFO for its config": replace_file("tokenizer_config.json", os.mkfifo),
    "a config that is a list": write_text("tokenizer_config.json", "[]"),
}


@pytest.mark.parametrize("fault", TOKENIZERS)
def test_a_broken_tokenizer(
    fault: str, seeds: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is refused where it is needed, and nothing hangs on it."""
    TOKENIZERS[fault](seeds["sharded"])
    before = listing(tmp_path)
    for command, arguments in commands(seeds, tmp_path / "out").items():
        if command == "merge in place":
            continue
        code, stderr = run(capsys, *arguments)
        assert code in (0, 1), command
        assert "Traceback" not in stderr
        if command in ("merge new tokens", "tokens add"):
            assert code == 1, command
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert listing(tmp_path) == before


def test_an_unaligned_header_with_fields_of_its_own_is_kept(
    seeds: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files of other tools may be unpadded and have more fields: all of it survives growth and unmerge."""
    for count in (5, 6):
        change_header(lambda h, n=count: (h[EMBED].update(note={"by": ["x"]}), h["__metadata__"].update(mine="y" * n)))(
            seeds["sharded"]
        )
        if read_header(seeds["sharded"] / SHARD).size % 8:
            break
    else:
        pytest.fail("aligned after all")
    before = contents(seeds["sharded"])
    assert (
        run(
            capsys,
            "tokens",
            "add",
            seeds["sharded"],
            *(w for i in range(5) for w in ("--token", f"<n{i}>")),
            "--init",
            "zeros",
            "-o",
            tmp_path / "grown",
        )[0]
        == 0
    )
    grown = (tmp_path / "grown" / SHARD).read_bytes()
    header = json.loads(grown[8 : 8 + int.from_bytes(grown[:8], "little")])
    assert header[EMBED]["shape"][0] > 14
    assert (header[EMBED]["note"], header["__metadata__"]["mine"]) == ({"by": ["x"]}, "y" * count)
    assert run(capsys, "unmerge", tmp_path / "grown", "-o", tmp_path / "back")[0] == 0
    assert contents(tmp_path / "back") == before


def test_tensors_that_are_named_as_paths_stay_names(
    seeds: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["../../evil", "/etc/evil", "a\0b", "\x1b[31mred"]
    zero = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    change_header(lambda h: h.update(dict.fromkeys(names, zero)))(seeds["sharded"])
    change_json(INDEX, lambda b: b["weight_map"].update(dict.fromkeys(names, SHARD)))(seeds["sharded"])
    code, _ = run(capsys, "merge", seeds["sharded"], seeds["sharded-rows"], "-o", tmp_path / "out")
    assert code == 0
    assert set(read_header(tmp_path / "out" / SHARD).entries) >= set(names)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*seeds, "out"])


# -- adapters ----------------------------------------------------------------------------------------------------------


def change_manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        raw = path.read_bytes()
        size = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:size])
        body = json.loads(header["__metadata__"]["embedsurgery"])
        change(body)
        header["__metadata__"]["embedsurgery"] = json.dumps(body)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[size:])

    return spoil


ADAPTERS: dict[str, Callable[[Path], None]] = {
    "more rows than it has": change_manifest(lambda b: b["tables"][0].update(indices=[3, 5, 7])),
    "a wider table": change_manifest(lambda b: b["tables"][0].update(shape=[14, 5])),
    "a shape of three": change_manifest(lambda b: b["tables"][0].update(shape=[14, 4, 1])),
    "a huge shape": change_manifest(lambda b: b["tables"][0].update(shape=[2**62, 2**62])),
    "rows that the base does not have": change_manifest(
        lambda b: b["tables"][0].update(indices=[3, 500], shape=[1000, 4])
    ),
    "a fingerprint without hashes": change_manifest(lambda b: b["tables"][0]["fingerprint"].update(sha256={})),
    "a surgery that is a module": change_manifest(lambda b: b.update(surgery="os.system")),
    "a version from the future": change_manifest(lambda b: b.update(surgery_version=99)),
    "a config that is a list": write_text("adapter_config.json", "[]"),
    "a FIFO for its config": replace_file("adapter_config.json", os.mkfifo),
    "a FIFO for its weights": replace_file("adapter_model.safetensors", os.mkfifo),
    "a deep config": write_text("adapter_config.json", "[" * 100_000),
    "other token_indices": change_json("adapter_config.json", lambda b: b.update(token_indices=[3, 6])),
}


@pytest.mark.parametrize("fault", ADAPTERS)
def test_a_contradictory_adapter(
    fault: str, seeds: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ADAPTERS[fault](seeds["sharded-rows"])
    before = listing(tmp_path)
    base, adapter = seeds["sharded"], seeds["sharded-rows"]
    for arguments in (
        ("show", adapter, "--model", base),
        ("merge", base, adapter, "-o", tmp_path / "out"),
        ("merge", base, seeds["sharded-new"], adapter, "--in-place"),
    ):
        code, stderr = run(capsys, *arguments)
        assert code == 1, arguments
        assert stderr.count("\n") == 1, stderr
    assert listing(tmp_path) == before


NOTES: dict[str, Callable[[Path], object]] = {
    "a FIFO": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a directory": os.mkdir,
    "huge": lambda path: path.write_text('{"repo": "' + "x" * 10_000_000 + '"}'),
    "deep": lambda path: path.write_text("[" * 50_000),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("fault", NOTES)
def test_broken_optional_notes_are_ignored(
    fault: str, seeds: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter's source and a hidden directory's owner are optional: a broken one is ignored, and nothing hangs."""
    source = seeds["sharded-rows"] / ".embedsurgery/source.json"
    owner = tmp_path / ".embedsurgery-abcdefgh/owner.json"
    for note in (source, owner):
        note.parent.mkdir()
        NOTES[fault](note)
    (owner.parent / "theirs").write_text("kept")
    before = listing(owner.parent)
    assert run(capsys, "merge", seeds["sharded"], seeds["sharded-rows"], "-o", tmp_path / "out") == (0, "")
    assert listing(owner.parent) == before
    assert es.list_merges(tmp_path / "out")[0].adapter == "sharded-rows"


# -- records -----------------------------------------------------------------------------------------------------------


def plant(folder: Path, *edits: Any) -> Path:
    """Write a record with a correct checksum, as an attacker would."""
    path = folder / ".embedsurgery/merges/0001.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    written = {"written": ["0" * 64] * len(edits), "adapter": "evil"}
    Plan(edits, written).save(path)
    return path


PATHS = [
    "../outside",
    "/tmp/outside",
    "a/../../outside",
    "link/outside",
    "linked.json",
    ".bashrc",
    "modeling_x.py",
    "x.so",
    "pytorch_model.bin",
    SHARD,
    ".embedsurgery/merges/0002.safetensors",
    "a\0b",
    "",
    ".",
    "a\\b.json",
    "sub/",
    "x" * 5000,
]


@pytest.mark.parametrize("path", PATHS, ids=lambda p: repr(p)[:40])
@pytest.mark.parametrize("how", ["write", "remove", "saved"])
def test_a_record_that_names_any_path(how: str, path: str, seeds: dict[str, Path], tmp_path: Path) -> None:
    base = seeds["sharded"]
    (tmp_path / "away").mkdir()
    (tmp_path / "away/outside").write_text("mine")
    (base / "link").symlink_to(tmp_path / "away")
    (base / "linked.json").symlink_to(tmp_path / "away/outside")
    if how == "saved":
        edit: Any = Grow(EMBED, -1, {}, {}, {path: b"evil"})
    else:
        edit = PatchFile.change(path, None if how == "write" else b"mine", b"evil" if how == "write" else None)
    plant(base, edit)
    before = contents(tmp_path)
    for options in ({"output": tmp_path / "out"}, {"in_place": True}, {"output": tmp_path / "out", "all": True}):
        with pytest.raises(EmbedSurgeryError) as caught:
            es.unmerge_checkpoint(base, **options)
        assert len(str(caught.value)) < 1000
        assert contents(tmp_path) == before
    assert any(not c.ok for c in es.verify_checkpoint(base))
    es.list_merges(base)


def test_a_record_that_is_a_link_away(seeds: dict[str, Path], tmp_path: Path) -> None:
    merged = seeds["sharded-merged"]
    shutil.move(merged / ".embedsurgery", tmp_path / "away")
    (merged / ".embedsurgery").symlink_to(tmp_path / "away")
    for act in (es.list_merges, es.verify_checkpoint, lambda f: es.unmerge_checkpoint(f, tmp_path / "out")):
        with raises(CheckpointError, where=merged / ".embedsurgery", found="link"):
            act(merged)


def test_impossible_records(seeds: dict[str, Path], tmp_path: Path) -> None:
    base = seeds["sharded"]
    row = RawArray.of(np.zeros((1, 4), np.float32))
    for edits in (
        [SetRows("nowhere", (1,), row)],
        [SetRows(EMBED, (99,), row)],
        [SetRows(EMBED, (-1,), row)],
        [SetRows(EMBED, (1,), RawArray.of(np.zeros((1, 3), np.float32)))],
        [SetRows(EMBED, (1, 1), RawArray.of(np.zeros((2, 4), np.float32)))],
        [Grow("nowhere", -1, {}, {}, {})],
        [Grow(EMBED, -99, {}, {}, {})],
        [Grow(EMBED, 0, {}, {}, {})],
        [Grow(EMBED, 10**15, {}, {}, {})],
    ):
        record = plant(base, *edits)
        before = contents(tmp_path)
        with pytest.raises((PlanError, CheckpointError)):
            es.unmerge_checkpoint(base, tmp_path / "out")
        assert [c.name for c in es.verify_checkpoint(base) if not c.ok] == ["merge 1"]
        assert contents(tmp_path) == before
        record.unlink()


# -- memory ------------------------------------------------------------------------------------------------------------


def huge(name: str, data: bytes, tail: bytes = b"") -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data + tail) and None


def entries(count: int) -> bytes:
    body = b",".join(
        b'"layers.%d.mlp.weight":{"dtype":"BF16","shape":[16,64],"data_offsets":[0,2]}' % n for n in range(count)
    )
    return b"{" + body + b"}"


def with_length(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


LARGE: dict[str, Callable[[Path], None]] = {
    "a header of 99 MB": huge(SHARD, with_length(b"{" + b" " * 99_000_000 + b"}")),
    "a header of brackets": huge(SHARD, with_length(b'{"a":[' + b"[]," * 5_000_000 + b"[]]}")),
    "a header of numbers": huge(SHARD, with_length(b'{"a":[' + b"1000," * 3_000_000 + b"1]}")),
    "a header of eighty thousand wrong tensors": huge(SHARD, with_length(entries(80_000))),
    "an index of 300 MB": huge(INDEX, b"{" + b" " * 300_000_000 + b"}"),
    "an index of entries": huge(
        INDEX, b'{"weight_map":{' + b",".join(b'"%d":""' % n for n in range(1_000_000)) + b"}}"
    ),
    "a config of brackets": huge("config.json", b"[" + b"[]," * 5_000_000 + b"[]]"),
    "a config of 100 MB": huge("config.json", b'{"a": "' + b"x" * 100_000_000 + b'"}'),
}

RUN = """
import sys
from embedsurgery.cli.main import main
try:
    main(sys.argv[1:])
finally:
    print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.parametrize("fault", LARGE)
def test_large_files_are_refused_fast_and_in_little_memory(fault: str, seeds: dict[str, Path], tmp_path: Path) -> None:
    """At most a second of processor time more than a refusal, and 100 MB including Python and numpy."""
    LARGE[fault](seeds["sharded"])
    ran, seconds = measured("merge", seeds["sharded"], seeds["sharded-rows"], "-o", tmp_path / "out")
    assert (ran.returncode, ran.stderr.count("\n")) == (1, 1), ran.stderr[-500:]
    assert int(ran.stdout) < 100 * 1024, f"{ran.stdout} KiB"
    nothing = measured("merge", tmp_path / "nowhere", seeds["sharded-rows"], "-o", tmp_path / "out")
    assert seconds < nothing[1] + 1  # the time to start
    assert not (tmp_path / "out").exists()


def measured(*arguments: object) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run in a new process, which prints its peak resident memory; return it and its processor time in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ran = subprocess.run([sys.executable, "-c", RUN, *map(str, arguments)], check=False, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ran, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

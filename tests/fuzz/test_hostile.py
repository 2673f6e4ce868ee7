"""Broken files and files made to harm, over every verb that reads them: one clear line, soon, in little memory, and
nothing changed. What one file's reader refuses is in ``test_safetensors_file.py`` and ``test_adapter.py``; the
hundred thousand changes that nobody thought of are in ``fuzz/``.
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

SHARD = "model-00001-of-00002.safetensors"
OTHER = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
EMBED = "model.embed_tokens.weight"


@pytest.fixture(scope="session")
def _seeds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build(tmp_path_factory.mktemp("seeds"))


@pytest.fixture
def seeds(_seeds: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Copies of the fuzzer's seeds that a test may spoil."""
    names = ("sharded", "sharded-rows", "sharded-new", "sharded-merged")
    return {name: Path(shutil.copytree(_seeds[name], tmp_path / name)) for name in names}


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Run a verb in this process: exit code and standard error. It takes less than a second of processor time."""
    begun = time.process_time()
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in arguments])
    assert time.process_time() - begun < 1
    code = left.value.code
    assert isinstance(code, int)
    return code, capsys.readouterr().err


def verbs(seeds: dict[str, Path], out: Path) -> dict[str, tuple[object, ...]]:
    """Verb -> its arguments, for each that reads a checkpoint."""
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


# -- spoiled checkpoints -----------------------------------------------------------------------------------------------


def respelled(change: Callable[[dict[str, Any]], Any], data: int = 0) -> Callable[[Path], None]:
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


def header_of(text: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / SHARD).write_bytes(len(text).to_bytes(8, "little") + text) and None


def in_json(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        body = json.loads((folder / name).read_text())
        change(body)
        (folder / name).write_text(json.dumps(body))

    return spoil


def text_of(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return spoil


def moved(value: str) -> Callable[[Path], None]:
    return in_json(INDEX, lambda b: b["weight_map"].update({EMBED: value}))


def twice(folder: Path) -> None:
    """The table in the other shard too, as an index that disagrees with its shards may hide."""
    values = read_header(folder / SHARD).entries
    raw = (folder / SHARD).read_bytes()
    sources = {n: TensorSource(e.dtype, e.shape, (raw[e.begin : e.end],)) for n, e in values.items()}
    other = (folder / OTHER).read_bytes()
    for n, e in read_header(folder / OTHER).entries.items():
        sources[n] = TensorSource(e.dtype, e.shape, (other[e.begin : e.end],))
    (folder / OTHER).unlink()
    write_file(folder / OTHER, sources, {"format": "pt"})


def shifted(header: dict[str, Any], name: str, by: int) -> None:
    header[name]["data_offsets"] = [offset + by for offset in header[name]["data_offsets"]]


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "a duplicate key": (header_of(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":1}'), "twice"),
    "a deep header": (header_of(b'{"a":' * 50_000 + b"1" + b"}" * 50_000), "JSON"),
    "an overlap": (respelled(lambda h: shifted(h, "model.norm.weight", -2)), "overlap"),
    "a hole": (respelled(lambda h: shifted(h, "model.norm.weight", 2), 2), "hole"),
    "bytes at the end": (respelled(lambda h: None, 3), "tensors' end"),
    "a shard cut short": (respelled(lambda h: None, -3), "tensors' end"),
    "an unknown dtype": (respelled(lambda h: h[EMBED].update(dtype="F4")), "unknown dtype"),
    "a shape that lies": (respelled(lambda h: h[EMBED].update(shape=[99, 4])), "contradict"),
    "an absolute path in the index": (moved("/etc/passwd"), "plain file name"),
    "a path up in the index": (moved("../sharded-merged/" + SHARD), "plain file name"),
    "a path down in the index": (moved("sub/" + SHARD), "plain file name"),
    "no safetensors file in the index": (moved("config.json"), "plain file name"),
    "a list for the weight_map": (in_json(INDEX, lambda b: b.update(weight_map=[SHARD])), "weight_map"),
    "a number in the weight_map": (in_json(INDEX, lambda b: b["weight_map"].update({EMBED: 3})), "weight_map"),
    "a shard that is missing": (moved("model-00009-of-00002.safetensors"), "cannot open"),
    "a tensor in the wrong shard": (moved(OTHER), "does not hold"),
    "a tensor in two shards": (twice, "two shards"),
    "an index that is no JSON": (text_of(INDEX, "{"), "JSON"),
    "an index that is a list": (text_of(INDEX, "[]"), "an object"),
    "a deep index": (text_of(INDEX, "[" * 100_000), "brackets"),
    "a config that is a list": (text_of("config.json", "[]"), "an object"),
    "a config that is a string": (text_of("config.json", '"x"'), "an object"),
    "a config that is no JSON": (text_of("config.json", "{]"), "JSON"),
    "a config in another encoding": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}") and None, "JSON"),
    "a stale model.safetensors": (lambda f: shutil.copy(f / OTHER, f / "model.safetensors") and None, "two sets"),
    "a FIFO for a shard": (replaced(SHARD, os.mkfifo), "regular file"),
    "a device for a shard": (replaced(SHARD, lambda p: p.symlink_to("/dev/zero")), "regular file"),
    "a directory for a shard": (replaced(SHARD, os.mkdir), "regular file"),
    "a FIFO for the index": (replaced(INDEX, os.mkfifo), "regular file"),
    "a FIFO for the config": (replaced("config.json", os.mkfifo), "regular file"),
    "a device for the config": (replaced("config.json", lambda p: p.symlink_to("/dev/zero")), "regular file"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_checkpoint_over_every_verb(
    fault: str, seeds: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, words = BROKEN[fault]
    spoil(seeds["sharded"])
    before = listing(tmp_path)
    for verb, arguments in verbs(seeds, tmp_path / "out").items():
        code, said = run(capsys, *arguments)
        assert code == 1, verb
        assert said.startswith("embedsurgery: "), verb
        assert said.count("\n") == 1, verb
        assert words in said, (verb, said)
    assert listing(tmp_path) == before


def scaled(folder: Path) -> None:
    name = EMBED + "_scale"
    respelled(lambda h: h.update({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}))(folder)
    in_json(INDEX, lambda b: b["weight_map"].update({name: SHARD}))(folder)


TOUCHY: dict[str, tuple[Callable[[Path], None], str]] = {
    "a scale beside the table": (scaled, "scale tensor"),
    "a table of bytes": (respelled(lambda h: h[EMBED].update(dtype="I8", shape=[28, 4])), "expected"),
    "a table of eight-bit floats": (respelled(lambda h: h[EMBED].update(dtype="F8_E4M3", shape=[14, 8])), "expected"),
    "an empty table": (
        respelled(
            lambda h: (h[EMBED].update(shape=[0, 4], data_offsets=[0, 0]), shifted(h, "model.norm.weight", -112)), -112
        ),
        "",
    ),
}


@pytest.mark.parametrize("fault", TOUCHY)
def test_a_table_that_cannot_be_edited(
    fault: str, seeds: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It can be looked at, and its rows are refused."""
    spoil, words = TOUCHY[fault]
    spoil(seeds["sharded"])
    before = contents(tmp_path)
    for verb, arguments in verbs(seeds, tmp_path / "out").items():
        code, said = run(capsys, *arguments)
        if verb.startswith(("merge", "unmerge", "tokens")):
            assert code == 1, verb
            assert words in said or verb == "unmerge", (verb, said)
        assert code in (0, 1), verb
        assert said.count("\n") == code, (verb, said)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert contents(tmp_path) == before


TOKENIZERS: dict[str, Callable[[Path], None]] = {
    "a list": text_of("tokenizer.json", "[]"),
    "deep": text_of("tokenizer.json", "[" * 100_000 + "]" * 100_000),
    "no model": in_json("tokenizer.json", lambda b: b.pop("model")),
    "ids that are no numbers": in_json("tokenizer.json", lambda b: b["model"].update(vocab={"a": "b", "c": -1})),
    "ids past the end of everything": in_json("tokenizer.json", lambda b: b["model"]["vocab"].update(t3=2**63)),
    "a FIFO": replaced("tokenizer.json", os.mkfifo),
    "a FIFO for its config": replaced("tokenizer_config.json", os.mkfifo),
    "a config that is a list": text_of("tokenizer_config.json", "[]"),
}


@pytest.mark.parametrize("fault", TOKENIZERS)
def test_a_broken_tokenizer(
    fault: str, seeds: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where it is needed it is refused, and nobody hangs on it."""
    TOKENIZERS[fault](seeds["sharded"])
    before = listing(tmp_path)
    for verb, arguments in verbs(seeds, tmp_path / "out").items():
        if verb == "merge in place":
            continue
        code, said = run(capsys, *arguments)
        assert code in (0, 1), verb
        assert "Traceback" not in said
        if verb in ("merge new tokens", "tokens add"):
            assert code == 1, verb
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert listing(tmp_path) == before


def test_an_unaligned_header_with_fields_of_its_own_is_kept(
    seeds: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files that other tools wrote need no padding and may say more: all of it comes through growth and back."""
    for count in (5, 6):
        respelled(lambda h, n=count: (h[EMBED].update(note={"by": ["x"]}), h["__metadata__"].update(mine="y" * n)))(
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
    said = json.loads(grown[8 : 8 + int.from_bytes(grown[:8], "little")])
    assert said[EMBED]["shape"][0] > 14
    assert (said[EMBED]["note"], said["__metadata__"]["mine"]) == ({"by": ["x"]}, "y" * count)
    assert run(capsys, "unmerge", tmp_path / "grown", "-o", tmp_path / "back")[0] == 0
    assert contents(tmp_path / "back") == before


def test_tensors_that_are_named_as_paths_stay_names(
    seeds: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["../../evil", "/etc/evil", "a\0b", "\x1b[31mred"]
    zero = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    respelled(lambda h: h.update(dict.fromkeys(names, zero)))(seeds["sharded"])
    in_json(INDEX, lambda b: b["weight_map"].update(dict.fromkeys(names, SHARD)))(seeds["sharded"])
    code, _ = run(capsys, "merge", seeds["sharded"], seeds["sharded-rows"], "-o", tmp_path / "out")
    assert code == 0
    assert set(read_header(tmp_path / "out" / SHARD).entries) >= set(names)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*seeds, "out"])


# -- adapters ----------------------------------------------------------------------------------------------------------


def in_manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
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
    "more rows than it has": in_manifest(lambda b: b["tables"][0].update(indices=[3, 5, 7])),
    "a wider table": in_manifest(lambda b: b["tables"][0].update(shape=[14, 5])),
    "a shape of three": in_manifest(lambda b: b["tables"][0].update(shape=[14, 4, 1])),
    "a huge shape": in_manifest(lambda b: b["tables"][0].update(shape=[2**62, 2**62])),
    "rows that the base does not have": in_manifest(lambda b: b["tables"][0].update(indices=[3, 500], shape=[1000, 4])),
    "a fingerprint of no hashes": in_manifest(lambda b: b["tables"][0]["fingerprint"].update(sha256={})),
    "a surgery that is a module": in_manifest(lambda b: b.update(surgery="os.system")),
    "a version from the future": in_manifest(lambda b: b.update(surgery_version=99)),
    "a config that is a list": text_of("adapter_config.json", "[]"),
    "a FIFO for its config": replaced("adapter_config.json", os.mkfifo),
    "a FIFO for its weights": replaced("adapter_model.safetensors", os.mkfifo),
    "a deep config": text_of("adapter_config.json", "[" * 100_000),
    "other token_indices": in_json("adapter_config.json", lambda b: b.update(token_indices=[3, 6])),
}


@pytest.mark.parametrize("fault", ADAPTERS)
def test_an_adapter_that_lies(
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
        code, said = run(capsys, *arguments)
        assert code == 1, arguments
        assert said.count("\n") == 1, said
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
def test_notes_that_nobody_needs_are_passed_over(
    fault: str, seeds: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where an adapter came from, and whose a hidden directory beside the output is: neither is waited for."""
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
    """A record with a right checksum, as whoever means harm would write it."""
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
        with pytest.raises(CheckpointError, match="link"):
            act(merged)


def test_records_that_cannot_be_right(seeds: dict[str, Path], tmp_path: Path) -> None:
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


def as_header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


LARGE: dict[str, Callable[[Path], None]] = {
    "a header of 99 MB": huge(SHARD, as_header(b"{" + b" " * 99_000_000 + b"}")),
    "a header of brackets": huge(SHARD, as_header(b'{"a":[' + b"[]," * 5_000_000 + b"[]]}")),
    "a header of numbers": huge(SHARD, as_header(b'{"a":[' + b"1000," * 3_000_000 + b"1]}")),
    "a header of eighty thousand wrong tensors": huge(SHARD, as_header(entries(80_000))),
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
def test_large_files_are_refused_soon_and_in_little_memory(fault: str, seeds: dict[str, Path], tmp_path: Path) -> None:
    """A second of processor time and 100 MB in all, of which starting Python and numpy takes a good part."""
    LARGE[fault](seeds["sharded"])
    ran, seconds = measured("merge", seeds["sharded"], seeds["sharded-rows"], "-o", tmp_path / "out")
    assert (ran.returncode, ran.stderr.count("\n")) == (1, 1), ran.stderr[-500:]
    assert int(ran.stdout) < 100 * 1024, f"{ran.stdout} KiB"
    nothing = measured("merge", tmp_path / "nowhere", seeds["sharded-rows"], "-o", tmp_path / "out")
    assert seconds < nothing[1] + 1  # which takes as long to start
    assert not (tmp_path / "out").exists()


def measured(*arguments: object) -> tuple[subprocess.CompletedProcess[str], float]:
    """A run in a process of its own, which prints its peak of resident memory; and its processor time in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ran = subprocess.run([sys.executable, "-c", RUN, *map(str, arguments)], check=False, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ran, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

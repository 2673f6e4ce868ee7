"""Directories that appear complete or not at all, checkpoints in the Hub's cache, and the memory of a merge."""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import embedsurgery as es
from embedsurgery.errors import CheckpointError, ConfigError, EmbedSurgeryError, OutputExistsError
from embedsurgery.files.atomic import staged_directory
from embedsurgery.files.safetensors import TensorSource, write_file
from embedsurgery.plan.blocks import spans
from embedsurgery.stores.shards import ShardStore
from embedsurgery.surgeries.surgery import Base
from embedsurgery.surgeries.trainable_tokens.surgery import TrainableTokens
from embedsurgery.tensors.raw import RawArray
from tests.support.comparing import contents, listing
from tests.support.errors import raises
from tests.support.models import tiny, trained
from tests.support.processes import python


def test_a_staged_directory_appears_whole(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "a" / "out") as staging:
        (staging / "file").write_bytes(b"x")
        assert staging.parent.parent == tmp_path / "a"
        assert staging.parent.name.startswith(".embedsurgery-")
        assert not (tmp_path / "a" / "out").exists()
    assert listing(tmp_path) == ["a", "a/out", "a/out/file"]
    assert stat.S_IMODE((tmp_path / "a/out").stat().st_mode) == stat.S_IMODE((tmp_path / "a").stat().st_mode)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_staged_directory_vanishes_on_any_error(error: type[BaseException], tmp_path: Path) -> None:
    def fill() -> None:
        with staged_directory(tmp_path / "out") as staging:
            (staging / "deep").mkdir()
            (staging / "deep" / "file").write_bytes(b"x")
            raise error

    with pytest.raises(error):
        fill()
    assert listing(tmp_path) == []


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with raises(OutputExistsError, where=tmp_path / "out"), staged_directory(tmp_path / "out"):
        (tmp_path / "out").mkdir()
    assert listing(tmp_path) == ["out"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_mode_of_a_new_directory_is_the_umasks(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        with staged_directory(tmp_path / "out"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~mask


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    parent = tmp_path / "file"
    parent.write_bytes(b"")
    error = raises(CheckpointError, where=parent, expected="directory", found="a file")
    with error, staged_directory(parent / "out"):
        pass
    assert listing(tmp_path) == ["file"]


@pytest.mark.parametrize("odd", ["fifo", "dangling"])
def test_odd_things_in_a_checkpoint_are_refused(odd: str, base: Path, tmp_path: Path) -> None:
    if odd == "fifo":
        os.mkfifo(base / "odd")
    else:
        (base / "odd").symlink_to("nowhere")
    before = sorted(p.name for p in tmp_path.iterdir())
    with raises(CheckpointError, where=base / "odd"):
        es.merge_checkpoint(base, trained(tiny("llama-tied"), [1]), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that every user can reach and write."""
    folder = Path(tempfile.mkdtemp(prefix="embedsurgery-test-", dir="/tmp"))
    os.chmod(folder, 0o777)
    yield folder
    shutil.rmtree(folder)


def snapshot(base: Path, cache: Path) -> Path:
    """Lay the files out as the Hub's cache does: links to read-only blobs."""
    (cache / "blobs").mkdir(parents=True)
    folder = cache / "snapshots" / "0123abcd"
    for number, path in enumerate(sorted(p for p in base.rglob("*") if p.is_file())):
        blob = cache / "blobs" / f"{number:04x}"
        blob.write_bytes(path.read_bytes())
        os.chmod(blob, 0o444)
        link = folder / path.relative_to(base)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return folder


_AS_USER = """
import os, sys
import embedsurgery as es
base, adapter, merged, back = sys.argv[1:]
es.merge_checkpoint(base, adapter, merged + "-0")  # imports everything while the interpreter's files can be read
es.unmerge_checkpoint(merged + "-0", back + "-0")
if os.getuid() == 0:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
es.merge_checkpoint(base, adapter, merged)
es.unmerge_checkpoint(merged, back)
"""


def test_a_snapshot_of_the_hubs_cache(base: Path, open_directory: Path) -> None:
    """Runs as a plain user, because root may write read-only files."""
    adapter = trained(tiny("llama-tied"), [3, 1]).save(open_directory / "adapter")
    source = snapshot(base, open_directory / "models--org--name")
    before = {p: (p.stat().st_ino, p.read_bytes(), p.stat().st_mode) for p in source.parents[1].glob("blobs/*")}
    (open_directory / "new").mkdir()
    os.chmod(open_directory / "new", 0o777)
    run = python(_AS_USER, source, adapter, open_directory / "new/merged", open_directory / "new/back")
    assert run.stderr == ""
    assert run.returncode == 0
    merged, back = open_directory / "new/merged", open_directory / "new/back"
    assert before == {p: (p.stat().st_ino, p.read_bytes(), p.stat().st_mode) for p in before}
    assert contents(back) == contents(base)
    assert not any(p.is_symlink() for p in merged.rglob("*"))
    assert all(check.ok for check in es.verify_checkpoint(merged))
    assert {p.name: stat.S_IMODE(p.stat().st_mode) for p in back.rglob("*") if p.is_file()} == {
        p.name: 0o444 for p in base.rglob("*") if p.is_file()
    }


_MERGE = """
import json, re, sys
from embedsurgery.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
heavy = [name for name in ("torch", "transformers", "peft", "safetensors") if name in sys.modules]
print(json.dumps({"code": code, "peak": peak, "heavy": heavy}))
"""


def big_checkpoint(folder: Path, size: int) -> Path:
    """Write a checkpoint of about ``size`` bytes, most of them in a layer; its tensors are made block by block."""
    width, rows = 1024, 8192
    deep = (size - rows * width * 2) // (width * 2)
    folder.mkdir()

    def chunks(count: int) -> Iterator[bytes]:
        for start, stop in spans(count, width * 2):
            yield bytes([start % 61 + 1]) * ((stop - start) * width * 2)

    write_file(
        folder / "model.safetensors",
        {
            "model.embed_tokens.weight": TensorSource("BF16", (rows, width), chunks(rows)),
            "model.layers.0.weight": TensorSource("BF16", (deep, width), chunks(deep)),
        },
        {"format": "pt"},
    )
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": rows, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_merge_takes_little_memory_and_no_torch(tmp_path: Path) -> None:
    base = big_checkpoint(tmp_path / "base", 300_000_000)
    store = ShardStore.open(base)
    adapter = TrainableTokens().start(es.TrainableTokensConfig([5, 8191]), store, Base())
    ones = RawArray("F32", (2, 1024), b"\x00\x00\x80\x3f" * 2048)
    type(adapter)(adapter.manifest, {"model.embed_tokens.weight": ones}, adapter.surgery).save(tmp_path / "adapter")
    for verb in (
        ("merge", base, tmp_path / "adapter", "-o", tmp_path / "merged"),
        ("verify", tmp_path / "merged"),
        ("unmerge", tmp_path / "merged", "-o", tmp_path / "back"),
        ("inspect", base),
        ("show", tmp_path / "adapter", "--model", base),
    ):
        run = python(_MERGE, *verb)
        assert run.returncode == 0, run.stderr
        facts: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
        assert (facts["code"], facts["heavy"]) == (0, [])
        assert facts["peak"] < 80_000_000
    merged = ShardStore.open(tmp_path / "merged")
    assert merged.read_rows("model.embed_tokens.weight", (5, 8191)).data == b"\x80\x3f" * 2048
    with open(base / "model.safetensors", "rb") as a, open(tmp_path / "back/model.safetensors", "rb") as b:
        assert all(
            x == y for x, y in zip(iter(lambda: a.read(1 << 20), b""), iter(lambda: b.read(1 << 20), b""), strict=True)
        )
    for name in ("base", "merged", "back"):
        shutil.rmtree(tmp_path / name)


def test_a_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    with raises(CheckpointError, where=tmp_path / "nowhere"):
        es.unmerge_checkpoint(tmp_path / "nowhere", tmp_path / "out")
    assert listing(tmp_path) == []


def test_an_output_inside_the_base_is_refused(base: Path) -> None:
    """The base would no longer be what it was, and the next copy of it would hold a second checkpoint."""
    before = listing(base)
    for output in (base / "out", base / "sub" / "out", base / ".embedsurgery" / "out"):
        with raises(ConfigError, where=output):
            es.merge_checkpoint(base, trained(tiny("llama-tied"), [1]), output)
        assert listing(base) == before


@pytest.mark.parametrize(
    "verb",
    [
        lambda long, base, adapter: es.merge_checkpoint(long, adapter, base.parent / "o"),
        lambda long, base, adapter: es.merge_checkpoint(base, long, base.parent / "o"),
        lambda long, base, adapter: es.merge_checkpoint(base, adapter, long),
        lambda long, base, adapter: es.merge_checkpoint(base, adapter, long / "o"),
        lambda long, base, adapter: es.merge_checkpoint(long, adapter, in_place=True),
        lambda long, base, adapter: es.unmerge_checkpoint(long, base.parent / "o"),
        lambda long, base, adapter: es.recover_checkpoint(long),
        lambda long, base, adapter: es.verify_checkpoint(long),
        lambda long, base, adapter: es.list_merges(long),
        lambda long, base, adapter: es.extract_checkpoint(base, long),
        lambda long, base, adapter: es.load(long),
    ],
)
def test_a_name_that_is_too_long_is_refused(verb: Any, base: Path, tmp_path: Path) -> None:
    adapter = trained(tiny("llama-tied"), [1])
    before = listing(tmp_path)
    with pytest.raises(EmbedSurgeryError):
        verb(tmp_path / ("x" * 300), base, adapter)
    assert listing(tmp_path) == before

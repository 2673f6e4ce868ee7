"""Copies that keep what a file is: bytes, mode, time, holes; and trees with their links and empty directories."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest

import embedsurgery as es
from embedsurgery.errors import CheckpointError, EmbedSurgeryWarning
from embedsurgery.files import copying
from embedsurgery.files.copying import copy_file, copy_range, copy_tree, link_file, list_files, read_tree, remove_tree
from tests.support.comparing import contents, listing
from tests.support.errors import raises
from tests.support.models import save, tiny, trained


@pytest.mark.parametrize("way", ["kernel", "sendfile"])
@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 1_000_003])
def test_a_copy_has_the_bytes_the_mode_and_the_time(
    size: int, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "sendfile":

        def refuse(*args: object) -> int:
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr(os, "copy_file_range", refuse)
    data = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "a").write_bytes(data[:size])
    os.chmod(tmp_path / "a", 0o741)
    os.utime(tmp_path / "a", ns=(10**18 + 1, 10**18 + 3))
    counted: list[int] = []
    copy_file(tmp_path / "a", tmp_path / "b", counted.append)
    status = (tmp_path / "b").stat()
    assert (tmp_path / "b").read_bytes() == data[:size]
    assert (stat.S_IMODE(status.st_mode), status.st_mtime_ns) == (0o741, 10**18 + 3)
    assert sum(counted) == size
    with pytest.raises(FileExistsError):
        copy_file(tmp_path / "a", tmp_path / "b")


def test_a_clone_is_tried_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FICLONE shares the extents where the file system can; here a copy stands in for the ioctl."""
    requests: list[int] = []

    def clone(target: int, request: int, source: int) -> int:
        requests.append(request)
        os.write(target, os.pread(source, 1 << 20, 0))
        return 0

    monkeypatch.setattr(copying.fcntl, "ioctl", clone)
    monkeypatch.setattr(copying, "_copy_extents", None)
    (tmp_path / "a").write_bytes(b"x" * 5000)
    copy_file(tmp_path / "a", tmp_path / "b")
    assert requests == [0x40049409]
    assert (tmp_path / "b").read_bytes() == b"x" * 5000


@pytest.mark.parametrize("shape", ["hole", "data, hole", "hole, data", "data, hole, data"])
def test_holes_stay_holes(shape: str, tmp_path: Path) -> None:
    hole, size = 4 << 20, 0
    with open(tmp_path / "a", "wb") as file:
        for part in shape.split(", "):
            if part == "data":
                file.seek(size)
                file.write(b"\x01" * 65536)
            size += 65536 if part == "data" else hole
        file.truncate(size)
    copy_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
    assert (tmp_path / "b").stat().st_blocks * 512 <= 65536 * 3


def test_a_file_that_shrinks_meanwhile_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"x" * 300_000)
    monkeypatch.setattr(copying, "_CHUNK", 100_000)
    counted: list[int] = []

    def shrink(count: int) -> None:
        counted.append(count)
        os.truncate(tmp_path / "a", 150_000)

    with raises(CheckpointError, where=None, expected="300000 bytes", found="150000 bytes"):
        copy_file(tmp_path / "a", tmp_path / "b", shrink)
    assert counted == [100_000, 50_000]
    with (
        open(tmp_path / "a", "rb") as a,
        open(tmp_path / "c", "wb") as c,
        raises(CheckpointError, found="150000 bytes"),
    ):
        copy_range(a.fileno(), c.fileno(), 0, 150_001)


@pytest.mark.parametrize("size", [299_999, 300_001])
def test_a_file_that_changes_its_size_at_the_end_is_noticed(size: int, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 300_000)
    with raises(CheckpointError, where=tmp_path / "a", expected="300000 bytes", found=f"{size} bytes"):
        copy_file(tmp_path / "a", tmp_path / "b", lambda count: os.truncate(tmp_path / "a", size))


def odd_tree(folder: Path, elsewhere: Path) -> Path:
    """Make a directory with links to files and directories, inside and outside, and with empty directories."""
    (folder / ".git/objects").mkdir(parents=True)
    (folder / ".git/objects/x").write_bytes(b"x")
    (folder / "d/e").mkdir(parents=True)
    (folder / "d/e/f").write_bytes(b"12")
    (folder / "d/empty/deeper").mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "big").write_bytes(b"123")
    (folder / "file").symlink_to("../elsewhere/big")
    (folder / "inside").symlink_to("d")
    (folder / "d/up").symlink_to("../d/e")
    (folder / "absolute").symlink_to(folder / "d" / "e")
    (folder / "circle").symlink_to(".")
    (folder / "original").symlink_to("../elsewhere")
    (folder / "original-absolute").symlink_to(elsewhere)
    return folder


def test_a_tree_with_links_and_empty_directories(tmp_path: Path) -> None:
    source = odd_tree(tmp_path / "t", tmp_path / "elsewhere")
    tree = read_tree(source)
    assert tree.files == (("d/e/f", 2), ("file", 3))
    assert list_files(source) == list(tree.files)
    assert tree.folders == ("d", "d/e", "d/empty", "d/empty/deeper")
    target = tmp_path / "far" / "copy"
    target.mkdir(parents=True)
    copy_tree(source, target, tree)
    assert {p: d for p, d in contents(target).items() if "/" not in p or p.startswith("d/e/")} == {
        "d/e/f": b"12",
        "file": b"123",
    }
    assert (target / "d/empty/deeper").is_dir()
    links = {p.relative_to(target).as_posix(): os.readlink(p) for p in target.rglob("*") if p.is_symlink()}
    assert {name: links[name] for name in ("inside", "d/up", "circle")} == {
        "inside": "d",
        "d/up": "../d/e",
        "circle": ".",
    }
    assert os.path.realpath(target / "absolute") == str(target / "d" / "e")
    assert links["original"] == links["original-absolute"] == str(tmp_path / "elsewhere")
    assert not (target / "file").is_symlink()


def test_directories_keep_their_modes_links_and_emptiness_in_a_merge(tmp_path: Path) -> None:
    base = save(tiny("llama-tied"), tmp_path / "base")
    os.chmod(base / "sub" / "deeper", 0o500)
    os.chmod(base / "sub", 0o750)
    (base / "assets").mkdir()
    (base / "original").symlink_to("sub")
    adapter = trained(tiny("llama-tied"), [1])
    es.merge_checkpoint(base, adapter, tmp_path / "out")
    es.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    for name in ("out", "back"):
        assert stat.S_IMODE((tmp_path / name / "sub").stat().st_mode) == 0o750
        assert stat.S_IMODE((tmp_path / name / "sub/deeper").stat().st_mode) == 0o500
        assert (tmp_path / name / "assets").is_dir()
        assert os.readlink(tmp_path / name / "original") == "sub"
    assert listing(tmp_path / "back") == listing(base)


def test_state_that_is_a_link_is_refused(tmp_path: Path) -> None:
    """Records written through the link would end up in another directory."""
    base = save(tiny("llama-tied"), tmp_path / "base")
    (tmp_path / "elsewhere").mkdir()
    (base / ".embedsurgery").symlink_to("../elsewhere")
    adapter = trained(tiny("llama-tied"), [1])
    for options in ({"output": tmp_path / "out"}, {"in_place": True}):
        with raises(CheckpointError, where=base / ".embedsurgery", found="a link"):
            es.merge_checkpoint(base, adapter, **options)
    with raises(CheckpointError, where=base / ".embedsurgery", found="a link"):
        es.recover_checkpoint(base)
    assert listing(tmp_path / "elsewhere") == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "elsewhere"]


def test_read_only_files_are_not_linked(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    assert link_file(tmp_path / "a", tmp_path / "b")
    (tmp_path / "link").symlink_to("a")
    assert not link_file(tmp_path / "link", tmp_path / "c")
    os.chmod(tmp_path / "a", 0o444)
    assert not link_file(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "b").stat().st_nlink == 2


def test_unchanged_shards_are_hard_links_to_the_base(tmp_path: Path) -> None:
    base = save(tiny("llama-untied"), tmp_path / "base", shards=True)
    before = contents(base)
    adapter = trained(tiny("llama-untied"), [1, 3])
    report = es.merge_checkpoint(base, adapter, tmp_path / "out", hardlink=True)
    es.merge_checkpoint(base, adapter, tmp_path / "plain")
    for path in sorted(base.glob("*.safetensors")):
        shared = path.stat().st_ino == (tmp_path / "out" / path.name).stat().st_ino
        assert shared == (path.name not in report.files)
    assert contents(base) == before
    merged, plain = contents(tmp_path / "out"), contents(tmp_path / "plain")
    record = ".embedsurgery/merges/0001.safetensors"
    assert {p: d for p, d in merged.items() if p != record} == {p: d for p, d in plain.items() if p != record}
    es.unmerge_checkpoint(tmp_path / "out", tmp_path / "back", hardlink=True)
    assert contents(tmp_path / "back") == before
    other = trained(tiny("llama-untied"), [2], target_modules=["lm_head"])  # in a shard with two names
    es.merge_checkpoint(base, other, tmp_path / "other", hardlink=True)
    assert contents(base) == before


def test_shards_that_cannot_be_linked_are_copied_with_a_warning(tmp_path: Path) -> None:
    base = save(tiny("llama-untied"), tmp_path / "base", shards=True)
    adapter = trained(tiny("llama-untied"), [1])
    touched = es.merge_checkpoint(base, adapter, None, dry_run=True).files
    kept = next(p for p in sorted(base.glob("*.safetensors")) if p.name not in touched)
    os.chmod(kept, 0o444)
    with pytest.warns(EmbedSurgeryWarning, match=re.escape(kept.name)):
        es.merge_checkpoint(base, adapter, tmp_path / "out", hardlink=True)
    assert kept.stat().st_nlink == 1


def test_a_tree_is_removed_whatever_its_modes(tmp_path: Path) -> None:
    (tmp_path / "t/a/b").mkdir(parents=True)
    (tmp_path / "t/a/b/c").write_bytes(b"x")
    (tmp_path / "keep").write_bytes(b"x")
    (tmp_path / "t/link").symlink_to("../keep")
    os.chmod(tmp_path / "t/a/b", 0o000)
    os.chmod(tmp_path / "t/a", 0o500)
    remove_tree(tmp_path / "t")
    assert listing(tmp_path) == ["keep"]

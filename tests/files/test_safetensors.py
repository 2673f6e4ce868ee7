"""The reader and writer of a safetensors file, against the library and against hostile files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from embedsurgery.errors import CheckpointError
from embedsurgery.files.regular import open_regular
from embedsurgery.files.safetensors import MAX_HEADER, TensorSource, encode_header, read_header, read_tensor, write_file
from embedsurgery.tensors.convert import DTYPES
from embedsurgery.tensors.raw import ITEMSIZE, RawArray
from tests.support.comparing import bits
from tests.support.errors import raises


def filled(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    count = torch.Size(shape).numel() * dtype.itemsize
    data = torch.arange(count, dtype=torch.int64).remainder(2 if dtype == torch.bool else 251).to(torch.uint8)
    return data.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


SHAPES = [(3, 4), (5,), (), (0,), (2, 0, 3), (1, 1, 1)]
ALL = {
    f"{name}.{len(shape)}.{number}": filled(shape, dtype)
    for name, dtype in DTYPES.items()
    for number, shape in enumerate(SHAPES)
}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"k\u00e9y": 'v\n"\u2028', "": ""}], ids=str)
def test_the_header_of_a_file_that_the_library_wrote(metadata: Any, tmp_path: Path) -> None:
    save_file(ALL, tmp_path / "f", metadata)
    header = read_header(tmp_path / "f")
    assert header.metadata == (metadata or {})
    assert header.entries.keys() == ALL.keys()
    data = (tmp_path / "f").read_bytes()
    assert header.size == 8 + int.from_bytes(data[:8], "little")
    with open_regular(tmp_path / "f") as descriptor:
        for name, tensor in ALL.items():
            entry = header.entries[name]
            assert (entry.name, DTYPES[entry.dtype], entry.shape) == (name, tensor.dtype, tuple(tensor.shape))
            assert data[entry.begin : entry.end] == bits(tensor)
            assert read_tensor(descriptor, entry) == RawArray(entry.dtype, entry.shape, bits(tensor))


def test_a_file_without_tensors(tmp_path: Path) -> None:
    save_file({}, tmp_path / "f")
    assert read_header(tmp_path / "f").entries == {}
    write_file(tmp_path / "g", {}, {})
    assert load_file(tmp_path / "g") == {}


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    sources = {
        name: TensorSource({d: n for n, d in DTYPES.items()}[t.dtype], tuple(t.shape), (bits(t),))
        for name, t in ALL.items()
    }
    write_file(tmp_path / "f", sources, {"format": "pt", "\u00e9": "\u2028"})
    found = load_file(tmp_path / "f")
    assert {n: (t.dtype, t.shape, bits(t)) for n, t in found.items()} == {
        n: (t.dtype, t.shape, bits(t)) for n, t in ALL.items()
    }
    with safe_open(tmp_path / "f", "np") as file:
        assert file.metadata() == {"format": "pt", "\u00e9": "\u2028"}
    entries = read_header(tmp_path / "f").entries.values()
    assert all(entry.begin % ITEMSIZE[entry.dtype] == 0 for entry in entries)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "I8"])
def test_one_dtype_has_the_layout_of_the_library(dtype: str, tmp_path: Path) -> None:
    values = {name: filled((2, 3), DTYPES[dtype]) for name in ("b", "a.weight", "\u00e9", "B", "a")}
    save_file(values, tmp_path / "library")
    write_file(tmp_path / "written", {n: TensorSource(dtype, (2, 3), (bits(t),)) for n, t in values.items()}, {})
    assert (tmp_path / "written").read_bytes() == (tmp_path / "library").read_bytes()


def test_golden_bytes(tmp_path: Path) -> None:
    write_file(
        tmp_path / "f",
        {
            "n": TensorSource("BF16", (2,), (b"\x80\x3f", b"\x00\x40")),
            "w": TensorSource("F32", (1, 1), (b"\x00\x00\x80\xbf",)),
            "empty": TensorSource("I64", (0, 7), ()),
        },
        {"k": "v"},
    )
    table = (
        b'{"__metadata__":{"k":"v"},"empty":{"dtype":"I64","shape":[0,7],"data_offsets":[0,0]},'
        b'"w":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]},'
        b'"n":{"dtype":"BF16","shape":[2],"data_offsets":[4,8]}}'
    )
    padded = table + b" " * (-len(table) % 8)
    expected = len(padded).to_bytes(8, "little") + padded + b"\x00\x00\x80\xbf\x80\x3f\x00\x40"
    assert (tmp_path / "f").read_bytes() == expected
    assert encode_header({}, {}) == b"\x08\0\0\0\0\0\0\0{}      "


def test_the_mode_follows_the_umask_and_nothing_is_overwritten(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "f", {}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o640
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "f", {}, {})


@pytest.mark.parametrize("chunks", [(b"1234567",), (b"12345678", b"9"), ()])
def test_a_wrong_number_of_bytes_leaves_no_file(chunks: tuple[bytes, ...], tmp_path: Path) -> None:
    given = sum(map(len, chunks))
    with pytest.raises(ValueError, match=f"^a: .*{given} .* 8$"):
        write_file(tmp_path / "f", {"a": TensorSource("F32", (2,), chunks)}, {})
    assert list(tmp_path.iterdir()) == []


# -- hostile files -----------------------------------------------------------------------------------------------------

F4 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def file_of(header: Any, data: int = 4) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {**F4, **changes}}


HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "7 bytes": b"\x02\0\0\0\0\0\0",
    "length past the end": b"\xff\0\0\0\0\0\0\0{}",
    "huge length": (2**64 - 1).to_bytes(8, "little") + b"{}",
    "length over the limit": (MAX_HEADER + 1).to_bytes(8, "little") + b"{}",
    "no header": bytes(8),
    "no JSON": file_of(b"{"),
    "no UTF-8": file_of(b'{"\xff": 1}'),
    "a BOM": file_of(b"\xef\xbb\xbf{}", 0),
    "a list": file_of([]),
    "a number": file_of(3),
    "null": file_of(None),
    "an entry that is a list": file_of({"a": []}),
    "an entry that is null": file_of({"a": None}),
    "deep lists": file_of(b"[" * 100_000 + b"]" * 100_000),
    "deep objects": file_of(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "deep in an entry": file_of(b'{"a":{"dtype":"F32","shape":' + b"[" * 100_000 + b"]" * 100_000 + b"}}"),
    "NaN": file_of(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}'),
    "Infinity": file_of(b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,4]}}'),
    "1e999": file_of(b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}'),
    "5000 digits": file_of(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}'),
    "a duplicate key": file_of(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    ),
    "a duplicate field": file_of(b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}'),
    "two metadata": file_of(b'{"__metadata__":{},"__metadata__":{}}', 0),
    "a duplicate in the metadata": file_of(b'{"__metadata__":{"a":"1","a":"2"}}', 0),
    "metadata of numbers": file_of({"__metadata__": {"a": 1}}, 0),
    "metadata that is a list": file_of({"__metadata__": []}, 0),
    "half a surrogate in a name": file_of(b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'),
    "half a surrogate in the metadata": file_of(b'{"__metadata__":{"a":"\\udfff"}}', 0),
    "an unknown dtype": file_of(entry(dtype="F31")),
    "a small dtype": file_of(entry(dtype="f32")),
    "a dtype that is a list": file_of(entry(dtype=["F32"])),
    "no dtype": file_of({"a": {"shape": [1], "data_offsets": [0, 4]}}),
    "no shape": file_of({"a": {"dtype": "F32", "data_offsets": [0, 4]}}),
    "no offsets": file_of({"a": {"dtype": "F32", "shape": [1]}}),
    "a negative size": file_of(entry(shape=[-1])),
    "two negative sizes": file_of(entry(shape=[-1, -1])),
    "a true size": file_of(entry(shape=[True])),
    "a fraction": file_of(entry(shape=[1.0])),
    "a string size": file_of(entry(shape=["1"])),
    "sizes that overflow": file_of(entry(shape=[2**32, 2**32, 0, 2**63])),
    "2**64": file_of(entry(shape=[2**64])),
    "65 axes": file_of(entry(shape=[1] * 65)),
    "a shape that is a number": file_of(entry(shape=1)),
    "three offsets": file_of(entry(data_offsets=[0, 4, 4])),
    "one offset": file_of(entry(data_offsets=[4])),
    "true offsets": file_of(entry(data_offsets=[False, 4])),
    "offsets back to front": file_of(entry(data_offsets=[4, 0])),
    "negative offsets": file_of(entry(data_offsets=[-4, 0])),
    "offsets past 2**63": file_of(entry(data_offsets=[2**63, 2**63 + 4])),
    "too few bytes": file_of(entry(shape=[2])),
    "too many bytes": file_of(entry(shape=[]) | {"b": {**F4, "data_offsets": [4, 6]}}, 6),
    "a hole at the start": file_of(entry(data_offsets=[4, 8]), 8),
    "a hole": file_of({"a": F4, "b": {**F4, "data_offsets": [8, 12]}}, 12),
    "an overlap": file_of({"a": F4, "b": {**F4, "data_offsets": [2, 6]}}, 6),
    "one range twice": file_of({"a": F4, "b": F4}),
    "cut short": file_of(entry(), 3),
    "bytes left over": file_of(entry(), 5),
    "bytes after nothing": file_of({}, 1),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(HOSTILE[name])
    with raises(CheckpointError, where=tmp_path / "f") as caught:
        read_header(tmp_path / "f")
    assert len(str(caught.value)) < 1000
    str(caught.value).encode()


def test_anything_but_a_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("fifo", "dangling", "loop", "missing", ".", "x" * 300):
        with raises(CheckpointError, where=tmp_path / name):
            read_header(tmp_path / name)
    with raises(CheckpointError, where="/dev/zero"):
        read_header(Path("/dev/zero"))


def test_what_the_format_allows_is_read(tmp_path: Path) -> None:
    for header in (
        {"a": {**F4, "more": [1, {"x": None}]}},
        {"../../a\0": F4},
        {"b": {"dtype": "F32", "shape": [0, 2**40], "data_offsets": [4, 4]}, "a": F4},
        {"c": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "a": F4},
        {"a": {**F4, "shape": [1] * 64}},
    ):
        (tmp_path / "f").write_bytes(file_of(header))
        assert set(read_header(tmp_path / "f").entries) == set(header)


def test_many_duplicates_are_refused_at_once(tmp_path: Path) -> None:
    """The last of many keys is a duplicate. Comparing each key with all others would take minutes."""
    keys = ",".join(f'"{i}":0' for i in [*range(20_000), 19_999])
    (tmp_path / "f").write_bytes(file_of(f"{{{keys}}}".encode()))
    with raises(CheckpointError, found="'19999'"):
        read_header(tmp_path / "f")


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_reader_is_never_laxer_than_the_library(tmp_path: Path, data: st.DataObject) -> None:
    blob = bytearray(small_file(tmp_path))
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "f").write_bytes(blob)
    try:
        header = read_header(tmp_path / "f")
    except CheckpointError:
        return
    try:
        with safe_open(tmp_path / "f", "np") as file:
            assert set(file.keys()) == set(header.entries)
    except SafetensorError as error:
        pytest.fail(f"the library refuses a file that read_header accepts: {error}")


def small_file(folder: Path) -> bytes:
    path = folder / "whole"
    if not path.exists():
        save_file({"a": torch.ones(2, 3), "b.weight": torch.ones(4)}, path, {"format": "pt"})
    return path.read_bytes()

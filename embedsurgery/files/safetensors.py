"""One safetensors file: its header read strictly, and a streaming writer.

The library's own reader hides where a tensor's bytes lie and is lax about duplicate keys, so surgery on rows needs
a reader of its own. Which file holds what, and what the names mean, is ``checkpoint.py``'s and ``names.py``'s.
Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import NamedTuple, TypeGuard

from embedsurgery.errors import CheckpointError, named
from embedsurgery.files.json_reading import HEADER, refuse_bomb
from embedsurgery.files.regular import open_regular, pread_exactly
from embedsurgery.tensors.raw import ITEMSIZE, RawArray

MAX_HEADER = HEADER.size
"""Bytes. The safetensors library accepts 100 MB, of which it makes more than a gigabyte of objects."""

_DIMENSIONS = 64
_SEAL = 32
_CHUNK = 8 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies: ``[begin, end)`` in bytes from the start of the *file*."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A file's header.

    Attributes:
        entries: Tensors by name, in the order of the header.
        metadata: The ``__metadata__`` strings, empty where there are none.
        size: Bytes before the first tensor, the length field included.
    """

    entries: dict[str, Entry]
    metadata: dict[str, str]
    size: int


def read_header(path: Path) -> Header:
    """The header of a safetensors file, without reading a weight.

    Raises:
        CheckpointError: Whatever is not exactly as the format has it: truncation, overlaps, holes, duplicate keys,
            sizes that contradict shapes, unknown dtypes.
    """
    with open_regular(path) as descriptor:
        total = os.fstat(descriptor).st_size
        prefix = os.pread(descriptor, 8, 0)
        if len(prefix) < 8:
            raise _broken(path, "shorter than the 8 bytes of its length field", "8 bytes", f"{len(prefix)}")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER or 8 + length > total:
            limit = min(MAX_HEADER, total - 8)
            raise _broken(path, "not a safetensors file, or cut short", f"a header of {limit} bytes at most", length)
        blob = os.pread(descriptor, length, 8)
    return parse_header(blob, total, path)


def parse_header(blob: bytes, total: int, path: Path) -> Header:
    """As `read_header`, from the JSON's bytes and the whole file's size."""
    refuse_bomb(blob, HEADER, path)
    try:
        # the format pads with spaces; the library accepts any white space, as json does
        hook = partial(_object, {})
        table = json.loads(blob.decode("utf-8"), object_pairs_hook=hook, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _broken(path, "the header is no valid JSON", "an object", str(error)) from error
    if not isinstance(table, dict):
        raise _broken(path, "the header is no object", "an object", type(table).__name__)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _broken(path, "__metadata__ is no object of strings", "strings", type(metadata).__name__)
    for name in (*table, *metadata, *metadata.values()):
        if not name.isascii() and any("\ud800" <= c <= "\udfff" for c in name):
            raise _broken(path, "half a surrogate pair in the header", "text", repr(name))
    size = 8 + len(blob)
    entries = {name: _entry(name, value, size, path) for name, value in table.items()}
    end = size
    for entry in sorted(entries.values(), key=lambda e: (e.begin, e.end)):
        if entry.begin != end:
            word = "overlap" if entry.begin < end else "leave a hole"
            raise _broken(path, f"tensors {word} before {entry.name!r}", f"offset {end - size}", entry.begin - size)
        end = entry.end
    if end != total:
        raise _broken(path, "the file's size is not its tensors' end", f"{end} bytes", f"{total} bytes")
    return Header(entries, metadata, size)


def _entry(name: str, value: object, size: int, path: Path) -> Entry:
    if isinstance(value, dict):
        value = _Described(value.get("dtype"), value.get("shape"), value.get("data_offsets"))
    if not isinstance(value, _Described):
        raise _broken(path, f"tensor {name!r} is no object", "an object", type(value).__name__)
    dtype, shape, offsets = value
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise _broken(path, f"tensor {name!r} has an unknown dtype", "one of " + ", ".join(ITEMSIZE), dtype)
    if not _is_naturals(shape, _DIMENSIONS):
        raise _broken(path, f"tensor {name!r} has a bad shape", "a list of sizes", shape)
    if not _is_naturals(offsets, 2) or len(offsets) != 2:
        raise _broken(path, f"tensor {name!r} has bad data_offsets", "[begin, end]", offsets)
    begin, end = offsets
    expected = prod(shape) * ITEMSIZE[dtype]
    if end - begin != expected:
        raise _broken(path, f"tensor {name!r} has offsets that contradict its shape", f"{expected} bytes", end - begin)
    return Entry(name, dtype, tuple(shape), size + begin, size + end)


def _is_naturals(value: object, most: int) -> TypeGuard[Sequence[int]]:
    if not isinstance(value, (list, tuple)) or len(value) > most:
        return False
    return all(type(v) is int and 0 <= v < 2**63 for v in value)


class _Described(NamedTuple):
    """What a header says of a tensor; a third of the memory that the object would take, of which there are many."""

    dtype: object
    shape: object
    data_offsets: object


def _object(shapes: dict[tuple[int, ...], tuple[int, ...]], pairs: list[tuple[str, object]]) -> object:
    """An object of a header; equal shapes become one."""
    table = _unique(pairs)
    if table.keys() != {"dtype", "shape", "data_offsets"}:
        return table
    dtype, shape, offsets = table["dtype"], table["shape"], table["data_offsets"]
    if isinstance(dtype, str):
        dtype = sys.intern(dtype)
    if _is_naturals(shape, _DIMENSIONS):
        shape = shapes.setdefault(tuple(shape), tuple(shape))
    return _Described(dtype, shape, tuple(offsets) if isinstance(offsets, list) else offsets)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table: dict[str, object] = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"key {name!r} stands twice")
        table[name] = value
    return table


def _no_constant(word: str) -> object:
    raise ValueError(f"{word} is no JSON")


def _broken(path: Path, what: str, expected: object, found: object) -> CheckpointError:
    shown = str(found)
    return CheckpointError(
        f"broken safetensors file: {what}",
        where=path,
        expected=expected,
        found=shown if len(shown) < 200 else shown[:200] + "...",
        hint="download or save the file again",
    )


def read_tensor(descriptor: int, entry: Entry) -> RawArray:
    """All of a tensor, as raw bytes."""
    return RawArray(entry.dtype, entry.shape, pread_exactly(descriptor, entry.end - entry.begin, entry.begin))


@dataclass(frozen=True)
class TensorSource:
    """A tensor to write: its dtype, its shape, and its bytes in chunks of any size."""

    dtype: str
    shape: tuple[int, ...]
    chunks: Iterable[bytes]

    @classmethod
    def of(cls, raw: RawArray) -> TensorSource:
        """A tensor held in memory."""
        return cls(raw.dtype, raw.shape, (raw.data,))


def encode_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The length field and the padded JSON for tensors that follow one another in the order given."""
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + prod(shape) * ITEMSIZE[dtype]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    blob = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    blob += b" " * (-len(blob) % 8)
    return len(blob).to_bytes(8, "little") + blob


def write_file(
    path: Path, tensors: Mapping[str, TensorSource], metadata: Mapping[str, str], *, seal: str | None = None
) -> None:
    """Write a new safetensors file, chunk by chunk, and fsync it. Its mode is the umask's. A failure leaves no file.

    Tensors are laid out widest dtype first, then by name, as the library does, so that each is aligned.

    Args:
        path: Where.
        tensors: By name.
        metadata: The ``__metadata__`` strings.
        seal: The name of one more tensor, U8 (32,), at the end: the sha256 of all bytes before it.

    Raises:
        FileExistsError: The path exists.
    """
    names = sorted(tensors, key=lambda n: (-ITEMSIZE[tensors[n].dtype], n))
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {n: (tensors[n].dtype, tensors[n].shape) for n in names}
    header = encode_header(shapes if seal is None else {**shapes, seal: ("U8", (_SEAL,))}, metadata)
    digest = hashlib.sha256(header) if seal is not None else None
    with named(path), open(path, "xb") as file:
        try:
            file.write(header)
            for name in names:
                for chunk in _checked(name, tensors[name]):
                    file.write(chunk)
                    if digest is not None:
                        digest.update(chunk)
            if digest is not None:
                file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            path.unlink()
            raise


def _checked(name: str, tensor: TensorSource) -> Iterator[bytes]:
    """A tensor's chunks, which must be as many bytes as its shape has."""
    written = 0
    for chunk in tensor.chunks:
        yield chunk
        written += len(chunk)
    expected = prod(tensor.shape) * ITEMSIZE[tensor.dtype]
    if written != expected:
        raise ValueError(f"{name}: {written} bytes given for a shape of {expected}")


def check_seal(path: Path, header: Header, seal: str) -> None:
    """See that a file is what `write_file` sealed; reads all of it, in bounded memory.

    Raises:
        CheckpointError: It has no seal, or the seal is not of these bytes.
    """
    entry = header.entries.get(seal)
    if entry is None or (entry.dtype, entry.shape) != ("U8", (_SEAL,)):
        raise _broken(path, "no checksum at its end", f"tensor {seal}", "none")
    digest = hashlib.sha256()
    with open_regular(path) as descriptor:
        if os.fstat(descriptor).st_size != entry.end:
            raise _broken(path, "the checksum is not at its end", entry.end, os.fstat(descriptor).st_size)
        for start in range(0, entry.begin, _CHUNK):
            digest.update(pread_exactly(descriptor, min(_CHUNK, entry.begin - start), start))
        found = pread_exactly(descriptor, _SEAL, entry.begin)
    if found != digest.digest():
        raise _broken(path, "the checksum is not that of its bytes", digest.hexdigest(), found.hex())

"""Strict reader of a safetensors header, and a streaming writer.

Editing rows in place needs the position of each tensor in the file, which the safetensors library does not give. The
library also accepts duplicate keys. ``stores/checkpoint.py`` reads the files of a whole checkpoint, and
``graph/from_names.py`` interprets the names of tensors.
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

from embedsurgery.errors import CheckpointError, name_os_errors
from embedsurgery.files.json_reading import HEADER, refuse_bomb
from embedsurgery.files.regular import open_regular, pread_exactly
from embedsurgery.tensors.raw import ITEMSIZE, RawArray

MAX_HEADER = HEADER.size
"""Bytes. The safetensors library accepts 100 MB, which would become more than a gigabyte of Python objects."""

_DIMENSIONS = 64
_SEAL = 32
_CHUNK = 8 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file: its data is ``[begin, end)``, in bytes from the start of the *file*."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """The header of a file.

    Attributes:
        entries: Tensors by name, in the order of the header.
        metadata: The ``__metadata__`` strings; empty if there are none.
        size: Bytes before the first tensor, including the length field.
    """

    entries: dict[str, Entry]
    metadata: dict[str, str]
    size: int


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file, and no weights.

    Raises:
        CheckpointError: The file violates the format: it is truncated, has overlaps or gaps between tensors, duplicate
            keys, unknown dtypes, or sizes that contradict shapes.
    """
    with open_regular(path) as descriptor:
        total = os.fstat(descriptor).st_size
        prefix = os.pread(descriptor, 8, 0)
        if len(prefix) < 8:
            raise _file_error(path, "the length field is incomplete", "8 bytes", len(prefix))
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER or 8 + length > total:
            limit = min(MAX_HEADER, total - 8)
            raise _file_error(path, "wrong header size, or truncated", f"a header of at most {limit} bytes", length)
        blob = os.pread(descriptor, length, 8)
    return parse_header(blob, total, path)


def parse_header(blob: bytes, total: int, path: Path) -> Header:
    """Parse a header from its JSON bytes and the size of the whole file, as `read_header`."""
    refuse_bomb(blob, HEADER, path)
    try:
        # The format pads with spaces. The library accepts any white space, and so does json.
        hook = partial(_build_object, {})
        table = json.loads(blob.decode("utf-8"), object_pairs_hook=hook, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise _file_error(path, "the header is not valid JSON", "an object", error) from error
    if not isinstance(table, dict):
        raise _file_error(path, "the header is not an object", "an object", type(table).__name__)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _file_error(path, "__metadata__ must map strings to strings", "strings", type(metadata).__name__)
    for name in (*table, *metadata, *metadata.values()):
        if not name.isascii() and any("\ud800" <= c <= "\udfff" for c in name):
            # JSON can escape half of a surrogate pair, which no file system or terminal can encode.
            raise _file_error(path, "unpaired surrogate in the header", "text", repr(name))
    size = 8 + len(blob)
    entries = {name: _parse_entry(name, value, size, path) for name, value in table.items()}
    end = size
    for entry in sorted(entries.values(), key=lambda e: (e.begin, e.end)):
        if entry.begin != end:
            what = "the tensor overlaps the one before" if entry.begin < end else "gap before the tensor"
            raise _file_error(path, what, f"offset {end - size}", entry.begin - size, entry.name)
        end = entry.end
    if end != total:
        raise _file_error(path, "the file does not end where its tensors end", f"{end} bytes", f"{total} bytes")
    return Header(entries, metadata, size)


def _parse_entry(name: str, value: object, size: int, path: Path) -> Entry:
    if isinstance(value, dict):
        value = _RawEntry(value.get("dtype"), value.get("shape"), value.get("data_offsets"))
    if not isinstance(value, _RawEntry):
        raise _file_error(path, "a tensor's entry is not an object", "an object", type(value).__name__, name)
    dtype, shape, offsets = value
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise _file_error(path, "unknown dtype", "one of " + ", ".join(ITEMSIZE), dtype, name)
    if not _are_sizes(shape, _DIMENSIONS):
        raise _file_error(path, "invalid shape", f"a list of at most {_DIMENSIONS} sizes", shape, name)
    if not _are_sizes(offsets, 2) or len(offsets) != 2:
        raise _file_error(path, "invalid data_offsets", "[begin, end]", offsets, name)
    begin, end = offsets
    expected = prod(shape) * ITEMSIZE[dtype]
    if end - begin != expected:
        raise _file_error(path, "data_offsets contradict the shape", f"{expected} bytes", end - begin, name)
    return Entry(name, dtype, tuple(shape), size + begin, size + end)


def _are_sizes(value: object, most: int) -> TypeGuard[Sequence[int]]:
    """Whether a value is a list of at most so many integers from 0 to 2**63 - 1."""
    if not isinstance(value, (list, tuple)) or len(value) > most:
        return False
    # Not isinstance: True is an int in Python, and no size in JSON.
    return all(type(v) is int and 0 <= v < 2**63 for v in value)


class _RawEntry(NamedTuple):
    """A tensor's entry as parsed. A tuple takes a third of the memory of a dict, and headers have very many."""

    dtype: object
    shape: object
    data_offsets: object


def _build_object(shapes: dict[tuple[int, ...], tuple[int, ...]], pairs: list[tuple[str, object]]) -> object:
    """Build an object of a header; equal shapes share one tuple."""
    table = _refuse_duplicate_keys(pairs)
    if table.keys() != {"dtype", "shape", "data_offsets"}:
        return table
    dtype, shape, offsets = table["dtype"], table["shape"], table["data_offsets"]
    if isinstance(dtype, str):
        dtype = sys.intern(dtype)
    if _are_sizes(shape, _DIMENSIONS):
        shape = shapes.setdefault(tuple(shape), tuple(shape))
    return _RawEntry(dtype, shape, tuple(offsets) if isinstance(offsets, list) else offsets)


def _refuse_duplicate_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return the pairs as a dict. Readers differ in which of two equal keys they take."""
    table: dict[str, object] = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"duplicate key {name!r}")
        table[name] = value
    return table


def _refuse_constant(word: str) -> object:
    """Refuse NaN and Infinity, which Python's parser accepts."""
    raise ValueError(f"{word} is not JSON")


def _file_error(path: Path, what: str, expected: object, found: object, tensor: str | None = None) -> CheckpointError:
    """The error for a file that violates the format."""
    shown = str(found)
    return CheckpointError(
        f"invalid safetensors file: {what}",
        where=path if tensor is None else f"{path}: {tensor[:100]}",
        expected=expected,
        found=shown if len(shown) < 200 else shown[:200] + "...",
        hint="download or save the file again",
    )


def read_tensor(descriptor: int, entry: Entry) -> RawArray:
    """Read all of a tensor."""
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
    """Return the length field and the padded JSON for tensors that are stored in the given order.

    Args:
        tensors: Name -> (dtype, shape).
        metadata: The ``__metadata__`` strings.
    """
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
    """Write a new safetensors file, chunk by chunk, and fsync it. A failure leaves no file.

    The file mode follows the umask. Tensors are sorted by dtype, the widest first, and then by name, as the library
    sorts them, so that each is aligned.

    Args:
        path: The new file.
        tensors: Name -> tensor.
        metadata: The ``__metadata__`` strings.
        seal: Name of an additional last tensor, U8 (32,): the sha256 of all bytes before it.

    Raises:
        FileExistsError: The path exists.
        ValueError: The chunks of a tensor are not as many bytes as its shape.
    """
    names = sorted(tensors, key=lambda n: (-ITEMSIZE[tensors[n].dtype], n))
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {n: (tensors[n].dtype, tensors[n].shape) for n in names}
    header = encode_header(shapes if seal is None else {**shapes, seal: ("U8", (_SEAL,))}, metadata)
    digest = hashlib.sha256(header) if seal is not None else None
    with name_os_errors(path), open(path, "xb") as file:
        try:
            file.write(header)
            for name in names:
                for chunk in _check_chunks(name, tensors[name]):
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


def _check_chunks(name: str, tensor: TensorSource) -> Iterator[bytes]:
    """Yield the chunks of a tensor, and check that they add up to its shape."""
    written = 0
    for chunk in tensor.chunks:
        yield chunk
        written += len(chunk)
    expected = prod(tensor.shape) * ITEMSIZE[tensor.dtype]
    if written != expected:
        raise ValueError(f"{name}: got {written} bytes, but its shape has {expected}")


def check_seal(path: Path, header: Header, seal: str) -> None:
    """Check the checksum that `write_file` put at the end of a file. Reads the whole file, in bounded memory.

    Raises:
        CheckpointError: The checksum is missing or wrong.
    """
    entry = header.entries.get(seal)
    if entry is None or (entry.dtype, entry.shape) != ("U8", (_SEAL,)):
        raise _file_error(path, "missing checksum", f"tensor {seal}", "none")
    digest = hashlib.sha256()
    with open_regular(path) as descriptor:
        if os.fstat(descriptor).st_size != entry.end:
            raise _file_error(path, "the checksum is not at the end", entry.end, os.fstat(descriptor).st_size)
        for start in range(0, entry.begin, _CHUNK):
            digest.update(pread_exactly(descriptor, min(_CHUNK, entry.begin - start), start))
        found = pread_exactly(descriptor, _SEAL, entry.begin)
    if found != digest.digest():
        raise _file_error(path, "wrong checksum", digest.hexdigest(), found.hex())

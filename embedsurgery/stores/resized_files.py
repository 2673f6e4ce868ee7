"""Writes a safetensors file with resized tensors: the header is patched, everything else is copied.

The new file is written beside the old one, in one pass and in bounded memory. ``shard_files.py`` then moves it into
place, and ``resized_shards.py`` decides which tensors are resized.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from embedsurgery.errors import CheckpointError, name_os_errors
from embedsurgery.files.copying import copy_range
from embedsurgery.files.json_patching import scan_value, skip_whitespace
from embedsurgery.files.regular import open_regular
from embedsurgery.files.safetensors import MAX_HEADER, Entry, Header, parse_header
from embedsurgery.tensors.raw import ITEMSIZE

_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class TensorResize:
    """The change of a tensor's length along one axis, at its end.

    Attributes:
        axis: The axis with one entry per token: the first or the last.
        count: Number of entries to add; negative to remove.
        data: Bytes of the new entries in the tensor's dtype, token by token. Empty for a negative count.
    """

    axis: int
    count: int
    data: bytes = b""

    def shape(self, entry: Entry) -> tuple[int, ...]:
        """Return the new shape of a tensor."""
        return tuple(size + self.count * (axis == self.axis) for axis, size in enumerate(entry.shape))


Piece = tuple[int, int] | bytes
"""A part of the new file: a range (begin, end) of the old file, or new bytes."""


def file_pieces(header: Header, resized: Mapping[str, TensorResize]) -> Iterator[Piece]:
    """Yield what follows the new header: ranges of the old file and new bytes, in order.

    Args:
        header: Header of the old file.
        resized: Tensor -> its change.
    """
    begin = header.size
    for entry in sorted(header.entries.values(), key=lambda e: (e.begin, e.end)):
        change = resized.get(entry.name)
        if change is None:
            continue
        # A table (V, D) is one run of bytes that becomes longer. One stored as (D, V) is D runs, each of which gets a
        # value for every new token.
        runs = prod(entry.shape[: change.axis])
        size = (entry.end - entry.begin) // max(runs, 1)
        removed = max(-change.count, 0) * size // entry.shape[change.axis]
        for run, new in enumerate(_split_by_run(change, runs, ITEMSIZE[entry.dtype])):
            end = entry.begin + (run + 1) * size
            yield begin, end - removed
            if new:
                yield new
            begin = end
    yield begin, max((entry.end for entry in header.entries.values()), default=header.size)


def _split_by_run(change: TensorResize, runs: int, itemsize: int) -> Iterator[bytes]:
    """Yield the new bytes at the end of each run: all of them for one run, else the d-th value of every new row."""
    if runs == 1:
        yield change.data
        return
    for d in range(runs):
        places = (row * runs + d for row in range(max(change.count, 0)))
        yield b"".join(change.data[place * itemsize : (place + 1) * itemsize] for place in places)


def write_pieces(source: Path, target: Path, header: bytes, parts: Iterable[Piece]) -> None:
    """Write a new file from a header and pieces of another file, and fsync it. A failure leaves no file.

    Args:
        source: The old file. Its mode is copied.
        target: The new file.
        header: The bytes before the first tensor.
        parts: What follows.

    Raises:
        FileExistsError: The target exists.
        CheckpointError: The source became shorter meanwhile.
    """
    with name_os_errors(target), open_regular(source) as old:
        new = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o600)
        try:
            _write(new, header)
            for part in parts:
                if isinstance(part, bytes):
                    _write(new, part)
                else:
                    copy_range(old, new, *part)
            os.fchmod(new, stat.S_IMODE(os.fstat(old).st_mode))
            os.fsync(new)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
        finally:
            os.close(new)


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def patch_header(data: bytes, shapes: Mapping[str, tuple[int, ...]], path: Path) -> bytes:
    """Return the bytes before the first tensor for resized tensors, which keep their order in the file.

    Only numbers in ``shape`` and ``data_offsets`` change. Keys and their order, ``__metadata__``, unknown fields and
    white space stay. The header is padded so that the tensors begin at a multiple of 8 bytes.

    Args:
        data: The old bytes, including the length field.
        shapes: Tensor -> new shape, with as many axes as before, for resized tensors.
        path: The file, for messages.

    Raises:
        CheckpointError: The new header is longer than readers accept.
    """
    text = data[8:].decode("utf-8").rstrip(" \t\n\r")
    body = json.loads(text)
    numbers: dict[str, dict[str, list[int]]] = {}
    offset = 0
    tensors = [(name, entry) for name, entry in body.items() if name != "__metadata__"]
    for name, entry in sorted(tensors, key=lambda item: item[1]["data_offsets"]):
        shape = list(shapes.get(name, entry["shape"]))
        end = offset + prod(shape) * ITEMSIZE[entry["dtype"]]
        numbers[name] = {"shape": shape, "data_offsets": [offset, end]}
        offset = end
    parts, position = [], 0
    for name, begin, _ in _object_members(text, text.index("{")):
        for key, first, last in _object_members(text, begin) if name in numbers else ():
            if key in ("shape", "data_offsets"):
                parts += [text[position:first], _replace_numbers(text[first:last], numbers[name][key])]
                position = last
    blob = "".join([*parts, text[position:]]).encode()
    blob += b" " * (-len(blob) % 8)
    if len(blob) > MAX_HEADER:
        raise CheckpointError(
            "the new header is longer than readers accept",
            where=path,
            expected=f"at most {MAX_HEADER} bytes",
            found=len(blob),
        )
    return len(blob).to_bytes(8, "little") + blob


def _replace_numbers(text: str, numbers: Iterable[int]) -> str:
    """Replace the numbers in the text of a JSON array, and keep its white space."""
    following = iter(numbers)
    return _NUMBER.sub(lambda _: str(next(following)), text)


def _object_members(text: str, begin: int) -> Iterator[tuple[str, int, int]]:
    """Yield (key, begin, end) of the value of each member of the JSON object at ``begin``."""
    position = skip_whitespace(text, begin + 1)
    while text[position] != "}":
        key, position = scan_value(text, position)
        first = skip_whitespace(text, skip_whitespace(text, position) + 1)
        last = scan_value(text, first)[1]
        yield key, first, last
        position = skip_whitespace(text, last)
        if text[position] == ",":
            position = skip_whitespace(text, position + 1)


def header_layout(data: bytes, path: Path) -> object:
    """Return what the bytes before the first tensor declare, for comparison; None if they are invalid.

    Undos save these bytes, and may come from anywhere: they are restored only if they declare the same tensors as the
    header that would be computed.

    Args:
        data: The bytes, including the length field.
        path: The file, for messages.
    """
    try:
        body = json.loads(data[8:])
        ends = [entry["data_offsets"][1] for name, entry in body.items() if name != "__metadata__"]
        header = parse_header(data[8:], len(data) + max(ends, default=0), path)
    except (CheckpointError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return None
    tensors = [(e.name, e.dtype, e.shape, e.begin - header.size) for e in header.entries.values()]
    return int.from_bytes(data[:8], "little") == len(data) - 8, tensors, header.metadata

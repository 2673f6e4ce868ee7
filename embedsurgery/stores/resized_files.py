"""A safetensors file written anew with other numbers of rows in some tensors: the header respelled, the rest copied.

The new file is made beside the old one, in order and in bounded memory; putting it in the old one's place is
``durable.py``'s.
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

from embedsurgery.errors import CheckpointError, named
from embedsurgery.files.copying import copy_range
from embedsurgery.files.regular import open_regular
from embedsurgery.files.safetensors import MAX_HEADER, Entry, Header
from embedsurgery.tensors.raw import ITEMSIZE

_NUMBER = re.compile(r"\d+")
_GAP = re.compile(r"[ \t\n\r]*")
_scan = json.JSONDecoder().raw_decode


@dataclass(frozen=True)
class Resized:
    """A tensor that gets entries for tokens at the end of one axis, or loses the last ones.

    Attributes:
        axis: The axis with one entry a token: the first, or the last.
        count: How many entries more; negative for fewer.
        data: Their bytes in the tensor's dtype, in the order of the tokens. Empty for a negative count.
    """

    axis: int
    count: int
    data: bytes = b""

    def shape(self, entry: Entry) -> tuple[int, ...]:
        """The tensor's new shape."""
        return tuple(size + self.count * (axis == self.axis) for axis, size in enumerate(entry.shape))


Piece = tuple[int, int] | bytes
"""A range (begin, end) of the old file, or new bytes."""


def pieces(header: Header, resized: Mapping[str, Resized]) -> Iterator[Piece]:
    """What follows the new header: ranges of the old file and new bytes, in order.

    Args:
        header: Of the old file.
        resized: By the tensor's name.
    """
    begin = header.size
    for entry in sorted(header.entries.values(), key=lambda e: (e.begin, e.end)):
        change = resized.get(entry.name)
        if change is None:
            continue
        lines = prod(entry.shape[: change.axis])
        pitch = (entry.end - entry.begin) // max(lines, 1)
        lost = max(-change.count, 0) * pitch // entry.shape[change.axis]
        for line, new in enumerate(_by_line(change, lines, ITEMSIZE[entry.dtype])):
            end = entry.begin + (line + 1) * pitch
            yield begin, end - lost
            if new:
                yield new
            begin = end
    yield begin, max((entry.end for entry in header.entries.values()), default=header.size)


def _by_line(change: Resized, lines: int, size: int) -> Iterator[bytes]:
    """The new bytes at the end of each line: all of them where the rows are whole, else every row's d-th value."""
    if lines == 1:
        yield change.data
        return
    for line in range(lines):
        rows = range(max(change.count, 0))
        yield b"".join(change.data[(r * lines + line) * size : (r * lines + line + 1) * size] for r in rows)


def write_pieces(source: Path, target: Path, header: bytes, parts: Iterable[Piece]) -> None:
    """Write a new file: a header, and pieces of another file; its mode is the other's. A failure leaves no file.

    Raises:
        FileExistsError: The target exists.
        CheckpointError: The source became shorter meanwhile.
    """
    with named(target), open_regular(source) as old:
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


def respell_header(data: bytes, shapes: Mapping[str, tuple[int, ...]], path: Path) -> bytes:
    """The bytes before the first tensor, for tensors of other shapes that follow one another as before.

    Only numbers in ``shape`` and ``data_offsets`` change: keys, their order, ``__metadata__`` and fields that no reader
    knows stay as they are spelled. The padding is such that the tensors begin at a multiple of 8 bytes.

    Args:
        data: The bytes as they are, the length field included.
        shapes: Name -> new shape, of as many axes, for those tensors that get one.
        path: For messages.

    Raises:
        CheckpointError: The new header is longer than readers accept.
    """
    text = data[8:].decode("utf-8").rstrip(" \t\n\r")
    body = json.loads(text)
    places: dict[str, tuple[list[int], list[int]]] = {}
    offset = 0
    tensors = [(name, entry) for name, entry in body.items() if name != "__metadata__"]
    for name, entry in sorted(tensors, key=lambda item: item[1]["data_offsets"]):
        shape = list(shapes.get(name, entry["shape"]))
        end = offset + prod(shape) * ITEMSIZE[entry["dtype"]]
        places[name] = (shape, [offset, end])
        offset = end
    parts, position = [], 0
    for name, begin, _ in _members(text, text.index("{")):
        for key, first, last in _members(text, begin) if name in places else ():
            if key in ("shape", "data_offsets"):
                numbers = iter(places[name][key != "shape"])
                parts += [text[position:first], _NUMBER.sub(lambda _: str(next(numbers)), text[first:last])]  # noqa: B023
                position = last
    blob = "".join([*parts, text[position:]]).encode()
    blob += b" " * (-len(blob) % 8)
    if len(blob) > MAX_HEADER:
        raise CheckpointError(
            "the header would become longer than readers accept",
            where=path,
            expected=f"{MAX_HEADER} bytes at most",
            found=len(blob),
        )
    return len(blob).to_bytes(8, "little") + blob


def _members(text: str, begin: int) -> Iterator[tuple[str, int, int]]:
    """Key, and begin and end of the value, of each member of the JSON object at ``begin``."""
    position = _past_gap(text, begin + 1)
    while text[position] != "}":
        key, position = _scan(text, position)
        first = _past_gap(text, _past_gap(text, position) + 1)
        last = _scan(text, first)[1]
        yield key, first, last
        position = _past_gap(text, last)
        if text[position] == ",":
            position = _past_gap(text, position + 1)


def _past_gap(text: str, position: int) -> int:
    match = _GAP.match(text, position)
    return position if match is None else match.end()

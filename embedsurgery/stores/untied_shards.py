"""What the files of a checkpoint become when a tied head gets a tensor of its own, and when it is tied again.

Nothing is written here; ``shards.py`` has the new files made and put in their places.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from embedsurgery.errors import CheckpointError, UnsupportedError
from embedsurgery.files.json_patching import respell
from embedsurgery.files.json_reading import parse_json, read_small
from embedsurgery.files.regular import open_regular, pread_exactly
from embedsurgery.files.safetensors import Entry, parse_header
from embedsurgery.graph import Table
from embedsurgery.graph.config import places, untied, with_flags
from embedsurgery.plan import Untie
from embedsurgery.stores.checkpoint import CONFIG, INDEX, Checkpoint
from embedsurgery.stores.resized_files import Piece
from embedsurgery.stores.small_files import grown_index
from embedsurgery.tensors.raw import ITEMSIZE


@dataclass(frozen=True)
class Untying:
    """A checkpoint whose head is parted from its lookup, or tied to it again.

    Attributes:
        checkpoint: As it is.
        table: The lookup's.
        edit: What is to be done.
    """

    checkpoint: Checkpoint
    table: Table
    edit: Untie

    def refuse(self) -> None:
        """Refuse a table whose copy cannot be written.

        Raises:
            UnsupportedError: It says why.
        """
        if self.table.transposed:
            raise UnsupportedError(
                "a table that is stored the other way round cannot be given a head apart",
                where=f"{self.checkpoint.directory}: {self.table.name}",
                hint="keep the tie, and suppress the tokens",
            )
        if self.checkpoint.config is None:
            raise UnsupportedError(
                "without a config nobody would load a head apart",
                expected=CONFIG,
                where=self.checkpoint.directory,
                hint="put the model's config there",
            )

    @property
    def in_place(self) -> bool:
        """Whether both ends of the tie are stored, so that rows of one are all that differs."""
        return self.edit.head in self.checkpoint.location and (not self.edit.undo or not self._weights_saved())

    @property
    def source(self) -> str:
        """The stored name of the lookup."""
        return next(name for name, _ in self.table.files if name != self.edit.head)

    @property
    def file(self) -> str:
        """The weight file that changes."""
        at = self.edit.head if self.edit.head in self.checkpoint.location else self.source
        return self.checkpoint.location[at]

    def _weights_saved(self) -> bool:
        return any(name in self.checkpoint.headers for name in self.edit.saved)

    def head(self) -> bytes:
        """The bytes of the weight file before its first tensor, as they become."""
        now = self._head_now()
        body = json.loads(now[8:])
        after = dict(body)
        if self.edit.undo:
            del after[self.edit.head]
        else:
            entry = self.checkpoint.entry(self.source)
            end = max(e.end for e in self._entries().values()) - len(now)
            after[self.edit.head] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [end, end + entry.end - entry.begin],
            }
        blob = respell(now[8:].rstrip(b" \t\r\n"), body, after, self.checkpoint.directory / self.file)
        blob += b" " * (-len(blob) % 8)
        new = len(blob).to_bytes(8, "little") + blob
        saved = self.edit.saved.get(self.file)
        return saved if saved is not None and self._alike(saved, new) else new

    def pieces(self) -> Iterator[Piece]:
        """What follows the new header: ranges of the old file, and the head's own rows."""
        begin = self.checkpoint.headers[self.file].size
        end = max(entry.end for entry in self._entries().values())
        if self.edit.undo:
            gone = self.checkpoint.entry(self.edit.head)
            yield from ((begin, gone.begin), (gone.end, end))
            return
        yield begin, end
        entry = self.checkpoint.entry(self.source)
        pitch = entry.shape[1] * ITEMSIZE[entry.dtype]
        rows = self.edit.rows.to(entry.dtype).data
        position = entry.begin
        for number, index in sorted(enumerate(self.edit.indices), key=lambda item: item[1]):
            yield position, entry.begin + index * pitch
            yield rows[number * pitch : (number + 1) * pitch]
            position = entry.begin + (index + 1) * pitch
        yield position, entry.end

    def small_files(self) -> dict[str, bytes]:
        """The small files that change, and what they become: as saved, where that is what became the present ones."""
        found = {}
        for name, now in self._present().items():
            new = self._changed(name, now, undo=self.edit.undo)
            if new == now:
                continue
            found[name] = new
            saved = self.edit.saved.get(name)
            if self.edit.undo and saved is not None and self._changed(name, saved, undo=False) == now:
                found[name] = saved
        return found

    def saved(self) -> dict[str, bytes]:
        """The present bytes of everything that changes."""
        present = self._present()
        small = {name: present[name] for name in self.small_files()}
        return small if self.in_place else {**small, self.file: self._head_now()}

    def _present(self) -> dict[str, bytes]:
        names = [CONFIG] if self.checkpoint.config is not None else []
        names += [INDEX] if self.checkpoint.indexed and not self.in_place else []
        return {name: read_small(self.checkpoint.directory / name) for name in names}

    def _changed(self, name: str, data: bytes, *, undo: bool) -> bytes:
        path = self.checkpoint.directory / name
        body = parse_json(data, path)
        if name == CONFIG:
            before = self.edit.saved.get(CONFIG)
            was = [] if before is None else places(parse_json(before, path))
            after = with_flags(body, was) if undo else untied(body)
            return data if after == body else respell(data, body, after, path)
        entry = self.checkpoint.entry(self.source)
        sign = -1 if undo else 1
        mapped = {key: file for key, file in body["weight_map"].items() if key != self.edit.head}
        if not undo:
            mapped[self.edit.head] = self.file
        if mapped == body["weight_map"]:
            return data
        data = respell(data, body, {**body, "weight_map": mapped}, path)
        return grown_index(data, sign * (entry.end - entry.begin), sign * prod(entry.shape), path)

    def _entries(self) -> Mapping[str, Entry]:
        return self.checkpoint.headers[self.file].entries

    def _head_now(self) -> bytes:
        with open_regular(self.checkpoint.directory / self.file) as descriptor:
            return pread_exactly(descriptor, self.checkpoint.headers[self.file].size, 0)

    def _alike(self, saved: bytes, new: bytes) -> bool:
        """Whether two headers say the same of the tensors that follow."""
        path = self.checkpoint.directory / self.file
        try:
            first, second = (parse_header(head[8:], len(head) + self._bytes(head), path) for head in (saved, new))
        except (CheckpointError, ValueError, KeyError, TypeError, IndexError):
            return False
        tensors = ([(e.name, e.dtype, e.shape, e.begin - h.size) for e in h.entries.values()] for h in (first, second))
        return first.metadata == second.metadata and next(tensors) == next(tensors)

    def _bytes(self, head: bytes) -> int:
        body = json.loads(head[8:])
        return max((entry["data_offsets"][1] for name, entry in body.items() if name != "__metadata__"), default=0)

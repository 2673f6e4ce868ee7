"""Computes the files of a checkpoint after its head was untied, or tied again.

Usually only the lookup is stored, and untying adds a tensor for the head: the header is patched and the tensor is
written as a copy of the lookup with other rows. Some checkpoints store both ends; then only rows of the head change.
Nothing is written here. ``resized_files.py`` writes weight files, ``shards.py`` combines both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from embedsurgery.errors import UnsupportedError
from embedsurgery.files.json_patching import patch_json
from embedsurgery.files.json_reading import parse_json, read_small
from embedsurgery.files.regular import open_regular, pread_exactly
from embedsurgery.files.safetensors import Entry
from embedsurgery.graph import Table
from embedsurgery.graph.config import clear_tie_flags, read_tie_flags, replace_tie_flags
from embedsurgery.plan import Untie
from embedsurgery.stores.checkpoint import CONFIG, INDEX, Checkpoint
from embedsurgery.stores.resized_files import Piece, header_layout
from embedsurgery.stores.small_files import resize_index
from embedsurgery.tensors.raw import ITEMSIZE


@dataclass(frozen=True)
class ShardUntie:
    """An `Untie` of a checkpoint.

    Attributes:
        checkpoint: The checkpoint before the edit.
        table: The table of the lookup.
        edit: The edit.
    """

    checkpoint: Checkpoint
    table: Table
    edit: Untie

    def check(self) -> None:
        """Refuse an edit that cannot be done, or that loaders would ignore.

        Raises:
            UnsupportedError: The table is stored transposed, or the checkpoint has no config.
        """
        if self.table.transposed:
            raise UnsupportedError(
                "the head of a transposed table cannot be untied",
                where=f"{self.checkpoint.directory}: {self.table.name}",
                hint="keep the tie, and suppress the tokens",
            )
        if self.checkpoint.config is None:
            # Without tie_word_embeddings = false, loaders tie the head again.
            raise UnsupportedError(
                "the head cannot be untied without a config",
                where=self.checkpoint.directory,
                expected=CONFIG,
                hint="add the model's config to the checkpoint",
            )

    @property
    def in_place(self) -> bool:
        """Whether both ends of the tie are stored, before and after, so that only rows of the head change.

        An undo of untying also finds both stored. It removes the head if the undo has saved the header without it.
        """
        header_saved = any(name in self.checkpoint.headers for name in self.edit.saved)
        return self.edit.head in self.checkpoint.location and not (self.edit.undo and header_saved)

    @property
    def lookup(self) -> str:
        """The stored name of the lookup's table."""
        return next(name for name, _ in self.table.files if name != self.edit.head)

    @property
    def weight_file(self) -> str:
        """The weight file that changes."""
        name = self.edit.head if self.edit.head in self.checkpoint.location else self.lookup
        return self.checkpoint.location[name]

    def new_header(self) -> bytes:
        """Compute the new header bytes of the weight file, with or without the head.

        A header that the undo has saved is used if it declares the same tensors. It also has the original padding.
        """
        now = self._read_header()
        path = self.checkpoint.directory / self.weight_file
        body = json.loads(now[8:])
        after = dict(body)
        if self.edit.undo:
            del after[self.edit.head]
        else:
            entry = self.checkpoint.entry(self.lookup)
            end = max(e.end for e in self._entries().values()) - len(now)
            after[self.edit.head] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [end, end + entry.end - entry.begin],
            }
        blob = patch_json(now[8:].rstrip(b" \t\r\n"), body, after, path)
        blob += b" " * (-len(blob) % 8)
        new = len(blob).to_bytes(8, "little") + blob
        saved = self.edit.saved.get(self.weight_file)
        return saved if saved is not None and header_layout(saved, path) == header_layout(new, path) else new

    def new_pieces(self) -> Iterator[Piece]:
        """Yield what follows the new header: ranges of the old file, and the rows in which the head differs."""
        begin = self.checkpoint.headers[self.weight_file].size
        end = max(entry.end for entry in self._entries().values())
        if self.edit.undo:
            removed = self.checkpoint.entry(self.edit.head)
            yield from ((begin, removed.begin), (removed.end, end))
            return
        yield begin, end
        # The head comes last: ranges of the lookup's table, from the same file, with other rows in between.
        entry = self.checkpoint.entry(self.lookup)
        pitch = entry.shape[1] * ITEMSIZE[entry.dtype]
        rows = self.edit.rows.to(entry.dtype).data
        position = entry.begin
        for number, index in sorted(enumerate(self.edit.indices), key=lambda item: item[1]):
            yield position, entry.begin + index * pitch
            yield rows[number * pitch : (number + 1) * pitch]
            position = entry.begin + (index + 1) * pitch
        yield position, entry.end

    def new_small_files(self) -> dict[str, bytes]:
        """Compute the new bytes of the small files that change.

        An undo restores the bytes that it has saved if untying turns them into the current ones. Otherwise it patches
        the current file, which keeps what others wrote into it.
        """
        found = {}
        for name, now in self._current_small_files().items():
            new = self._patch_small_file(name, now, undo=self.edit.undo)
            if new == now:
                continue
            found[name] = new
            saved = self.edit.saved.get(name)
            if self.edit.undo and saved is not None and self._patch_small_file(name, saved, undo=False) == now:
                found[name] = saved
        return found

    def current_bytes(self) -> dict[str, bytes]:
        """Read what will change: the header bytes of the weight file and all bytes of small files."""
        current = self._current_small_files()
        small = {name: current[name] for name in self.new_small_files()}
        return small if self.in_place else {**small, self.weight_file: self._read_header()}

    def _current_small_files(self) -> dict[str, bytes]:
        """Read the small files that may change."""
        names = [CONFIG] if self.checkpoint.config is not None else []
        names += [INDEX] if self.checkpoint.indexed and not self.in_place else []
        return {name: read_small(self.checkpoint.directory / name) for name in names}

    def _patch_small_file(self, name: str, data: bytes, *, undo: bool) -> bytes:
        """Patch ``config.json`` or the index."""
        path = self.checkpoint.directory / name
        body = parse_json(data, path)
        if name == CONFIG:
            before = self.edit.saved.get(CONFIG)
            was = [] if before is None else read_tie_flags(parse_json(before, path))
            after = replace_tie_flags(body, was) if undo else clear_tie_flags(body)
            return data if after == body else patch_json(data, body, after, path)
        entry = self.checkpoint.entry(self.lookup)
        sign = -1 if undo else 1
        mapped = {key: file for key, file in body["weight_map"].items() if key != self.edit.head}
        if not undo:
            mapped[self.edit.head] = self.weight_file
        if mapped == body["weight_map"]:
            return data
        data = patch_json(data, body, {**body, "weight_map": mapped}, path)
        return resize_index(data, sign * (entry.end - entry.begin), sign * prod(entry.shape), path)

    def _entries(self) -> Mapping[str, Entry]:
        return self.checkpoint.headers[self.weight_file].entries

    def _read_header(self) -> bytes:
        """Read the bytes of the weight file before its first tensor."""
        with open_regular(self.checkpoint.directory / self.weight_file) as descriptor:
            return pread_exactly(descriptor, self.checkpoint.headers[self.weight_file].size, 0)

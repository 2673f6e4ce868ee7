"""What the files of a checkpoint become when a vocabulary of it grows: headers, small files and new bytes.

Nothing is written here; ``shards.py`` has the new files made and put in their places.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from embedsurgery.errors import CheckpointError
from embedsurgery.files.json_reading import read_small
from embedsurgery.files.regular import open_regular, pread_exactly
from embedsurgery.files.safetensors import parse_header
from embedsurgery.graph import EmbeddingGraph, Vocabulary
from embedsurgery.graph.vocabularies import canonical, names_of, rows_of_tables
from embedsurgery.plan import Grow
from embedsurgery.stores.checkpoint import CONFIG, INDEX, Checkpoint
from embedsurgery.stores.resized_files import Resized, respell_header
from embedsurgery.stores.small_files import grown_config, grown_index
from embedsurgery.tensors.raw import ITEMSIZE


@dataclass(frozen=True)
class Growth:
    """A vocabulary of a checkpoint that gets rows, or loses some.

    Attributes:
        checkpoint: As it is.
        graph: Of it.
        vocabulary: One of the graph's.
        count: How many rows more; negative for fewer.
    """

    checkpoint: Checkpoint
    graph: EmbeddingGraph
    vocabulary: Vocabulary
    count: int

    def tensors(self) -> Iterator[tuple[str, str, int]]:
        """Every stored tensor that grows: its name, that of the table or vector it is a copy of, and the axis."""
        for table in map(self.graph.table, self.vocabulary.tables):
            for name, _ in table.files:
                yield name, table.name, 1 if name in table.transposed else 0
        for vector in self.vocabulary.vectors:
            for name in self.checkpoint.location:
                twin = canonical(name) == canonical(vector) and name not in self.vocabulary.vectors
                if name == vector or twin:
                    yield name, vector, len(self.checkpoint.entry(name).shape) - 1

    def resized(self, edit: Grow | None = None) -> dict[str, dict[str, Resized]]:
        """File -> tensor's name -> what becomes of it; without the new bytes where no edit is given."""
        found: dict[str, dict[str, Resized]] = {}
        for name, of, axis in self.tensors():
            data = b""
            if edit is not None and edit.count > 0:
                values = edit.rows[of] if of in edit.rows else edit.vectors[of]
                data = values.to(self.checkpoint.entry(name).dtype).data
            file = self.checkpoint.location[name]
            found.setdefault(file, {})[name] = Resized(axis, self.count, data)
        return found

    def head(self, file: str) -> bytes:
        """The bytes of a weight file before its first tensor."""
        with open_regular(self.checkpoint.directory / file) as descriptor:
            return pread_exactly(descriptor, self.checkpoint.headers[file].size, 0)

    def heads(self, saved: Mapping[str, bytes]) -> dict[str, bytes]:
        """What `head` becomes: as saved, where that is what became the present one."""
        found = {}
        for file, resized in self.resized().items():
            entries = self.checkpoint.headers[file].entries
            path, now = self.checkpoint.directory / file, self.head(file)
            new = respell_header(now, {name: r.shape(entries[name]) for name, r in resized.items()}, path)
            found[file] = new
            if file in saved and _layout(saved[file], path) == _layout(new, path):
                shapes = {name: entries[name].shape for name in resized}
                if respell_header(saved[file], shapes, path) == now:
                    found[file] = saved[file]
        return found

    def small_files(self, saved: Mapping[str, bytes]) -> dict[str, bytes]:
        """The small files that change, and what they become: as saved, where that is what became the present ones."""
        found = {}
        for name, old in self._present().items():
            new = self._grown(name, old, self.count, rows_of_tables(self.graph, self.vocabulary))
            if new == old:
                continue
            found[name] = new
            sizes = frozenset(s + self.count for s in rows_of_tables(self.graph, self.vocabulary))
            try:
                if name in saved and self._grown(name, saved[name], -self.count, sizes) == old:
                    found[name] = saved[name]
            except CheckpointError:  # somebody else's bytes
                continue
        return found

    def saved(self) -> dict[str, bytes]:
        """The present bytes of everything that changes."""
        present = self._present()
        small = {name: present[name] for name in self.small_files({})}
        return {**{file: self.head(file) for file in self.resized()}, **small}

    def _present(self) -> dict[str, bytes]:
        """The small files that may change, as they are."""
        names = [CONFIG] if self.checkpoint.config is not None else []
        names += [INDEX] if self.checkpoint.indexed else []
        return {name: read_small(self.checkpoint.directory / name) for name in names}

    def _grown(self, name: str, data: bytes, count: int, sizes: frozenset[int]) -> bytes:
        path = self.checkpoint.directory / name
        if name == CONFIG:
            return grown_config(data, names_of(self.graph, self.vocabulary), sizes, count, path)
        elements = size = 0
        for tensor, _, axis in self.tensors():
            entry = self.checkpoint.entry(tensor)
            more = count * prod(entry.shape) // entry.shape[axis]
            elements, size = elements + more, size + more * ITEMSIZE[entry.dtype]
        return grown_index(data, size, elements, path)


def _layout(head: bytes, path: Path) -> object:
    """What a header says of its tensors; None for one that says nothing right."""
    try:
        body = json.loads(head[8:])
        ends = [entry["data_offsets"][1] for name, entry in body.items() if name != "__metadata__"]
        header = parse_header(head[8:], len(head) + max(ends, default=0), path)
    except (CheckpointError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return None
    tensors = [(e.name, e.dtype, e.shape, e.begin - header.size) for e in header.entries.values()]
    return int.from_bytes(head[:8], "little") == len(head) - 8, tensors, header.metadata

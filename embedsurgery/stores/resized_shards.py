"""Computes the files of a checkpoint after a vocabulary was resized: headers, small files and new bytes.

Nothing is written here. ``resized_files.py`` writes weight files, ``shards.py`` combines both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from embedsurgery.errors import CheckpointError
from embedsurgery.files.json_reading import read_small
from embedsurgery.files.regular import open_regular, pread_exactly
from embedsurgery.graph import EmbeddingGraph, Vocabulary
from embedsurgery.graph.vocabularies import canonical_name, names_of, row_counts_of
from embedsurgery.plan import Grow
from embedsurgery.stores.checkpoint import CONFIG, INDEX, Checkpoint
from embedsurgery.stores.resized_files import TensorResize, header_layout, patch_header
from embedsurgery.stores.small_files import resize_config, resize_index
from embedsurgery.tensors.raw import ITEMSIZE


@dataclass(frozen=True)
class ShardResize:
    """A change of the number of rows of a vocabulary in a checkpoint.

    Attributes:
        checkpoint: The checkpoint before the change.
        graph: Its graph.
        vocabulary: One of the graph's vocabularies.
        count: Number of rows to add; negative to remove.
    """

    checkpoint: Checkpoint
    graph: EmbeddingGraph
    vocabulary: Vocabulary
    count: int

    def stored_tensors(self) -> Iterator[tuple[str, str, int]]:
        """Yield (name, table or vector, axis) of every stored tensor that is resized along that axis."""
        for table in map(self.graph.table, self.vocabulary.tables):
            for name, _ in table.files:
                yield name, table.name, 1 if name in table.transposed else 0
        for vector in self.vocabulary.vectors:
            for name in self.checkpoint.location:
                # A file may have a BERT head's bias twice, as ``predictions.bias`` and ``predictions.decoder.bias``.
                twin = canonical_name(name) == canonical_name(vector) and name not in self.vocabulary.vectors
                if name == vector or twin:
                    yield name, vector, len(self.checkpoint.entry(name).shape) - 1

    def tensor_resizes(self, edit: Grow | None = None) -> dict[str, dict[str, TensorResize]]:
        """Return file -> tensor -> its change; without new bytes if no edit is given."""
        found: dict[str, dict[str, TensorResize]] = {}
        for name, of, axis in self.stored_tensors():
            data = b""
            if edit is not None and edit.count > 0:
                values = edit.rows[of] if of in edit.rows else edit.vectors[of]
                data = values.to(self.checkpoint.entry(name).dtype).data
            file = self.checkpoint.location[name]
            found.setdefault(file, {})[name] = TensorResize(axis, self.count, data)
        return found

    def read_header(self, file: str) -> bytes:
        """Read the bytes of a weight file before its first tensor."""
        with open_regular(self.checkpoint.directory / file) as descriptor:
            return pread_exactly(descriptor, self.checkpoint.headers[file].size, 0)

    def new_headers(self, saved: Mapping[str, bytes]) -> dict[str, bytes]:
        """Compute the new header bytes of each weight file.

        Args:
            saved: `Grow.saved` of an undo. A saved header is used if the change that is undone turns it into the
                current one. That also restores its padding, which a patch does not keep.
        """
        found = {}
        for file, resized in self.tensor_resizes().items():
            entries = self.checkpoint.headers[file].entries
            path, now = self.checkpoint.directory / file, self.read_header(file)
            new = patch_header(now, {name: r.shape(entries[name]) for name, r in resized.items()}, path)
            found[file] = new
            if file in saved and header_layout(saved[file], path) == header_layout(new, path):
                shapes = {name: entries[name].shape for name in resized}
                if patch_header(saved[file], shapes, path) == now:
                    found[file] = saved[file]
        return found

    def new_small_files(self, saved: Mapping[str, bytes]) -> dict[str, bytes]:
        """Compute the new bytes of the small files that change.

        Args:
            saved: `Grow.saved` of an undo. A saved file is used if the change that is undone turns it into the current
                one. It knows, say, that a key had the grown size already before. Otherwise the current file is patched,
                which keeps what others wrote into it.
        """
        found = {}
        for name, old in self._current_small_files().items():
            new = self._resize_small_file(name, old, self.count, row_counts_of(self.graph, self.vocabulary))
            if new == old:
                continue
            found[name] = new
            sizes = frozenset(s + self.count for s in row_counts_of(self.graph, self.vocabulary))
            try:
                if name in saved and self._resize_small_file(name, saved[name], -self.count, sizes) == old:
                    found[name] = saved[name]
            except CheckpointError:  # the saved bytes are not such a file
                continue
        return found

    def current_bytes(self) -> dict[str, bytes]:
        """Read what will change: the header bytes of weight files and all bytes of small files."""
        current = self._current_small_files()
        small = {name: current[name] for name in self.new_small_files({})}
        return {**{file: self.read_header(file) for file in self.tensor_resizes()}, **small}

    def _current_small_files(self) -> dict[str, bytes]:
        """Read the small files that may change."""
        names = [CONFIG] if self.checkpoint.config is not None else []
        names += [INDEX] if self.checkpoint.indexed else []
        return {name: read_small(self.checkpoint.directory / name) for name in names}

    def _resize_small_file(self, name: str, data: bytes, count: int, sizes: frozenset[int]) -> bytes:
        path = self.checkpoint.directory / name
        if name == CONFIG:
            return resize_config(data, names_of(self.graph, self.vocabulary), sizes, count, path)
        elements = size = 0
        for tensor, _, axis in self.stored_tensors():
            entry = self.checkpoint.entry(tensor)
            more = count * prod(entry.shape) // entry.shape[axis]
            elements, size = elements + more, size + more * ITEMSIZE[entry.dtype]
        return resize_index(data, size, elements, path)

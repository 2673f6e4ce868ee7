"""Tables in the safetensors files of a checkpoint: rows are read and written where they lie, growing makes files anew.

Rows go straight into the files of the directory that it is opened on, so the caller opens it on a staged copy, or has
a journal written first. What makes files anew is imported where it is done, which is seldom.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy as copied
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from embedsurgery.files.regular import open_regular, pread_exactly, pwrite_exactly
from embedsurgery.files.safetensors import Entry, read_tensor
from embedsurgery.graph import EmbeddingGraph, Table, Vocabulary
from embedsurgery.graph.architectures import ARCHITECTURES, Layout
from embedsurgery.graph.from_names import walk_names
from embedsurgery.graph.vocabularies import grown_graph
from embedsurgery.plan import AddTokens, Edit, Grow, PatchFile, Suppress, Untie
from embedsurgery.plan.blocks import spans
from embedsurgery.plan.edit import Footprint, Range
from embedsurgery.stores.checkpoint import Checkpoint, open_checkpoint
from embedsurgery.stores.shard_files import ShardFiles, refuse_links
from embedsurgery.stores.store import Store
from embedsurgery.tensors.raw import ITEMSIZE, RawArray

if TYPE_CHECKING:
    import numpy as np

    from embedsurgery.stores.resized_shards import Growth
    from embedsurgery.stores.untied_shards import Untying


class ShardStore(Store):
    """A checkpoint directory.

    Args:
        checkpoint: Its headers.
        work: A directory on the same file system for files that are being made, where the caller puts everything back
            if need be. By default they lie beside those that they are to become, and nothing is left half replaced.
        architectures: What is special about the names of which architecture.

    The graph is the walk's, with one question settled that headers leave open: whether a tie that the config claims,
    and whose two ends are both stored, holds. Loaders tie equal tensors and part different ones, so their bytes decide.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        work: Path | None = None,
        *,
        architectures: Mapping[str, Layout] = ARCHITECTURES,
    ) -> None:
        self.work = work
        self.refuse_links = work is None
        """Whether a file with a second name is not written. In place it may have one of the journal's; and what is only
        planned on here may be written elsewhere."""
        self.name = str(checkpoint.directory)
        self._architectures = architectures
        self._written: set[str] = set()
        self._see(checkpoint)

    def _see(self, checkpoint: Checkpoint) -> None:
        """Take a checkpoint's files for what is stored."""
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        for name in ("graph", "claimed_graph"):
            vars(self).pop(name, None)

    @property
    def directory(self) -> Path:  # type: ignore[override]  # it follows the checkpoint
        return self.checkpoint.directory

    @cached_property
    def graph(self) -> EmbeddingGraph:  # type: ignore[override]  # mypy takes it for read-only
        return walk_names(
            self.checkpoint.stored(),
            config=self.config,
            source=self.name,
            equal=self.equal,
            architectures=self._architectures,
        )

    @cached_property
    def claimed_graph(self) -> EmbeddingGraph:
        return walk_names(
            self.checkpoint.stored(), config=self.config, source=self.name, architectures=self._architectures
        )

    @property
    def _transposed(self) -> frozenset[str]:
        return frozenset(n for table in self.graph.tables for n in table.transposed)

    @classmethod
    def open(
        cls, directory: Path, work: Path | None = None, *, architectures: Mapping[str, Layout] = ARCHITECTURES
    ) -> ShardStore:
        """A store over a directory, whatever state a change in place has left it in: see `Registry.open_store`.

        Args:
            directory: The checkpoint.
            work: As for the class.
            architectures: What is special about the names of which architecture.

        Raises:
            CheckpointError: Its files are missing or broken.
        """
        return cls(open_checkpoint(directory), work, architectures=architectures)

    def within(self, work: Path) -> ShardStore:
        """The same checkpoint, which nobody has changed since it was opened, by one who makes files in ``work``."""
        other = copied(self)
        other.work, other.refuse_links, other._written = work, False, set()
        return other

    def again(self, *, headers: bool = True) -> ShardStore:
        """The checkpoint as it is now. Which tables are equal is compared again.

        Args:
            headers: Read the headers again. Where only rows were written they are as they were.
        """
        checkpoint = open_checkpoint(self.checkpoint.directory) if headers else self.checkpoint
        return ShardStore(checkpoint, self.work, architectures=self._architectures)

    def copies(self, table: Table) -> tuple[str, ...]:
        return tuple(name for name, _ in table.files)

    def is_transposed(self, name: str) -> bool:
        """Whether a stored table has its dimensions first, so that a row is spread over all of it."""
        return name in self._transposed

    def tensor_names(self) -> Collection[str]:
        return self.checkpoint.location.keys()

    def equal(self, a: str, b: str) -> bool:
        """Whether two tensors hold the same bytes; stops at the first block that differs."""
        left, right = self.checkpoint.entry(a), self.checkpoint.entry(b)
        if (left.dtype, left.shape) != (right.dtype, right.shape):
            return False
        with self._file(a) as one, self._file(b) as two:
            for start, stop in spans(left.end - left.begin, 1):
                size = stop - start
                if pread_exactly(one, size, left.begin + start) != pread_exactly(two, size, right.begin + start):
                    return False
        return True

    @contextmanager
    def _file(self, name: str, flags: int = os.O_RDONLY) -> Iterator[int]:
        if flags != os.O_RDONLY:
            self._written.add(self.checkpoint.location[name])
        with open_regular(self.checkpoint.path(name), flags) as descriptor:
            if flags != os.O_RDONLY and self.refuse_links:
                refuse_links(self.checkpoint.path(name), os.fstat(descriptor).st_nlink)
            yield descriptor

    def check_writable(self, table: Table) -> None:
        """Refuse a table in a file that has a second name: what that stands for would change too."""
        for _, file in table.files if self.refuse_links else ():
            path = self.checkpoint.directory / file
            refuse_links(path, path.stat().st_nlink)

    def tensor_shapes(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        entries = map(self.checkpoint.entry, self.checkpoint.location)
        return {entry.name: (entry.dtype, entry.shape) for entry in entries}

    def read_rows(self, name: str, indices: tuple[int, ...]) -> RawArray:
        entry = self.checkpoint.entry(name)
        if name in self._transposed:
            import numpy as np

            with self._file(name) as file:
                lines = (_line(file, entry, d)[np.asarray(indices, dtype=np.int64)] for d in range(entry.shape[0]))
                rows = np.ascontiguousarray(np.stack(list(lines), axis=1))
            return RawArray(entry.dtype, (len(indices), entry.shape[0]), rows.tobytes())
        pitch = entry.shape[1] * ITEMSIZE[entry.dtype]
        with self._file(name) as file:
            data = b"".join(pread_exactly(file, pitch, entry.begin + index * pitch) for index in indices)
        return RawArray(entry.dtype, (len(indices), entry.shape[1]), data)

    def read_vector(self, name: str) -> RawArray:
        with self._file(name) as file:
            raw = read_tensor(file, self.checkpoint.entry(name))
        return RawArray(raw.dtype, (raw.shape[-1],), raw.data)

    def vector_copies(self, name: str) -> list[str]:
        """The names under which a per-token vector is stored."""
        vocabulary = next(v for v in self.graph.vocabularies if name in v.vectors)
        return [copy for copy, of, _ in self._growth(vocabulary, 1).tensors() if of == name]

    def row_ranges(self, table: str, indices: Sequence[int] | None) -> Mapping[str, Sequence[Range]]:
        found = self.graph.find(table)
        ranges: dict[str, list[Range]] = {}
        for name, file in found.files if found is not None else ():
            ranges.setdefault(file, []).extend(self._tensor_ranges(name, indices))
        return ranges

    def _tensor_ranges(self, name: str, indices: Sequence[int] | None) -> list[Range]:
        """Where rows of a tensor lie: all of it, if it is asked for whole or stored transposed."""
        entry = self.checkpoint.entry(name)
        if indices is None or self.is_transposed(name):
            return [(entry.begin, entry.end)]
        return _row_ranges(entry, entry.shape[1] * ITEMSIZE[entry.dtype], indices)

    def entry_ranges(self, vector: str, indices: Sequence[int]) -> Mapping[str, Sequence[Range]]:
        ranges: dict[str, list[Range]] = {}
        for name in self.vector_copies(vector):
            entry = self.checkpoint.entry(name)
            found = _row_ranges(entry, ITEMSIZE[entry.dtype], indices)
            ranges.setdefault(self.checkpoint.location[name], []).extend(found)
        return ranges

    def check_vector(self, name: str) -> None:
        for file in self.entry_ranges(name, ()) if self.refuse_links else ():
            path = self.checkpoint.directory / file
            refuse_links(path, path.stat().st_nlink)

    def write_entries(self, name: str, indices: tuple[int, ...], entries: RawArray) -> None:
        for copy in self.vector_copies(name):
            entry = self.checkpoint.entry(copy)
            values, size = entries.to(entry.dtype).data, ITEMSIZE[entry.dtype]
            with self._file(copy, os.O_RDWR) as file:
                for number, index in enumerate(indices):
                    pwrite_exactly(file, values[number * size : (number + 1) * size], entry.begin + index * size)

    def write_rows(self, name: str, indices: tuple[int, ...], rows: RawArray) -> None:
        entry = self.checkpoint.entry(name)
        size = ITEMSIZE[entry.dtype]
        with self._file(name, os.O_RDWR) as file:
            if name in self._transposed:
                import numpy as np

                for d in range(entry.shape[0]):
                    line = _line(file, entry, d).copy()
                    line[np.asarray(indices, dtype=np.int64)] = rows.bits[:, d]
                    pwrite_exactly(file, line.tobytes(), entry.begin + d * entry.shape[1] * size)
                return
            pitch = entry.shape[1] * size
            for position, index in enumerate(indices):
                pwrite_exactly(file, rows.data[position * pitch : (position + 1) * pitch], entry.begin + index * pitch)

    def read_block(self, name: str, start: int, stop: int) -> RawArray:
        entry = self.checkpoint.entry(name)
        if name in self._transposed:
            import numpy as np

            with self._file(name) as file:
                lines = [_line(file, entry, d, start, stop) for d in range(entry.shape[0])]
            rows = np.ascontiguousarray(np.stack(lines, axis=1))
            return RawArray(entry.dtype, (stop - start, entry.shape[0]), rows.tobytes())
        pitch = entry.shape[1] * ITEMSIZE[entry.dtype]
        with self._file(name) as file:
            data = pread_exactly(file, (stop - start) * pitch, entry.begin + start * pitch)
        return RawArray(entry.dtype, (stop - start, entry.shape[1]), data)

    def write_block(self, name: str, start: int, rows: RawArray) -> None:
        entry = self.checkpoint.entry(name)
        if name in self._transposed:
            self.write_rows(name, tuple(range(start, start + rows.shape[0])), rows)
            return
        pitch = entry.shape[1] * ITEMSIZE[entry.dtype]
        with self._file(name, os.O_RDWR) as file:
            pwrite_exactly(file, rows.data, entry.begin + start * pitch)

    def check_growth(self, vocabulary: Vocabulary, count: int) -> None:
        super().check_growth(vocabulary, count)
        growth = self._growth(vocabulary, count)
        growth.heads({})
        growth.small_files({})

    def _growth(self, vocabulary: Vocabulary, count: int) -> Growth:
        from embedsurgery.stores.resized_shards import Growth

        return Growth(self.checkpoint, self.graph, vocabulary, count)

    def weight_files(self) -> Collection[str]:
        return self.checkpoint.headers.keys()

    def resized_files(self, vocabulary: str) -> Sequence[str]:
        found = next(v for v in self.graph.vocabularies if v.name == vocabulary)
        return tuple(self._growth(found, 1).saved())

    def growth_saved(self, edit: Grow) -> Mapping[str, bytes]:
        return self._growth(self.vocabulary(edit), edit.count).saved()

    def grow(self, edit: Grow) -> None:
        """Make the weight files that hold the vocabulary anew beside the old ones, and rename them over those."""
        from embedsurgery.stores.resized_files import pieces

        vocabulary, directory = self.vocabulary(edit), self.checkpoint.directory
        growth = self._growth(vocabulary, edit.count)
        resized = growth.resized(edit)
        anew = {
            file: (head, pieces(self.checkpoint.headers[file], resized[file]))
            for file, head in growth.heads(edit.saved).items()
        }
        self._files.make(anew, growth.small_files(edit.saved))
        self.checkpoint = open_checkpoint(directory)
        self.config = self.checkpoint.config
        self.graph = grown_graph(self.graph, vocabulary, edit.count)

    def check_untie(self, edit: Untie) -> None:
        super().check_untie(edit)
        self._untying(edit).refuse()

    def untie_footprint(self, edit: Untie) -> Footprint:
        untying = self._untying(edit)
        saved = tuple(untying.saved())
        if not untying.in_place:
            return Footprint(replaced=saved)
        return Footprint({untying.file: self._tensor_ranges(edit.head, edit.indices)}, saved)

    def _untying(self, edit: Untie) -> Untying:
        from embedsurgery.stores.untied_shards import Untying

        return Untying(self.checkpoint, self.graph.table(edit.table), edit)

    def untie_saved(self, edit: Untie) -> Mapping[str, bytes]:
        return self._untying(edit).saved()

    def untie(self, edit: Untie) -> None:
        untying = self._untying(edit)
        small = untying.small_files()
        if untying.in_place:
            before = self.read_rows(edit.head, edit.indices)
            try:
                self.write_rows(edit.head, edit.indices, edit.rows.to(before.dtype))
                self._files.make({}, small)
            except BaseException:
                self.write_rows(edit.head, edit.indices, before)
                raise
        else:
            self._files.make({untying.file: (untying.head(), untying.pieces())}, small)
        self._see(open_checkpoint(self.checkpoint.directory))

    def expand_suppression(self, edit: Suppress) -> tuple[Edit, ...]:
        """Patches of the generation config."""
        from embedsurgery.stores.generation_config import suppression

        return suppression(self.checkpoint, edit)

    def expand_tokens(self, edit: AddTokens) -> tuple[Edit, ...]:
        """Patches of the tokenizer's files."""
        from embedsurgery.tokenizer.patching import token_patches

        return token_patches(self.checkpoint.directory, edit.tokens, edit.remove, edit.prefix)

    @property
    def _files(self) -> ShardFiles:
        return ShardFiles(self.directory, self.work)

    def read_file(self, path: str) -> bytes | None:
        return self._files.read(path)

    def patch_file(self, edit: PatchFile) -> None:
        self._files.patch(edit)

    def sync(self) -> None:
        for file in sorted(self._written):
            with open_regular(self.checkpoint.directory / file) as descriptor:
                os.fsync(descriptor)
        self._written.clear()


def _row_ranges(entry: Entry, pitch: int, indices: Sequence[int]) -> list[Range]:
    """Where rows of ``pitch`` bytes lie in a file."""
    return [(entry.begin + i * pitch, entry.begin + (i + 1) * pitch) for i in indices]


def _line(
    file: int, entry: Entry, d: int, start: int = 0, stop: int | None = None
) -> np.ndarray[tuple[int], np.dtype[np.generic]]:
    """The d-th value of every row of a transposed table, or of rows ``start:stop``: they lie in one line."""
    size, rows = ITEMSIZE[entry.dtype], entry.shape[1]
    stop = rows if stop is None else stop
    data = pread_exactly(file, (stop - start) * size, entry.begin + (d * rows + start) * size)
    return RawArray(entry.dtype, (stop - start,), data).bits

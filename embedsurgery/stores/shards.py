"""The store over the safetensors files of a checkpoint. Rows are read and written in place.

The store writes into the directory it is opened on. Callers open it on a staged copy, or write a journal first.
``shard_rows.py`` accesses rows in a file, ``shard_files.py`` replaces whole files, and ``resized_shards.py`` and
``untied_shards.py`` compute what the new files contain.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from embedsurgery.files.regular import open_regular, pread_exactly, pwrite_exactly
from embedsurgery.files.safetensors import read_tensor
from embedsurgery.graph import EmbeddingGraph, Table, Vocabulary
from embedsurgery.graph.architectures import ARCHITECTURES, Layout
from embedsurgery.graph.from_names import walk_names
from embedsurgery.graph.vocabularies import resize_graph
from embedsurgery.plan import AddTokens, Edit, Grow, PatchFile, Suppress, Untie
from embedsurgery.plan.blocks import spans
from embedsurgery.plan.edit import Footprint, Range
from embedsurgery.stores.checkpoint import Checkpoint, open_checkpoint
from embedsurgery.stores.shard_files import ShardFiles, refuse_hard_links
from embedsurgery.stores.shard_rows import TensorRows, row_ranges
from embedsurgery.stores.store import Store
from embedsurgery.tensors.raw import ITEMSIZE, RawArray

# Modules for growing, untying, generation configs and tokenizers are imported where they are used: most merges only
# write rows, and must start fast (tests/test_import.py).
if TYPE_CHECKING:
    from embedsurgery.stores.resized_shards import ShardResize
    from embedsurgery.stores.untied_shards import ShardUntie


class ShardStore(Store):
    """A checkpoint directory.

    Its graph compares bytes where the headers leave a question open: the config claims a tie, and both ends of it are
    stored. Loaders tie such tensors if they are equal and keep them apart if they differ, so the store does the same.

    Args:
        checkpoint: The headers of the checkpoint.
        work: Directory on the same file system for files that are being prepared, if the caller can restore everything
            from a journal. By default new files are prepared beside the old ones, and a failure changes none.
        architectures: Name of an architecture -> its tied names on disk.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        work: Path | None = None,
        *,
        architectures: Mapping[str, Layout] = ARCHITECTURES,
    ) -> None:
        self.work = work
        # A staged copy may share unchanged files with the original checkpoint by hard links, and writing rows into one
        # would change both. In place, the other link may be one that the journal made.
        self.refuse_links = work is None
        self.name = str(checkpoint.directory)
        self._architectures = architectures
        self._written: set[str] = set()
        self._use_checkpoint(checkpoint)

    def _use_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Replace the headers, and drop the graphs that were made from the old ones."""
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        for name in ("graph", "claimed_graph"):
            vars(self).pop(name, None)

    @property
    def directory(self) -> Path:  # type: ignore[override]  # a property, because it follows the checkpoint
        return self.checkpoint.directory

    @cached_property
    def graph(self) -> EmbeddingGraph:  # type: ignore[override]  # mypy considers it read-only
        return walk_names(
            self.checkpoint.stored_tensors(),
            config=self.config,
            source=self.name,
            equal=self.equal,
            architectures=self._architectures,
        )

    @cached_property
    def claimed_graph(self) -> EmbeddingGraph:
        return walk_names(
            self.checkpoint.stored_tensors(), config=self.config, source=self.name, architectures=self._architectures
        )

    @property
    def _transposed(self) -> frozenset[str]:
        return frozenset(n for table in self.graph.tables for n in table.transposed)

    @classmethod
    def open(
        cls, directory: Path, work: Path | None = None, *, architectures: Mapping[str, Layout] = ARCHITECTURES
    ) -> ShardStore:
        """Open a directory without checking for an unfinished change in place; see `Registry.open_store`.

        Args:
            directory: The checkpoint.
            work: As for the class.
            architectures: As for the class.

        Raises:
            CheckpointError: Files are missing or broken.
        """
        return cls(open_checkpoint(directory), work, architectures=architectures)

    def with_work_directory(self, work: Path) -> ShardStore:
        """Return a store over the same unchanged checkpoint that prepares new files in ``work``."""
        other = copy(self)
        other.work, other.refuse_links, other._written = work, False, set()
        return other

    def reopen(self, *, headers: bool = True) -> ShardStore:
        """Return a new store over the checkpoint, which compares tied tensors again.

        Args:
            headers: Whether to read the headers again. Not needed if only rows were written.
        """
        checkpoint = open_checkpoint(self.checkpoint.directory) if headers else self.checkpoint
        return ShardStore(checkpoint, self.work, architectures=self._architectures)

    def copies(self, table: Table) -> tuple[str, ...]:
        return tuple(name for name, _ in table.files)

    def is_transposed(self, name: str) -> bool:
        """Whether a table is stored as (D, V), so that each row is spread over the whole tensor."""
        return name in self._transposed

    def tensor_names(self) -> Collection[str]:
        return self.checkpoint.location.keys()

    def equal(self, a: str, b: str) -> bool:
        """Whether two tensors have the same bytes. Stops at the first block that differs."""
        left, right = self.checkpoint.entry(a), self.checkpoint.entry(b)
        if (left.dtype, left.shape) != (right.dtype, right.shape):
            return False
        with self._open_file(a) as one, self._open_file(b) as two:
            for start, stop in spans(left.end - left.begin, 1):
                size = stop - start
                if pread_exactly(one, size, left.begin + start) != pread_exactly(two, size, right.begin + start):
                    return False
        return True

    @contextmanager
    def _open_file(self, name: str, flags: int = os.O_RDONLY) -> Iterator[int]:
        """Open the file that holds a tensor."""
        if flags != os.O_RDONLY:
            self._written.add(self.checkpoint.location[name])
        with open_regular(self.checkpoint.path(name), flags) as descriptor:
            # Checked here as well as in `check_writable`, for callers that write without a plan.
            if flags != os.O_RDONLY and self.refuse_links:
                refuse_hard_links(self.checkpoint.path(name), os.fstat(descriptor).st_nlink)
            yield descriptor

    @contextmanager
    def _open_rows(self, name: str, flags: int = os.O_RDONLY) -> Iterator[TensorRows]:
        with self._open_file(name, flags) as file:
            yield TensorRows(file, self.checkpoint.entry(name), self.is_transposed(name))

    def check_writable(self, table: Table) -> None:
        """Refuse a table in a file with other hard links, which would change too."""
        for _, file in table.files if self.refuse_links else ():
            path = self.checkpoint.directory / file
            refuse_hard_links(path, path.stat().st_nlink)

    def tensor_shapes(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        entries = map(self.checkpoint.entry, self.checkpoint.location)
        return {entry.name: (entry.dtype, entry.shape) for entry in entries}

    # -- rows and vectors ---------------------------------------------------------------------------------------------

    def read_rows(self, name: str, indices: tuple[int, ...]) -> RawArray:
        with self._open_rows(name) as rows:
            return rows.read(indices)

    def write_rows(self, name: str, indices: tuple[int, ...], rows: RawArray) -> None:
        with self._open_rows(name, os.O_RDWR) as stored:
            stored.write(indices, rows)

    def read_block(self, name: str, start: int, stop: int) -> RawArray:
        with self._open_rows(name) as rows:
            return rows.read_block(start, stop)

    def write_block(self, name: str, start: int, rows: RawArray) -> None:
        with self._open_rows(name, os.O_RDWR) as stored:
            stored.write_block(start, rows)

    def read_vector(self, name: str) -> RawArray:
        with self._open_file(name) as file:
            raw = read_tensor(file, self.checkpoint.entry(name))
        return RawArray(raw.dtype, (raw.shape[-1],), raw.data)

    def vector_copies(self, name: str) -> list[str]:
        """Return the names under which a per-token vector is stored."""
        vocabulary = next(v for v in self.graph.vocabularies if name in v.vectors)
        return [stored for stored, of, _ in self._resize(vocabulary, 1).stored_tensors() if of == name]

    def write_entries(self, name: str, indices: tuple[int, ...], entries: RawArray) -> None:
        for stored in self.vector_copies(name):
            entry = self.checkpoint.entry(stored)
            values, size = entries.to(entry.dtype).data, ITEMSIZE[entry.dtype]
            with self._open_file(stored, os.O_RDWR) as file:
                for number, index in enumerate(indices):
                    pwrite_exactly(file, values[number * size : (number + 1) * size], entry.begin + index * size)

    def check_vector(self, name: str) -> None:
        for file in self.entry_ranges(name, ()) if self.refuse_links else ():
            path = self.checkpoint.directory / file
            refuse_hard_links(path, path.stat().st_nlink)

    def row_ranges(self, table: str, indices: Sequence[int] | None) -> Mapping[str, Sequence[Range]]:
        found = self.graph.find(table)
        ranges: dict[str, list[Range]] = {}
        for name, file in found.files if found is not None else ():
            ranges.setdefault(file, []).extend(self._tensor_ranges(name, indices))
        return ranges

    def _tensor_ranges(self, name: str, indices: Sequence[int] | None) -> list[Range]:
        """Return the byte ranges of rows of a tensor: all of it for None, and if it is stored transposed."""
        entry = self.checkpoint.entry(name)
        if indices is None or self.is_transposed(name):
            return [(entry.begin, entry.end)]
        return row_ranges(entry, entry.shape[1] * ITEMSIZE[entry.dtype], indices)

    def entry_ranges(self, vector: str, indices: Sequence[int]) -> Mapping[str, Sequence[Range]]:
        ranges: dict[str, list[Range]] = {}
        for name in self.vector_copies(vector):
            entry = self.checkpoint.entry(name)
            found = row_ranges(entry, ITEMSIZE[entry.dtype], indices)
            ranges.setdefault(self.checkpoint.location[name], []).extend(found)
        return ranges

    # -- growing and untying ------------------------------------------------------------------------------------------

    def check_growth(self, vocabulary: Vocabulary, count: int) -> None:
        super().check_growth(vocabulary, count)
        # Computing the new headers and small files finds out whether they can be patched.
        resize = self._resize(vocabulary, count)
        resize.new_headers({})
        resize.new_small_files({})

    def _resize(self, vocabulary: Vocabulary, count: int) -> ShardResize:
        from embedsurgery.stores.resized_shards import ShardResize

        return ShardResize(self.checkpoint, self.graph, vocabulary, count)

    def weight_files(self) -> Collection[str]:
        return self.checkpoint.headers.keys()

    def resized_files(self, vocabulary: str) -> Sequence[str]:
        found = next(v for v in self.graph.vocabularies if v.name == vocabulary)
        return tuple(self._resize(found, 1).current_bytes())

    def growth_state(self, edit: Grow) -> Mapping[str, bytes]:
        return self._resize(self.vocabulary(edit), edit.count).current_bytes()

    def grow(self, edit: Grow) -> None:
        """Write the weight files with the vocabulary again, and replace the old ones."""
        from embedsurgery.stores.resized_files import file_pieces

        vocabulary, directory = self.vocabulary(edit), self.checkpoint.directory
        resize = self._resize(vocabulary, edit.count)
        resized = resize.tensor_resizes(edit)
        weights = {
            file: (header, file_pieces(self.checkpoint.headers[file], resized[file]))
            for file, header in resize.new_headers(edit.saved).items()
        }
        self._files.replace(weights, resize.new_small_files(edit.saved))
        graph = resize_graph(self.graph, vocabulary, edit.count)  # names and ties are as before: no table is compared
        self._use_checkpoint(open_checkpoint(directory))
        self.graph = graph

    def check_untie(self, edit: Untie) -> None:
        super().check_untie(edit)
        self._untie(edit).check()

    def untie_footprint(self, edit: Untie) -> Footprint:
        untie = self._untie(edit)
        replaced = tuple(untie.current_bytes())
        if not untie.in_place:
            return Footprint(replaced=replaced)
        return Footprint({untie.weight_file: self._tensor_ranges(edit.head, edit.indices)}, replaced)

    def _untie(self, edit: Untie) -> ShardUntie:
        from embedsurgery.stores.untied_shards import ShardUntie

        return ShardUntie(self.checkpoint, self.graph.table(edit.table), edit)

    def untie_state(self, edit: Untie) -> Mapping[str, bytes]:
        return self._untie(edit).current_bytes()

    def untie(self, edit: Untie) -> None:
        untie = self._untie(edit)
        small = untie.new_small_files()
        if untie.in_place:
            before = self.read_rows(edit.head, edit.indices)
            try:
                self.write_rows(edit.head, edit.indices, edit.rows.to(before.dtype))
                self._files.replace({}, small)
            except BaseException:
                self.write_rows(edit.head, edit.indices, before)
                raise
        else:
            self._files.replace({untie.weight_file: (untie.new_header(), untie.new_pieces())}, small)
        self._use_checkpoint(open_checkpoint(self.checkpoint.directory))

    # -- small files --------------------------------------------------------------------------------------------------

    def expand_suppression(self, edit: Suppress) -> tuple[Edit, ...]:
        """Return patches of the generation config."""
        from embedsurgery.stores.generation_config import suppression_patches

        return suppression_patches(self.checkpoint, edit)

    def expand_tokens(self, edit: AddTokens) -> tuple[Edit, ...]:
        """Return patches of the tokenizer's files."""
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

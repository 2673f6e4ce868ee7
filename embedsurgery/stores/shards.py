"""Tables in the safetensors files of a checkpoint: rows are read and written where they lie.

Writes go straight into the files of the directory that it is opened on, so the caller opens it on a staged copy.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from embedsurgery.checkpoint import Checkpoint, open_checkpoint
from embedsurgery.errors import CheckpointError
from embedsurgery.graph import Table
from embedsurgery.jsonfile import read_small
from embedsurgery.names import walk_names
from embedsurgery.plan import PatchFile, spans
from embedsurgery.raw import ITEMSIZE, RawArray
from embedsurgery.safetensors_file import Entry, open_regular, pread_exactly, pwrite_exactly
from embedsurgery.stores.base import Store


class ShardStore(Store):
    """A checkpoint directory.

    Args:
        checkpoint: Its headers.

    The graph is the walk's, with one question settled that headers leave open: whether a tie that the config claims,
    and whose two ends are both stored, holds. Loaders tie equal tensors and part different ones, so their bytes decide.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.name = str(checkpoint.directory)
        self.graph = walk_names(checkpoint.stored(), config=checkpoint.config, source=self.name, equal=self.equal)
        self._transposed = frozenset(n for table in self.graph.tables for n in table.transposed)

    @classmethod
    def open(cls, directory: Path) -> ShardStore:
        """A store over a directory.

        Raises:
            CheckpointError: Its files are missing or broken.
        """
        return cls(open_checkpoint(directory))

    def copies(self, table: Table) -> tuple[str, ...]:
        return tuple(name for name, _ in table.files)

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
        with open_regular(self.checkpoint.path(name), flags) as descriptor:
            yield descriptor

    def read_rows(self, name: str, indices: tuple[int, ...]) -> RawArray:
        entry = self.checkpoint.entry(name)
        if name in self._transposed:
            columns = _columns(entry)
            with self._file(name) as file:
                lines = (_line(file, entry, d)[np.asarray(indices)] for d in range(entry.shape[0]))
                rows = np.ascontiguousarray(np.stack(list(lines), axis=1))
            return RawArray(entry.dtype, (len(indices), columns), rows.tobytes())
        pitch = entry.shape[1] * ITEMSIZE[entry.dtype]
        with self._file(name) as file:
            data = b"".join(pread_exactly(file, pitch, entry.begin + index * pitch) for index in indices)
        return RawArray(entry.dtype, (len(indices), entry.shape[1]), data)

    def write_rows(self, name: str, indices: tuple[int, ...], rows: RawArray) -> None:
        entry = self.checkpoint.entry(name)
        size = ITEMSIZE[entry.dtype]
        with self._file(name, os.O_RDWR) as file:
            if name in self._transposed:
                for d in range(entry.shape[0]):
                    line = _line(file, entry, d).copy()
                    line[np.asarray(indices)] = rows.bits[:, d]
                    pwrite_exactly(file, line.tobytes(), entry.begin + d * entry.shape[1] * size)
                return
            pitch = entry.shape[1] * size
            for position, index in enumerate(indices):
                pwrite_exactly(file, rows.data[position * pitch : (position + 1) * pitch], entry.begin + index * pitch)

    def read_block(self, name: str, start: int, stop: int) -> RawArray:
        entry = self.checkpoint.entry(name)
        if name in self._transposed:
            return self.read_rows(name, tuple(range(start, stop)))
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

    def read_file(self, path: str) -> bytes | None:
        """The bytes of a file beside the weights, None where there is none.

        Raises:
            CheckpointError: The path leads out of the directory.
        """
        file = self._inside(path)
        return read_small(file) if file.exists() else None

    def patch_file(self, edit: PatchFile) -> None:
        """Write the file beside its place and rename it, so that it is never half written."""
        file = self._inside(edit.path)
        if edit.after is None:
            file.unlink(missing_ok=True)
            return
        staged = file.with_name(f".{file.name}.{os.getpid()}")
        with open(staged, "xb") as out:
            out.write(edit.after)
            out.flush()
            os.fsync(out.fileno())
        if file.exists():
            os.chmod(staged, file.stat().st_mode & 0o7777)
        os.replace(staged, file)

    def _inside(self, path: str) -> Path:
        parts = path.split("/")
        if not all(part and part not in (".", "..") and "\0" not in part and "\\" not in part for part in parts):
            raise CheckpointError("a path that leads out of the checkpoint", where=self.name, found=repr(path))
        file = self.checkpoint.directory.joinpath(*parts)
        if self.checkpoint.directory.resolve() not in file.resolve().parents:
            raise CheckpointError("a link that leads out of the checkpoint", where=self.name, found=repr(path))
        if not file.parent.is_dir():
            raise CheckpointError("no such directory in the checkpoint", where=self.name, found=repr(path))
        return file

    def sync(self) -> None:
        for file in dict.fromkeys(f for table in self.graph.tables for _, f in table.files):
            with open_regular(self.checkpoint.directory / file) as descriptor:
                os.fsync(descriptor)


def _columns(entry: Entry) -> int:
    return entry.shape[0]


def _line(file: int, entry: Entry, d: int) -> np.ndarray[tuple[int], np.dtype[np.generic]]:
    """One stored line of a transposed table: the d-th value of every row."""
    pitch = entry.shape[1] * ITEMSIZE[entry.dtype]
    raw = RawArray(entry.dtype, (entry.shape[1],), pread_exactly(file, pitch, entry.begin + d * pitch))
    return raw.bits

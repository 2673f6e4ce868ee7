"""A model on the Hub as a store: each row comes by a range request, so that reading a few rows costs kilobytes.

Reads go through a sparse copy of the model's files (see ``as_directory.py``): bytes are fetched into the holes before
they are read. A merge downloads whole files instead, checked by hash.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType

from huggingface_hub import constants

from embedsurgery.files.regular import open_regular, pread_exactly, pwrite_exactly
from embedsurgery.hub.as_directory import (
    ScratchDirectory,
    is_companion_file,
    link_model,
    select_files,
    write_sparse_model,
)
from embedsurgery.hub.client import Client, RemoteFile, Snapshot, wrong_range_size
from embedsurgery.hub.headers import read_remote_checkpoint
from embedsurgery.hub.ids import HubId
from embedsurgery.plan.blocks import spans
from embedsurgery.plugins.current import registry
from embedsurgery.stores.checkpoint import Checkpoint, open_checkpoint
from embedsurgery.stores.shards import ShardStore
from embedsurgery.tensors.raw import ITEMSIZE, RawArray

ReadRange = Callable[[str, int, int], tuple[bytes, int]]
"""Called with a file's name, a start and a size; returns up to that many bytes, and the file's size."""

_Range = tuple[int, int]
"""Bytes of a tensor or of a file, from start to stop."""

_WORKERS = 8
_GAP = 32_768
"""In bytes. Ranges with a smaller gap between them are fetched by one request, gap included."""


def open_remote(hub_id: HubId) -> RangeStore:
    """Open a model on the Hub for reading: headers and config now, small files and rows when they are needed.

    Offline, it opens what the Hub cache has of the model.

    Raises:
        HubError: The Hub does not give the model.
        CheckpointError: The repository has no safetensors weights, or broken ones.
    """
    client = Client()
    snapshot = client.resolve(hub_id)
    if constants.is_offline_mode():
        scratch = ScratchDirectory(snapshot)
        link_model(client, snapshot, scratch.folder)
        return RangeStore(open_checkpoint(scratch.folder), snapshot, scratch)
    files = client.list_files(snapshot, everything=True)
    checkpoint = read_remote_checkpoint(client, snapshot, files)
    make_scratch = partial(_make_scratch, client, snapshot, files, checkpoint)
    return RangeStore(checkpoint, snapshot, make_scratch, partial(client.read_range, snapshot))


def _make_scratch(
    client: Client, snapshot: Snapshot, files: Mapping[str, RemoteFile], checkpoint: Checkpoint
) -> ScratchDirectory:
    """Make a directory of sparse weight files and of the small files that reading needs."""
    scratch = ScratchDirectory(snapshot)
    names = [n for n in select_files(files, checkpoint.headers) if n in checkpoint.headers or is_companion_file(n)]
    write_sparse_model(client, snapshot, files, checkpoint, names, scratch.folder)
    return scratch


class RangeStore(ShardStore):
    """A model on the Hub, to read from.

    Args:
        checkpoint: Its headers.
        snapshot: The model, at one commit.
        scratch: Its directory, or a function that makes it when it is first needed.
        read_range: Fetches bytes of a file; None if the directory has whole files.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        snapshot: Snapshot,
        scratch: ScratchDirectory | Callable[[], ScratchDirectory],
        read_range: ReadRange | None = None,
    ) -> None:
        super().__init__(checkpoint, architectures=registry().architectures)
        self.name = str(snapshot)
        self._scratch = scratch
        self._read_range = read_range
        self._filled: set[tuple[str, _Range]] = set()

    @property
    def directory(self) -> Path:  # type: ignore[override]  # as in ShardStore
        if not isinstance(self._scratch, ScratchDirectory):
            self._scratch = self._scratch()
            self.checkpoint = replace(self.checkpoint, directory=self._scratch.folder)
        return self._scratch.folder

    def close(self) -> None:
        """Delete the directory."""
        if isinstance(self._scratch, ScratchDirectory):
            self._scratch.remove()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(self._scratch, ScratchDirectory):
            self._scratch.relabel_error(error)
        self.close()

    def equal(self, a: str, b: str) -> bool:
        left, right = self.checkpoint.entry(a), self.checkpoint.entry(b)
        if (left.dtype, left.shape) != (right.dtype, right.shape):
            return False
        return all(self._read(a, span) == self._read(b, span) for span in spans(left.end - left.begin, 1))

    def read_rows(self, name: str, indices: tuple[int, ...]) -> RawArray:
        if name in self._transposed:  # a row is a column of the stored tensor, spread over all of it
            self._fill_all(name)
        else:
            pitch = self._pitch(name)
            self._fill(name, ((index * pitch, (index + 1) * pitch) for index in indices))
        return super().read_rows(name, indices)

    def read_block(self, name: str, start: int, stop: int) -> RawArray:
        if name in self._transposed:
            self._fill_all(name)
        else:
            self._fill(name, [(start * self._pitch(name), stop * self._pitch(name))])
        return super().read_block(name, start, stop)

    def read_vector(self, name: str) -> RawArray:
        self._fill_all(name)
        return super().read_vector(name)

    def _pitch(self, name: str) -> int:
        """Bytes of one row."""
        entry = self.checkpoint.entry(name)
        return entry.shape[1] * ITEMSIZE[entry.dtype]

    def _read(self, name: str, span: _Range) -> bytes:
        self._fill(name, [span])
        with open_regular(self.directory / self.checkpoint.location[name]) as descriptor:
            return pread_exactly(descriptor, span[1] - span[0], self.checkpoint.entry(name).begin + span[0])

    def _fill_all(self, name: str) -> None:
        entry = self.checkpoint.entry(name)
        for span in spans(entry.end - entry.begin, 1):
            self._fill(name, [span])

    def _fill(self, name: str, ranges: Iterable[_Range]) -> None:
        """Fetch bytes of a tensor that the sparse file lacks, `_WORKERS` requests at a time."""
        folder, read_range = self.directory, self._read_range
        if read_range is None:
            return
        file, begin = self.checkpoint.location[name], self.checkpoint.entry(name).begin
        in_file = ((begin + start, begin + stop) for start, stop in ranges)
        missing = _join_ranges(span for span in in_file if (file, span) not in self._filled)

        def fetch(span: _Range) -> bytes:
            start, stop = span
            data, _ = read_range(file, start, stop - start)
            if len(data) != stop - start:
                raise wrong_range_size(f"{self.name}/{file}", stop - start, len(data))
            return data

        with open_regular(folder / file, os.O_WRONLY) as descriptor, ThreadPoolExecutor(_WORKERS) as pool:
            for (span, parts), data in zip(missing, pool.map(fetch, [span for span, _ in missing]), strict=True):
                pwrite_exactly(descriptor, data, span[0])
                self._filled.update((file, part) for part in parts)


def _join_ranges(ranges: Iterable[_Range]) -> list[tuple[_Range, list[_Range]]]:
    """Join ranges that are near each other. Returns the joined ranges in order, each with its parts."""
    joined: list[tuple[_Range, list[_Range]]] = []
    for span in sorted(set(ranges)):
        if joined and span[0] - joined[-1][0][1] <= _GAP:
            (start, stop), parts = joined[-1]
            joined[-1] = ((start, max(stop, span[1])), [*parts, span])
        else:
            joined.append((span, [span]))
    return joined

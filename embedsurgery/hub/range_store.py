"""A model on the Hub to read rows of: each row comes by a range request, so a look at a model costs kilobytes.

Nothing that comes this way is written anywhere but over its own hole: a merge takes whole files, checked by hash.
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

from embedsurgery.errors import HubError
from embedsurgery.files.regular import open_regular, pread_exactly, pwrite_exactly
from embedsurgery.hub.as_directory import Scratch, comes_along, fill, link_whole, wanted
from embedsurgery.hub.client import Client, RemoteFile, Snapshot
from embedsurgery.hub.headers import remote_checkpoint
from embedsurgery.hub.ids import HubId
from embedsurgery.plan.blocks import spans
from embedsurgery.plugins.current import registry
from embedsurgery.stores.checkpoint import Checkpoint, open_checkpoint
from embedsurgery.stores.shards import ShardStore
from embedsurgery.tensors.raw import ITEMSIZE, RawArray

Piece = Callable[[str, int, int], tuple[bytes, int]]
"""Called with a file's name, a start and a size; gives up to so many bytes, and the file's size."""

_Place = tuple[int, int]
"""Bytes of a tensor or of a file, from start to stop."""

_WORKERS = 8
_GAP = 32_768
"""Bytes between two rows that are asked for at once with what lies between them."""


def open_remote(of: HubId) -> RangeStore:
    """A model on the Hub to read from: headers and config come now, small files and rows when they are asked for.

    Offline it is what the Hub cache has of it.

    Raises:
        HubError: It cannot be had.
        CheckpointError: It has no safetensors weights, or broken ones.
    """
    client = Client()
    at = client.resolve(of)
    if constants.is_offline_mode():
        made = Scratch(at)
        link_whole(client, at, made.folder)
        return RangeStore(open_checkpoint(made.folder), at, made)
    files = client.files(at, everything=True)
    checkpoint = remote_checkpoint(client, at, files)
    return RangeStore(checkpoint, at, partial(_fetch, client, at, files, checkpoint), partial(client.piece, at))


def _fetch(client: Client, at: Snapshot, files: Mapping[str, RemoteFile], checkpoint: Checkpoint) -> Scratch:
    """A directory with the small files that reading needs, and headers and holes for weight files."""
    made = Scratch(at)
    names = [n for n in wanted(files, checkpoint.headers) if n in checkpoint.headers or comes_along(n)]
    fill(client, at, files, checkpoint, names, made.folder)
    return made


class RangeStore(ShardStore):
    """A model on the Hub. Its directory is made when it is first needed: there weight files are headers and holes, and
    what is read fills its hole first.

    Args:
        checkpoint: Its headers.
        at: Which model, at which commit.
        scratch: Its directory, or a function that makes it.
        piece: Gets bytes of a file; None where the directory has whole files.
    """

    def __init__(
        self, checkpoint: Checkpoint, at: Snapshot, scratch: Scratch | Callable[[], Scratch], piece: Piece | None = None
    ) -> None:
        super().__init__(checkpoint, architectures=registry().architectures)
        self.name = str(at)
        self._scratch = scratch
        self._piece = piece
        self._filled: set[tuple[str, _Place]] = set()

    @property
    def directory(self) -> Path:  # type: ignore[override]  # as in ShardStore
        if not isinstance(self._scratch, Scratch):
            self._scratch = self._scratch()
            self.checkpoint = replace(self.checkpoint, directory=self._scratch.folder)
        return self._scratch.folder

    def close(self) -> None:
        """Remove the directory."""
        if isinstance(self._scratch, Scratch):
            self._scratch.remove()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(self._scratch, Scratch):
            self._scratch.rename(error)
        self.close()

    def equal(self, a: str, b: str) -> bool:
        left, right = self.checkpoint.entry(a), self.checkpoint.entry(b)
        if (left.dtype, left.shape) != (right.dtype, right.shape):
            return False
        return all(self._read(a, place) == self._read(b, place) for place in spans(left.end - left.begin, 1))

    def read_rows(self, name: str, indices: tuple[int, ...]) -> RawArray:
        if name in self._transposed:
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
        entry = self.checkpoint.entry(name)
        return entry.shape[1] * ITEMSIZE[entry.dtype]

    def _read(self, name: str, place: _Place) -> bytes:
        self._fill(name, [place])
        with open_regular(self.directory / self.checkpoint.location[name]) as descriptor:
            return pread_exactly(descriptor, place[1] - place[0], self.checkpoint.entry(name).begin + place[0])

    def _fill_all(self, name: str) -> None:
        entry = self.checkpoint.entry(name)
        for place in spans(entry.end - entry.begin, 1):
            self._fill(name, [place])

    def _fill(self, name: str, places: Iterable[_Place]) -> None:
        """Get bytes of a tensor that are not there yet, some pieces at a time."""
        folder, piece = self.directory, self._piece
        if piece is None:
            return
        file, begin = self.checkpoint.location[name], self.checkpoint.entry(name).begin
        there = ((begin + start, begin + stop) for start, stop in places)
        missing = _joined(place for place in there if (file, place) not in self._filled)

        def get(place: _Place) -> bytes:
            start, stop = place
            data, _ = piece(file, start, stop - start)
            if len(data) != stop - start:
                raise HubError(
                    "a piece of a file has the wrong size",
                    where=f"{self.name}/{file}",
                    expected=stop - start,
                    found=len(data),
                    hint="try again",
                )
            return data

        with open_regular(folder / file, os.O_WRONLY) as descriptor, ThreadPoolExecutor(_WORKERS) as pool:
            for (place, parts), data in zip(missing, pool.map(get, [place for place, _ in missing]), strict=True):
                pwrite_exactly(descriptor, data, place[0])
                self._filled.update((file, part) for part in parts)


def _joined(places: Iterable[_Place]) -> list[tuple[_Place, list[_Place]]]:
    """Places in order, those that lie near each other as one, each with what it is made of."""
    found: list[tuple[_Place, list[_Place]]] = []
    for place in sorted(set(places)):
        if found and place[0] - found[-1][0][1] <= _GAP:
            (start, stop), parts = found[-1]
            found[-1] = ((start, max(stop, place[1])), [*parts, place])
        else:
            found.append((place, [place]))
    return found

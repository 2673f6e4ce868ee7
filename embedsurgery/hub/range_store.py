"""A model on the Hub to read rows of: each row comes by a range request, so a look at a model costs kilobytes.

Nothing that comes this way is written anywhere but over its own hole: a merge takes whole files, checked by hash.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from embedsurgery.errors import HubError
from embedsurgery.files.regular import open_regular, pread_exactly, pwrite_exactly
from embedsurgery.plan.edits import spans
from embedsurgery.plugins.current import registry
from embedsurgery.stores.checkpoint import Checkpoint
from embedsurgery.stores.shards import ShardStore
from embedsurgery.tensors.raw import ITEMSIZE, RawArray

Piece = Callable[[str, int, int], tuple[bytes, int]]
"""Called with a file's name, a start and a size; gives up to so many bytes, and the file's size."""

_Place = tuple[int, int]
"""Bytes of a tensor or of a file, from start to stop."""

_WORKERS = 8
_GAP = 32_768
"""Bytes between two rows that are asked for at once with what lies between them."""


class RangeStore(ShardStore):
    """A directory whose weight files are headers and holes; what is read fills its hole first.

    Args:
        checkpoint: Its headers.
        piece: Gets bytes of a file.
        name: The model's, for messages.
    """

    def __init__(self, checkpoint: Checkpoint, piece: Piece, name: str) -> None:
        self._piece = piece
        self._filled: set[tuple[str, _Place]] = set()
        self.checkpoint = checkpoint  # which the walk that follows reads from
        super().__init__(checkpoint, architectures=registry().architectures)
        self.name = name

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
        with open_regular(self.checkpoint.path(name)) as descriptor:
            return pread_exactly(descriptor, place[1] - place[0], self.checkpoint.entry(name).begin + place[0])

    def _fill_all(self, name: str) -> None:
        entry = self.checkpoint.entry(name)
        for place in spans(entry.end - entry.begin, 1):
            self._fill(name, [place])

    def _fill(self, name: str, places: Iterable[_Place]) -> None:
        """Get bytes of a tensor that are not there yet, some pieces at a time."""
        file, begin = self.checkpoint.location[name], self.checkpoint.entry(name).begin
        there = ((begin + start, begin + stop) for start, stop in places)
        missing = _joined(place for place in there if (file, place) not in self._filled)

        def get(place: _Place) -> bytes:
            start, stop = place
            data, _ = self._piece(file, start, stop - start)
            if len(data) != stop - start:
                raise HubError("a piece of a file has the wrong size", where=f"{self.name}/{file}",
                               expected=stop - start, found=len(data), hint="try again")  # fmt: skip
            return data

        with open_regular(self.checkpoint.path(name), os.O_WRONLY) as descriptor, ThreadPoolExecutor(_WORKERS) as pool:
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

"""A checkpoint of which only the weight files are there that a merge reads or writes: the others are headers and holes.

The store fetches a file when its tensors are first asked for. A hole is never read as weights: it is replaced before,
and a file that changed without having been fetched is an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from embedsurgery.errors import CheckpointError
from embedsurgery.graph import Table
from embedsurgery.plan import Grow, Untie
from embedsurgery.plugins.current import registry
from embedsurgery.stores.checkpoint import Checkpoint, open_checkpoint
from embedsurgery.stores.shards import ShardStore

Fetch = Callable[[str, Path], None]
"""Called with a file's name and where to put it."""

_Mark = tuple[int, int, int]


class PartialStore(ShardStore):
    """A directory whose weight files are fetched on demand.

    Args:
        checkpoint: Its headers.
        fetch: Gets a file.
        present: The names of the files that are there; grows.
        holes: What the others looked like when they were made.
    """

    def __init__(
        self, checkpoint: Checkpoint, fetch: Fetch, present: set[str], holes: dict[str, tuple[int, int, int]]
    ) -> None:
        self._fetch = fetch
        self.present = present
        self._holes = holes
        self.checkpoint = checkpoint  # which the walk that follows reads from
        super().__init__(checkpoint, architectures=registry().architectures)

    @classmethod
    def begin(cls, directory: Path, fetch: Fetch) -> PartialStore:
        """A store over a directory in which every weight file is a header and a hole."""
        checkpoint = open_checkpoint(directory)
        return cls(checkpoint, fetch, set(), {file: _mark(directory / file) for file in checkpoint.headers})

    def again(self, *, headers: bool = True) -> PartialStore:
        self._refuse_changed_holes()
        return PartialStore(open_checkpoint(self.checkpoint.directory), self._fetch, self.present, self._holes)

    def need(self, files: Sequence[str]) -> None:
        """Fetch files that are not there yet."""
        for file in files:
            if file not in self.present:
                self._fetch(file, self.checkpoint.directory / file)
                self.present.add(file)

    def _refuse_changed_holes(self) -> None:
        for file, mark in self._holes.items():
            if file not in self.present and _mark(self.checkpoint.directory / file) != mark:
                raise CheckpointError(
                    "a weight file was changed that was never fetched",
                    where=file,
                    hint="this is a fault of embedsurgery: please report it",
                )

    @contextmanager
    def _file(self, name: str, flags: int = os.O_RDONLY) -> Iterator[int]:
        self.need([self.checkpoint.location[name]])
        with super()._file(name, flags) as descriptor:
            yield descriptor

    def check_writable(self, table: Table) -> None:
        self.need([file for _, file in table.files])
        super().check_writable(table)

    def grow(self, edit: Grow) -> None:
        self.need([file for file in self.resized_files(edit.vocabulary) if file in self.checkpoint.headers])
        super().grow(edit)

    def untie(self, edit: Untie) -> None:
        found = self.untie_footprint(edit)
        self.need([file for file in (*found.ranges, *found.replaced) if file in self.checkpoint.headers])
        super().untie(edit)

    def sync(self) -> None:
        """Nothing: the directory goes away."""


def _mark(path: Path) -> _Mark:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns

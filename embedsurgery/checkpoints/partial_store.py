"""A checkpoint of which only the weight files that a merge reads or writes are fetched; the rest are sparse files.

``hub_merging.py`` uses it for a base on the Hub. A sparse file has the real header followed by a hole of the right
size, so that the graph, the plan and every size check work without the weights. A file is fetched when one of its
tensors is first read or written; the hole itself is never read as weights.
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

_Stamp = tuple[int, int, int]
"""Inode, size and mtime in ns."""


class PartialStore(ShardStore):
    """A directory whose weight files are fetched on demand.

    Args:
        checkpoint: Its headers.
        fetch: Fetches a file.
        present: Names of the files fetched so far; grows.
        sparse: File -> stamp of the sparse file when it was made.
    """

    def __init__(self, checkpoint: Checkpoint, fetch: Fetch, present: set[str], sparse: dict[str, _Stamp]) -> None:
        self._fetch = fetch
        self.present = present
        self._sparse = sparse
        super().__init__(checkpoint, architectures=registry().architectures)

    @classmethod
    def begin(cls, directory: Path, fetch: Fetch) -> PartialStore:
        """Open a directory in which every weight file is sparse."""
        checkpoint = open_checkpoint(directory)
        return cls(checkpoint, fetch, set(), {file: _stamp(directory / file) for file in checkpoint.headers})

    def reopen(self, *, headers: bool = True) -> PartialStore:
        self._refuse_changed_sparse_files()
        return PartialStore(open_checkpoint(self.checkpoint.directory), self._fetch, self.present, self._sparse)

    def fetch_files(self, files: Sequence[str]) -> None:
        """Fetch the files that are not there yet."""
        for file in files:
            if file not in self.present:
                self._fetch(file, self.checkpoint.directory / file)
                self.present.add(file)

    def _refuse_changed_sparse_files(self) -> None:
        """Refuse a sparse file that an edit wrote into: an edit that forgets to fetch would push a hole as weights."""
        for file, stamp in self._sparse.items():
            if file not in self.present and _stamp(self.checkpoint.directory / file) != stamp:
                raise CheckpointError(
                    "a weight file was changed before it was fetched",
                    where=file,
                    hint="this is a bug in embedsurgery: please report it",
                )

    # Reads and in-place writes of tensors go through `_open_file`. Growing and untying copy whole files by their
    # headers, so they fetch them first.

    @contextmanager
    def _open_file(self, name: str, flags: int = os.O_RDONLY) -> Iterator[int]:
        self.fetch_files([self.checkpoint.location[name]])
        with super()._open_file(name, flags) as descriptor:
            yield descriptor

    def check_writable(self, table: Table) -> None:
        self.fetch_files([file for _, file in table.files])
        super().check_writable(table)

    def grow(self, edit: Grow) -> None:
        self.fetch_files([file for file in self.resized_files(edit.vocabulary) if file in self.checkpoint.headers])
        super().grow(edit)

    def untie(self, edit: Untie) -> None:
        found = self.untie_footprint(edit)
        self.fetch_files([file for file in (*found.ranges, *found.replaced) if file in self.checkpoint.headers])
        super().untie(edit)

    def sync(self) -> None:
        """Do nothing: the directory is temporary."""


def _stamp(path: Path) -> _Stamp:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns

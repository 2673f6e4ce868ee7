"""A checkpoint of which only the weight files are there that a merge reads or writes: the others are headers and holes.

The store fetches a file when its tensors are first asked for. A hole is never read as weights: it is replaced before,
and a file that changed without having been fetched is an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from embedsurgery.checkpoints.merging import named_adapter, part_facts
from embedsurgery.checkpoints.records import next_record
from embedsurgery.combining.several import Conflict, plan_parts
from embedsurgery.combining.weighted_adapters import parts
from embedsurgery.errors import CheckpointError, PlanError
from embedsurgery.graph import Table
from embedsurgery.plan import Grow, SetRows, Untie
from embedsurgery.plugins.current import registry
from embedsurgery.stores.apply import apply
from embedsurgery.stores.checkpoint import Checkpoint, open_checkpoint
from embedsurgery.stores.shards import ShardStore
from embedsurgery.tokenizer.patching import known_tokens

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

    def again(self) -> PartialStore:
        """The store as the files are now."""
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
                raise CheckpointError("a weight file was changed that was never fetched", where=file,
                                      hint="this is a fault of embedsurgery: please report it")  # fmt: skip

    @contextmanager
    def _file(self, name: str, flags: int = os.O_RDONLY) -> Iterator[int]:
        self.need([self.checkpoint.location[name]])
        with super()._file(name, flags) as descriptor:
            yield descriptor

    def check_writable(self, table: Table) -> None:
        self.need([file for _, file in table.files])
        super().check_writable(table)

    def grow(self, edit: Grow) -> None:
        self.need([file for file in self.growth_files(self.vocabulary(edit)) if file in self.checkpoint.headers])
        super().grow(edit)

    def untie(self, edit: Untie) -> None:
        self.need(self.untie_files(edit)[0])
        super().untie(edit)

    def sync(self) -> None:
        """Nothing: the directory goes away."""


def _mark(path: Path) -> _Mark:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class Merged:
    """What was done.

    Attributes:
        adapters: Their names.
        edits: A line for each edit.
    """

    adapters: tuple[str, ...]
    edits: tuple[str, ...]


def merged(
    store: PartialStore,
    adapters: Any,
    *,
    bake: Any = None,
    on_conflict: Conflict | None = None,
    allow_nan: bool = False,
) -> Merged:
    """Bake adapters in, in place, with the record of each; the arguments are those of `merge_checkpoint`.

    Raises:
        BaseMismatchError: An adapter was made from another base.
        PlanError: Two adapters set the same rows.
    """
    directory = store.checkpoint.directory
    asked = parts(adapters, named_adapter)
    tokens = cache(partial(known_tokens, directory))
    planned = plan_parts(asked, lambda name: registry().named(name).surgery, store, tokens, options=bake,
                         on_conflict=on_conflict, allow_nan=allow_nan)  # fmt: skip
    for part, plan in planned:
        undo = apply(plan, store, spill=directory.parent)
        before, store = store, store.again()
        parted = {name for edit in undo.edits if isinstance(edit, Untie) for name in (edit.table, edit.head)}
        for table in (e.table for e in undo.edits if isinstance(e, SetRows) and e.table not in parted):
            if before.graph.table(table).files != store.graph.table(table).files:
                raise PlanError("the merge would make two stored tables equal, which then load as one", where=table,
                                hint="set tie_word_embeddings to false in the config first")  # fmt: skip
        record = next_record(directory)
        record.parent.mkdir(parents=True, exist_ok=True)
        replace(undo, facts={**plan.facts, **part_facts(part, undo, store, on_conflict=on_conflict)}).save(record)
    edits = tuple(line for _, plan in planned for line in plan.describe())
    return Merged(tuple(part.name for part, _ in planned), edits)

"""Taking merges out of a checkpoint on disk again, by their records."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

from embedsurgery.checkpoints.jobs import Job
from embedsurgery.checkpoints.report import MergeReport, Progress
from embedsurgery.checkpoints.stack import Entry, chosen, left_behind, stack
from embedsurgery.checkpoints.writing import open_output, write
from embedsurgery.errors import ConfigError
from embedsurgery.plugins.current import registry
from embedsurgery.stores.written import check_written


def unmerge_checkpoint(
    merged: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    all: bool = False,
    adapter: str | None = None,
    in_place: bool = False,
    hardlink: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Write a new checkpoint directory without the last merge, or others: bit for bit what it was merged into.

    Args:
        merged: A directory that `merge_checkpoint` wrote; or a Hub id, ``org/name@revision``.
        output: A directory that does not exist yet. None for a dry run alone, or with ``in_place``.
        all: Take every merge out, the last first: what is left is the original base.
        adapter: Take out the merge of this adapter, wherever it lies, if no later one lies over its rows: its name as
            `list_merges` gives it, the number of the merge, or the beginning of the adapter's hash.
        in_place: Change ``merged`` itself, with a journal: see `merge_checkpoint`.
        hardlink: Share the weight files that do not change with ``merged``.
        dry_run: Check everything and say what would be done.
        progress: Called as files are copied.

    Raises:
        CheckpointError: There is no record of a merge, or none of that adapter.
        PlanError: The merged rows have been changed since, or a later merge lies over them.
        ConfigError: ``all`` and ``adapter`` together.
        OutputExistsError: ``output`` exists.
        UnsupportedError: ``merged`` cannot be changed in place.
    """
    if all and adapter is not None:
        raise ConfigError("all merges and one of them were asked for", found=f"all and {adapter!r}", expected="either")
    with open_output(merged, output, in_place=in_place, hardlink=hardlink, dry_run=dry_run, progress=progress) as place:
        store = registry().open_store(place.source)
        entries = stack(place.source, store.graph)
        going = chosen(entries, place.source, everything=all, adapter=adapter)
        jobs: list[Job] = []
        for one in going:
            job, done = _taken_out(place.source, one, entries), {path for job in jobs for path in job.drops}
            jobs.append(replace(job, drops=tuple(path for path in job.drops if path not in done)))
            entries = [other for other in entries if other is not one]
        return replace(write(jobs, store, place), undo=0)


def _taken_out(directory: Path, one: Entry, entries: list[Entry]) -> Job:
    """The job that takes one merge out, with its record."""
    drops, writes = left_behind(directory, one, entries)
    return Job(one.undo, drops=drops, writes=writes, before=partial(check_written, one.path, one.undo))

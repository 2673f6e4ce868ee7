"""Unmerges: restores what merges into a checkpoint on disk changed, from their records.

``stack.py`` selects the merges and ``writing.py`` applies their undos.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

from embedsurgery.checkpoints.jobs import Job
from embedsurgery.checkpoints.report import MergeReport, Progress
from embedsurgery.checkpoints.stack import StackedMerge, plan_record_removal, read_stack, select_merges
from embedsurgery.checkpoints.writing import open_output, write_jobs
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
    """Write a new checkpoint without the last merge or another one, bit for bit as if it had not been merged.

    Args:
        merged: A directory that `merge_checkpoint` wrote, or a Hub id, ``org/name@revision``.
        output: A new directory. None for a dry run, or with ``in_place``.
        all: Unmerge everything, the last merge first, which restores the original base.
        adapter: Unmerge this adapter, wherever it is in the stack, if no later merge overrides its rows. Give its name
            as `list_merges` returns it, the number of the merge, or the beginning of the adapter's hash.
        in_place: Change ``merged`` itself, with a journal: see `merge_checkpoint`.
        hardlink: Share unchanged weight files with ``merged`` as hard links.
        dry_run: Check everything and return the report, write nothing.
        progress: Called as files are copied.

    Raises:
        CheckpointError: There is no merge record, or none of that adapter.
        PlanError: The merged rows have changed since, or a later merge overrides them.
        ConfigError: ``all`` and ``adapter`` are given together.
        OutputExistsError: ``output`` exists.
        UnsupportedError: ``merged`` cannot be changed in place.
    """
    if all and adapter is not None:
        raise ConfigError("all and adapter exclude each other", found=f"all=True and adapter={adapter!r}")
    with open_output(merged, output, in_place=in_place, hardlink=hardlink, dry_run=dry_run, progress=progress) as out:
        store = registry().open_store(out.source)
        merges = read_stack(out.source, store.graph)
        jobs: list[Job] = []
        for merge in select_merges(merges, out.source, everything=all, adapter=adapter):
            job = _removal_job(out.source, merge, merges)
            removed = {path for earlier in jobs for path in earlier.removes}  # tombstones that an earlier job removes
            jobs.append(replace(job, removes=tuple(path for path in job.removes if path not in removed)))
            merges = [other for other in merges if other is not merge]
        return replace(write_jobs(jobs, store, out), undo=0)


def _removal_job(directory: Path, merge: StackedMerge, merges: list[StackedMerge]) -> Job:
    """The job that undoes one merge and removes its record."""
    removes, writes = plan_record_removal(directory, merge, merges)
    return Job(merge.undo, removes=removes, writes=writes, precheck=partial(check_written, merge.path, merge.undo))

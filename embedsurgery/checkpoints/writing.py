"""Doing jobs to a checkpoint: in a new directory that appears whole, or in place."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from embedsurgery import hub
from embedsurgery.checkpoints.footprint import footprint
from embedsurgery.checkpoints.in_place import changing, refuse_in_place, warn_of_readers
from embedsurgery.checkpoints.jobs import Job, check_jobs, rewritten, weights, whole_plan
from embedsurgery.checkpoints.journal import Journal, clean
from embedsurgery.checkpoints.records import next_record
from embedsurgery.checkpoints.report import MergeReport, Progress, report_of
from embedsurgery.errors import ConfigError, EmbedSurgeryWarning, PlanError, UnsupportedError
from embedsurgery.files.atomic import refuse_existing, refuse_inside, staged_directory, sync_path
from embedsurgery.files.copying import Tree, copy_tree, link_file, read_tree, writable
from embedsurgery.files.locking import DONE, JOURNAL, locked, refuse_unfinished
from embedsurgery.plan import Undo
from embedsurgery.plan.plan import Edits
from embedsurgery.plugins.current import registry
from embedsurgery.stores.apply import apply
from embedsurgery.stores.shards import ShardStore
from embedsurgery.stores.store import Store


@dataclass(frozen=True)
class Output:
    """Where a changed checkpoint goes.

    Attributes:
        source: The checkpoint as it is.
        target: The new directory; None in place, or where a dry run names none.
        in_place: Change ``source`` itself.
        hardlink: Share the weight files that do not change.
        dry_run: Check everything, write nothing.
        progress: Called as files are copied.
    """

    source: Path
    target: Path | None
    in_place: bool
    hardlink: bool
    dry_run: bool
    progress: Progress | None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, nobody else changes the source; in place, nobody of us reads it either.

        Raises:
            BusyError: Somebody does.
        """
        if not os.path.isdir(self.source):
            yield  # which opening it explains
            return
        alone = self.in_place and not self.dry_run
        with locked(self.source, shared=not alone):
            refuse_unfinished(self.source, held=alone)
            yield


@contextmanager
def open_output(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None,
    *,
    in_place: bool,
    hardlink: bool,
    dry_run: bool,
    progress: Progress | None,
) -> Iterator[Output]:
    """Inside, the place that a caller names is held, with the model of an id downloaded.

    Whatever is there already is refused, and before anything is downloaded.

    Raises:
        ConfigError: No place, or two.
        OutputExistsError: The output exists.
        BusyError: Somebody else changes the source, or, in place, reads it.
    """
    target = None if output is None else Path(output)
    if in_place:
        if target is not None or hardlink:
            raise ConfigError("a change in place takes no other place", found="hardlink" if hardlink else output)
        if hub.find_id(model) is not None:
            raise ConfigError(
                "a model on the Hub cannot be changed in place",
                found=model,
                expected="a directory",
                hint="name an output",
            )
    elif target is not None:
        refuse_existing(target)
    elif not dry_run:
        raise ConfigError("no output to write to", expected="a new directory", hint="or in place, or a dry run")
    with hub.directory(model) as source:
        if target is not None:
            refuse_inside(target, source)
        place = Output(source, target, in_place, hardlink, dry_run, progress)
        with place.held():
            yield place


def write(jobs: list[Job], store: Store, place: Output) -> MergeReport:
    """Do jobs to a checkpoint, one after another, each with its record: all of them or none.

    Args:
        jobs: What to do.
        store: The checkpoint as it is.
        place: Where what it becomes goes.
    """
    store.refuse_links = False  # a copy of it is what is written, or `refuse_in_place` looks
    check_jobs(jobs, store)
    if jobs[0].before is not None:
        jobs[0].before(store)
    if place.in_place:
        return _write_in_place(jobs, store, place)
    return _write_anew(jobs, store, place)


def _write_in_place(jobs: list[Job], store: Store, place: Output) -> MergeReport:
    if not isinstance(store, ShardStore):
        raise UnsupportedError(
            "a checkpoint of this format cannot be changed in place",
            where=place.source,
            expected="safetensors",
            hint="write a new directory instead: -o / output",
        )
    whole = whole_plan(jobs)
    first = footprint(jobs[0].plan, store)
    refuse_in_place(place.source, first)
    report = replace(report_of(whole, store, place.source, 0), in_place=True)
    if place.dry_run:
        return report
    if first.ranges:
        warn_of_readers(place.source, list(first.ranges))
    with changing(place.source, whole.describe()) as journal:
        do_jobs(jobs, store.within(journal.folder), journal.folder, journal)
    return replace(report, done=True)


def _write_anew(jobs: list[Job], store: Store, place: Output) -> MergeReport:
    whole, target = whole_plan(jobs), place.target
    tree = read_tree(place.source, {JOURNAL, DONE, *(path for job in jobs for path in job.drops)})
    report = report_of(whole, store, target, tree.size)
    if place.dry_run or target is None:
        return report
    with staged_directory(target) as staging:
        anew = rewritten(whole, store)
        touched = weights(whole, store)
        shared = [file for file in store.weight_files() if file not in touched] if place.hardlink else []
        _copy(place, staging, tree, anew, shared)
        with writable(staging, [file for file in touched if file not in anew]):
            do_jobs(jobs, registry().open_store(staging), staging.parent)
        clean(staging)
    return replace(report, done=True)


def do_jobs(jobs: list[Job], store: Store, spill: Path, journal: Journal | None = None) -> None:
    """Do jobs to a store, one after another, and save the record of each.

    Args:
        jobs: Checked by `check_jobs`.
        store: Opened over a copy, over what is downloaded, or, with a journal, over the checkpoint itself.
        spill: Directory for the saved rows of whole tables.
        journal: What takes a change in place back.
    """
    directory, work = store.directory, None if journal is None else journal.folder
    made: set[str] = set()
    for number, job in enumerate(jobs):
        if number and job.before is not None:
            job.before(store)
        record = next_record(directory).relative_to(directory).as_posix() if job.facts is not None else None
        if journal is not None and isinstance(store, ShardStore):
            touched = footprint(job.plan, store)
            touched.files.update(job.drops, job.writes, () if record is None else (record,))
            refuse_in_place(directory, touched, made)
            journal.protect(touched.ranges, touched.files)
            made |= touched.files
        undo = apply(job.plan, store, spill=spill)
        after = _reopen(job.plan, store, work)
        if record is not None and job.facts is not None:
            _refuse_new_ties(store, after, undo)
            (directory / record).parent.mkdir(parents=True, exist_ok=True)
            replace(undo, facts={**job.plan.facts, **job.facts(undo, after)}).save(directory / record)
        _try_prefix(directory, job.plan)
        for path in job.drops:
            (directory / path).unlink(missing_ok=True)
        for path, data in job.writes.items():
            _write_small(directory / path, data)
        store = after


def _reopen(plan: Edits, store: Store, work: Path | None) -> Store:
    """The store after a plan is done; where that wrote rows and nothing else, headers are not read again."""
    if not isinstance(store, ShardStore):
        return registry().open_store(store.directory, work)
    return store.again(headers=any(edit.rearranges for edit in plan.edits))


def _try_prefix(directory: Path, plan: Edits) -> None:
    """Check that text gets its prefix, if the tokenizers library is installed."""
    prefixes = [prefix for edit in plan.edits if (prefix := edit.new_prefix()) is not None]
    if not prefixes:
        return
    from importlib.util import find_spec

    from embedsurgery.tokenizer.patching import check_prefix

    for prefix in prefixes if find_spec("tokenizers") is not None else ():
        check_prefix(directory, prefix)


def _write_small(path: Path, data: bytes) -> None:
    """Write a small file of ours that is there or not; in place it is protected, in a copy nobody sees it yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # it may have another name, which is to keep what it has
    path.write_bytes(data)
    sync_path(path)


def _copy(place: Output, staging: Path, tree: Tree, anew: list[str], shared: list[str]) -> None:
    """Copy a checkpoint.

    Args:
        place: From where.
        staging: To where.
        tree: What.
        anew: Files that will be made anew; they are linked, which is safe: they are only ever replaced.
        shared: Files that are to stay one with the source's.
    """
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        if place.progress is not None:
            place.progress(done, tree.size)

    copied: list[str] = []

    def put(path: str) -> bool:
        if path not in anew and path not in shared:
            return False
        linked = link_file(place.source / path, staging / path)
        if not linked and path in shared:
            copied.append(path)
        return linked

    copy_tree(place.source, staging, tree, count, place=put)
    if copied:
        warnings.warn(
            f"could not be shared (links, read-only, or another file system), so they were copied: {', '.join(copied)}",
            EmbedSurgeryWarning,
            stacklevel=6,
        )


def _refuse_new_ties(before: Store, after: Store, undo: Undo) -> None:
    """Two tables that differed in the edited rows alone would now load as one, and could not be parted again."""
    parted = {name for edit in undo.edits for name in edit.ends()}
    rows = {name for edit in undo.edits for name, indices in edit.sets().items() if indices is not None}
    for name in sorted(rows - parted):
        old, new = before.graph.find(name), after.graph.find(name)
        if old is not None and new is not None and set(old.files) < set(new.files):
            raise PlanError(
                "the merge would make two stored tables equal, which then load as one",
                where=after.name,
                expected=", ".join(n for n, _ in old.files),
                found=", ".join(n for n, _ in new.files),
                hint="set tie_word_embeddings to false in the config first",
            )

"""Applies jobs to a checkpoint: in a new directory that appears only when it is complete, or in place.

``files/atomic.py`` makes the new directory appear atomically. ``in_place.py`` and ``journal.py`` protect a change in
place.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from embedsurgery import hub
from embedsurgery.checkpoints.footprint import footprint_of
from embedsurgery.checkpoints.in_place import change_in_place, refuse_in_place, warn_mapped_files
from embedsurgery.checkpoints.jobs import Job, changed_weight_files, check_jobs, combine_plans, replaced_weight_files
from embedsurgery.checkpoints.journal import Journal, remove_leftovers
from embedsurgery.checkpoints.records import next_record_path
from embedsurgery.checkpoints.report import MergeReport, Progress, report_of
from embedsurgery.errors import ConfigError, PlanError, UnsupportedError, warn
from embedsurgery.files.atomic import refuse_existing, refuse_inside, staged_directory, sync_path
from embedsurgery.files.copying import Tree, copy_tree, link_file, make_writable, read_tree
from embedsurgery.files.locking import DONE, JOURNAL, lock_directory, refuse_unfinished
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
        source: The checkpoint to change.
        target: The new directory; None in place, or for a dry run without an output.
        in_place: Change ``source`` itself.
        hardlink: Share unchanged weight files.
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
    def lock_source(self) -> Iterator[None]:
        """Lock the source: shared with other readers, or exclusively for a change in place.

        Raises:
            BusyError: Another process of embedsurgery holds a lock that excludes this one.
        """
        if not os.path.isdir(self.source):
            yield  # opening the store raises the error that explains it
            return
        exclusive = self.in_place and not self.dry_run
        with lock_directory(self.source, shared=not exclusive):
            refuse_unfinished(self.source, held=exclusive)
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
    """Check the options of an output, download the model if it is a Hub id, and hold its lock inside the block.

    An existing output is refused before anything is downloaded.

    Raises:
        ConfigError: No output was given, or two.
        OutputExistsError: The output exists.
        BusyError: Another process is changing the source or, in place, reading it.
    """
    target = None if output is None else Path(output)
    if in_place:
        if target is not None or hardlink:
            raise ConfigError("in_place excludes output and hardlink", found="hardlink" if hardlink else output)
        if hub.find_id(model) is not None:
            raise ConfigError(
                "a model on the Hub cannot be changed in place",
                found=model,
                expected="a directory",
                hint="pass an output",
            )
    elif target is not None:
        refuse_existing(target)
    elif not dry_run:
        raise ConfigError("no output given", expected="a new directory", hint="pass output, in_place or dry_run")
    with hub.directory(model) as source:
        if target is not None:
            refuse_inside(target, source)
        out = Output(source, target, in_place, hardlink, dry_run, progress)
        with out.lock_source():
            yield out


def write_jobs(jobs: list[Job], store: Store, out: Output) -> MergeReport:
    """Apply jobs to a checkpoint one by one, each with its record: all of them or none.

    Args:
        jobs: The jobs, in order.
        store: The checkpoint to change.
        out: Where the result goes.
    """
    # The store refuses files with several names, but plans are only checked on it here: rows are written into a copy,
    # or refuse_in_place has looked at each file.
    store.refuse_links = False
    check_jobs(jobs, store)
    if jobs[0].precheck is not None:
        jobs[0].precheck(store)
    if out.in_place:
        return _write_in_place(jobs, store, out)
    return _write_new_directory(jobs, store, out)


def _write_in_place(jobs: list[Job], store: Store, out: Output) -> MergeReport:
    if not isinstance(store, ShardStore):
        raise UnsupportedError(
            "a checkpoint of this format cannot be changed in place",
            where=out.source,
            expected="safetensors",
            hint="write a new directory instead: -o / output",
        )
    whole = combine_plans(jobs)
    first = footprint_of(jobs[0].plan, store)
    refuse_in_place(out.source, first)
    report = replace(report_of(whole, store, out.source, 0), in_place=True)
    if out.dry_run:
        return report
    if first.ranges:
        warn_mapped_files(out.source, list(first.ranges))
    with change_in_place(out.source, whole.describe()) as journal:
        apply_jobs(jobs, store.with_work_directory(journal.folder), journal.folder, journal)
    return replace(report, done=True)


def _write_new_directory(jobs: list[Job], store: Store, out: Output) -> MergeReport:
    whole, target = combine_plans(jobs), out.target
    tree = read_tree(out.source, {JOURNAL, DONE, *(path for job in jobs for path in job.removes)})
    report = report_of(whole, store, target, tree.size)
    if out.dry_run or target is None:
        return report
    with staged_directory(target) as staging:
        replaced = replaced_weight_files(whole, store)
        changed = changed_weight_files(whole, store)
        shared = [file for file in store.weight_files() if file not in changed] if out.hardlink else []
        _copy_checkpoint(out, staging, tree, replaced, shared)
        with make_writable(staging, [file for file in changed if file not in replaced]):
            apply_jobs(jobs, registry().open_store(staging), staging.parent)
        remove_leftovers(staging)  # after an unmerge the record directories may be empty
    return replace(report, done=True)


def apply_jobs(jobs: list[Job], store: Store, spill: Path, journal: Journal | None = None) -> None:
    """Apply jobs to a store one by one, and save the record of each.

    Args:
        jobs: Checked by `check_jobs`.
        store: Over a copy, over a downloaded model or, with a journal, over the checkpoint itself.
        spill: Directory for the saved rows of whole tables.
        journal: The journal of a change in place.
    """
    directory, work = store.directory, None if journal is None else journal.folder
    created: set[str] = set()
    for number, job in enumerate(jobs):
        if number and job.precheck is not None:  # write_jobs has run the first
            job.precheck(store)
        record = next_record_path(directory).relative_to(directory).as_posix() if job.facts is not None else None
        if journal is not None and isinstance(store, ShardStore):
            # Job by job, because a growth moves the bytes that the next job overwrites.
            footprint = footprint_of(job.plan, store)
            footprint.files.update(job.removes, job.writes, () if record is None else (record,))
            refuse_in_place(directory, footprint, created)
            journal.protect(footprint.ranges, footprint.files)
            created |= footprint.files
        undo = apply(job.plan, store, spill=spill)
        after = _reopen(job.plan, store, work)
        if record is not None and job.facts is not None:
            _refuse_new_ties(store, after, undo)
            (directory / record).parent.mkdir(parents=True, exist_ok=True)
            replace(undo, facts={**job.plan.facts, **job.facts(undo, after)}).save(directory / record)
        _check_prefixes(directory, job.plan)
        for path in job.removes:
            (directory / path).unlink(missing_ok=True)
        for path, data in job.writes.items():
            _write_small_file(directory / path, data)
        store = after


def _reopen(plan: Edits, store: Store, work: Path | None) -> Store:
    """The store after a plan was applied; headers are read again only if the plan can have changed them."""
    if not isinstance(store, ShardStore):
        return registry().open_store(store.directory, work)
    return store.reopen(headers=any(edit.rearranges for edit in plan.edits))


def _check_prefixes(directory: Path, plan: Edits) -> None:
    """Check that text is encoded with its new prefix, if the tokenizers library is installed."""
    prefixes = [prefix for edit in plan.edits if (prefix := edit.new_prefix()) is not None]
    if not prefixes:
        return
    # Most merges add no prefix and should not wait for the tokenizer code.
    from importlib.util import find_spec

    from embedsurgery.tokenizer.patching import check_prefix

    for prefix in prefixes if find_spec("tokenizers") is not None else ():
        check_prefix(directory, prefix)


def _write_small_file(path: Path, data: bytes) -> None:
    """Write a small file of ``.embedsurgery/``. In place the journal protects it; a copy is not visible yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # a new inode: the journal keeps the old file under a second name
    path.write_bytes(data)
    sync_path(path)


def _copy_checkpoint(out: Output, staging: Path, tree: Tree, replaced: list[str], shared: list[str]) -> None:
    """Copy a checkpoint.

    Args:
        out: From where.
        staging: To where.
        tree: What to copy.
        replaced: Files that the jobs replace. They are linked, not copied: replacing a name leaves the source alone.
        shared: Files to share with the source.
    """
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        if out.progress is not None:
            out.progress(done, tree.size)

    not_shared: list[str] = []

    def link(path: str) -> bool:
        if path not in replaced and path not in shared:
            return False
        linked = link_file(out.source / path, staging / path)
        if not linked and path in shared:
            not_shared.append(path)
        return linked

    copy_tree(out.source, staging, tree, count, place=link)
    if not_shared:
        warn(f"copied instead of hard-linked (a link, read-only, or on another file system): {', '.join(not_shared)}")


def _refuse_new_ties(before: Store, after: Store, undo: Undo) -> None:
    """Refuse a merge after which two tables are equal.

    The two differed in the edited rows only. Loaders tie equal tables (`ShardStore`), so the result would load as
    another model, and the two could not be told apart for the unmerge.
    """
    untied = {name for edit in undo.edits for name in edit.tie_names()}
    edited = {name for edit in undo.edits for name, indices in edit.sets().items() if indices is not None}
    for name in sorted(edited - untied):
        old, new = before.graph.find(name), after.graph.find(name)
        if old is not None and new is not None and set(old.files) < set(new.files):
            raise PlanError(
                "the merge would make two stored tables equal, and loaders would tie them",
                where=after.name,
                expected=", ".join(n for n, _ in old.files),
                found=", ".join(n for n, _ in new.files),
                hint="set tie_word_embeddings to false in the config first",
            )

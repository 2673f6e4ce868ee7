"""Merging into and out of checkpoints on disk, without torch and without loading the model.

Puts together: an adapter is located in the store, its surgery plans, a copy of the directory is staged, the plan is
applied to it, and the record of the merge goes in beside it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from embedsurgery.adapter import Adapter
from embedsurgery.api import load
from embedsurgery.durable import copy_tree, refuse_existing, refuse_inside, staged_directory, tree_files, writable
from embedsurgery.errors import BaseMismatchError, CheckpointError, ConfigError, PlanError
from embedsurgery.locate import locate
from embedsurgery.plan import Plan, SetRows
from embedsurgery.records import MERGES, adapter_sha256, check_written, facts, next_record, record_paths
from embedsurgery.registry import registry
from embedsurgery.stores.base import apply, check
from embedsurgery.stores.shards import ShardStore

Progress = Callable[[int, int], None]
"""Called with the bytes copied so far and the bytes to copy."""

AdapterLike = Adapter | str | os.PathLike[str]


@dataclass(frozen=True)
class MergeReport:
    """What a merge or unmerge did, or in a dry run would do.

    Attributes:
        output: The new directory.
        edits: A line for each edit.
        rows: Table -> how many rows.
        files: The weight files that are touched.
        copied: Bytes of the whole checkpoint.
        done: False for a dry run.
    """

    output: str
    edits: tuple[str, ...]
    rows: dict[str, int]
    files: tuple[str, ...]
    copied: int
    done: bool


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapters: AdapterLike | Sequence[AdapterLike],
    output: str | os.PathLike[str],
    *,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Write a new checkpoint directory with adapters baked in; every other byte of it is the base's.

    The undo lies in the output's ``.embedsurgery/``, so that `unmerge_checkpoint` gives the base back bit for bit.

    Args:
        base: A directory with safetensors weights, in one file or in shards.
        adapters: One or several, loaded or as directories. Their rows must be disjoint.
        output: A directory that does not exist yet; it appears when it is whole.
        dry_run: Check everything and say what would be done.
        progress: Called as files are copied.

    Raises:
        CheckpointError: The base's files are missing or broken.
        BaseMismatchError: An adapter was made from another base.
        PlanError: Two adapters set the same rows.
        OutputExistsError: ``output`` exists.
    """
    source, target = Path(base), Path(output)
    refuse_existing(target)
    refuse_inside(target, source)
    store = ShardStore.open(source)
    loaded = [_loaded(adapter) for adapter in _several(adapters)]
    _refuse_merged(source, loaded)
    plans = [_plan(adapter, store) for adapter, _ in loaded]
    whole = Plan(tuple(edit for plan in plans for edit in plan.edits))
    check(whole, store)
    files = tree_files(source)
    report = _report(target, whole, store, files)
    if dry_run:
        return report
    with staged_directory(target) as staging, _spill(target) as spill:
        _copy(source, staging, files, progress)
        staged = ShardStore.open(staging)
        with writable(staging, report.files):
            for (adapter, name), plan in zip(loaded, plans, strict=True):
                undo = apply(plan, staged, spill=spill)
                record = next_record(staging)
                _refuse_new_ties(staged, ShardStore.open(staging), undo)
                record.parent.mkdir(parents=True, exist_ok=True)
                replace(undo, facts=facts(adapter, name, undo, staged)).save(record)
    return replace(report, done=True)


def unmerge_checkpoint(
    merged: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Write a new checkpoint directory without the last merge: bit for bit what it was merged into.

    Args:
        merged: A directory that `merge_checkpoint` wrote.
        output: A directory that does not exist yet.
        dry_run: Check everything and say what would be done.
        progress: Called as files are copied.

    Raises:
        CheckpointError: There is no record of a merge.
        PlanError: The merged rows have been changed since.
        OutputExistsError: ``output`` exists.
    """
    source, target = Path(merged), Path(output)
    refuse_existing(target)
    refuse_inside(target, source)
    store = ShardStore.open(source)
    records = record_paths(source)
    if not records:
        raise CheckpointError("no merge is recorded here, so there is nothing to take out", where=source,
                              expected=f"{MERGES}/0001.safetensors",
                              hint="only embedsurgery's own merges can be taken out")  # fmt: skip
    last = records[-1]
    undo = Plan.load(last)
    check(undo, store)
    check_written(last, undo, store)
    kept = last.relative_to(source).as_posix()
    files = [(path, size) for path, size in tree_files(source) if path != kept]
    report = _report(target, undo, store, files)
    if dry_run:
        return report
    with staged_directory(target) as staging, _spill(target) as spill:
        _copy(source, staging, files, progress)
        with writable(staging, report.files):
            apply(undo, ShardStore.open(staging), spill=spill)
    return replace(report, done=True)


def _several(adapters: AdapterLike | Sequence[AdapterLike]) -> list[AdapterLike]:
    if isinstance(adapters, (Adapter, str, os.PathLike)):
        return [adapters]
    items = list(adapters) if isinstance(adapters, Iterable) else []
    if not items:
        hint = "give attachment.adapter()" if hasattr(adapters, "adapter") else None
        raise ConfigError(
            "no adapter to merge",
            expected="one or several",
            found=type(adapters).__name__ if hint else "none",
            hint=hint,
        )
    return items


def _loaded(adapter: AdapterLike) -> tuple[Adapter, str]:
    """An adapter and what to call it in the record."""
    if isinstance(adapter, Adapter):
        return adapter, "adapter"
    return load(adapter), Path(adapter).absolute().name


def _refuse_new_ties(before: ShardStore, after: ShardStore, undo: Plan) -> None:
    """Two tables that differed in the edited rows alone would now load as one, and could not be parted again."""
    for name in (edit.table for edit in undo.edits if isinstance(edit, SetRows)):
        old, new = before.graph.table(name), after.graph.table(name)
        if old.files != new.files:
            raise PlanError("the merge would make two stored tables equal, which then load as one", where=after.name,
                            expected=", ".join(n for n, _ in old.files), found=", ".join(n for n, _ in new.files),
                            hint="set tie_word_embeddings to false in the config first")  # fmt: skip


def _refuse_merged(base: Path, loaded: list[tuple[Adapter, str]]) -> None:
    """An adapter that lies in the base already would only be refused for its rows, which says less."""
    hashes = {adapter_sha256(adapter): name for adapter, name in loaded}
    for record in record_paths(base):
        name = hashes.get(str(Plan.load(record).facts.get("adapter_sha256")))
        if name is not None:
            raise BaseMismatchError("this adapter is in the base already", where=base, found=f"{name} in {record.name}",
                            hint="unmerge it first, or merge into the original base")  # fmt: skip


def _plan(adapter: Adapter, store: ShardStore) -> Plan:
    surgery = registry().named(adapter.manifest.surgery).surgery
    return surgery.plan(adapter, locate(adapter, store))


def _report(target: Path, plan: Plan, store: ShardStore, files: list[tuple[str, int]]) -> MergeReport:
    rows: dict[str, int] = {}
    touched: dict[str, None] = {}
    for edit in plan.edits:
        name = getattr(edit, "table", None)
        if name is None:
            continue
        table = store.graph.table(name)
        rows[name] = rows.get(name, 0) + (len(edit.indices) if isinstance(edit, SetRows) else table.shape[0])
        touched.update(dict.fromkeys(file for _, file in table.files))
    return MergeReport(str(target), tuple(plan.describe()), rows, tuple(touched), sum(s for _, s in files), done=False)


def _copy(source: Path, target: Path, files: list[tuple[str, int]], progress: Progress | None) -> None:
    total, done = sum(size for _, size in files), 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    copy_tree(source, target, files, count)


@contextmanager
def _spill(target: Path) -> Iterator[Path]:
    """A directory on the output's file system for the undo of whole tables, gone in the end."""
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.undo-", dir=target.absolute().parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)

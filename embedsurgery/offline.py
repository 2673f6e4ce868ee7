"""Merging into and out of checkpoints on disk, without torch and without loading the model.

Puts together: an adapter is located in the store, its surgery plans, a copy of the directory is staged, the plan is
applied to it, and the record of the merge goes in beside it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from embedsurgery import hub
from embedsurgery.adapter import Adapter
from embedsurgery.api import load
from embedsurgery.durable import (
    copy_tree,
    link_file,
    refuse_existing,
    refuse_inside,
    staged_directory,
    tree_files,
    writable,
)
from embedsurgery.errors import BaseMismatchError, CheckpointError, ConfigError, EmbedSurgeryWarning, PlanError
from embedsurgery.new_tokens import Init, plan_tokens
from embedsurgery.plan import (
    AddTokens,
    Edit,
    Grow,
    PatchFile,
    Plan,
    SetBlocks,
    SetEntries,
    SetRows,
    Undo,
    Untie,
    undo_bytes,
)
from embedsurgery.planning import plan_adapters
from embedsurgery.records import MERGES, adapter_sha256, check_written, facts, next_record, record_paths, tokens_facts
from embedsurgery.registry import registry
from embedsurgery.stores.base import Store, apply, check
from embedsurgery.surgeries.soft_prompt_bake_config import BakeConfig
from embedsurgery.tokenizer_files import check_front, check_tokens, known_tokens
from embedsurgery.vocabulary import NewTokens

Progress = Callable[[int, int], None]
"""Called with the bytes copied so far and the bytes to copy."""

AdapterLike = Adapter | str | os.PathLike[str]


@dataclass(frozen=True)
class MergeReport:
    """What a merge or unmerge did, or in a dry run would do.

    Attributes:
        output: The new directory, None where a dry run named none.
        edits: A line for each edit.
        rows: Table -> how many rows.
        files: The files that are touched.
        tokens: Text -> id of tokens that are added.
        copied: Bytes of the whole checkpoint.
        done: False for a dry run.
        undo: Bytes of rows that are kept to take it out again; large for an adapter of whole tables.
    """

    output: str | None
    edits: tuple[str, ...]
    rows: dict[str, int]
    files: tuple[str, ...]
    tokens: dict[str, int]
    copied: int
    done: bool
    undo: int = 0


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapters: AdapterLike | Sequence[AdapterLike],
    output: str | os.PathLike[str] | None,
    *,
    bake: BakeConfig | Sequence[BakeConfig | None] | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Write a new checkpoint directory with adapters baked in; every other byte of it is the base's.

    The undo lies in the output's ``.embedsurgery/``, so that `unmerge_checkpoint` gives the base back bit for bit.

    Args:
        base: A directory with safetensors weights, in one file or in shards; or a Hub id, ``org/name@revision``.
        adapters: One or several, loaded, as directories or as Hub ids. Their rows must be disjoint.
        output: A directory that does not exist yet; it appears when it is whole. None for a dry run alone.
        bake: How soft prompts become tokens: for all, or for each adapter.
        dry_run: Check everything and say what would be done.
        progress: Called as files are copied.

    Raises:
        CheckpointError: The base's files are missing or broken.
        BaseMismatchError: An adapter was made from another base.
        PlanError: Two adapters set the same rows.
        OutputExistsError: ``output`` exists.
    """
    if hub.find_id(base) is not None:
        with hub.directory(base) as folder:
            return merge_checkpoint(folder, adapters, output, bake=bake, dry_run=dry_run, progress=progress)
    source, target = Path(base), _target(output, Path(base), dry_run)
    store = registry().open_store(source)
    loaded = [_loaded(adapter) for adapter in _several(adapters)]
    _refuse_merged(source, loaded)
    tokens = cache(partial(known_tokens, source))
    labels = [(adapter, Path(name.partition("@")[0]).name) for adapter, name in loaded]
    plans = plan_adapters(labels, lambda name: registry().named(name).surgery, store, tokens, bake)
    jobs = [_Job(plan, partial(facts, adapter, name)) for plan, (adapter, name) in zip(plans, loaded, strict=True)]
    return _write(source, target, store, jobs, dry_run=dry_run, progress=progress)


def add_tokens_checkpoint(
    model: str | os.PathLike[str],
    tokens: str | Sequence[str],
    output: str | os.PathLike[str] | None,
    *,
    init: Init = "mean",
    special: bool = False,
    reserved: bool = False,
    pad_to_multiple_of: int | None = None,
    seed: int = 0,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Write a new checkpoint directory with tokens added to its tokenizer and rows for them; nothing is trained.

    As `embedsurgery.add_tokens`, on disk and without loading the model; recorded as a merge, so that
    `unmerge_checkpoint` takes the tokens out again.

    Args:
        model: A directory with safetensors weights and a tokenizer; or a Hub id, ``org/name@revision``.
        tokens: Texts. Those that exist are found, not added twice.
        output: A directory that does not exist yet. None for a dry run alone.
        init: How rows start: NAME or NAME:ARGUMENT, for all tokens or for each in a dict by its text.
        special: Whether they are special tokens.
        reserved: Take the ids of reserved tokens first.
        pad_to_multiple_of: Where the tables must grow, grow them to a multiple.
        seed: For initialisers that draw.
        dry_run: Check everything and say what would be done.
        progress: Called as files are copied.

    Raises:
        ConfigError: A token that is empty, named twice or exists already, or an initialiser that is none.
        CheckpointError: The model's files are missing or broken, or have no tokenizer.
        OutputExistsError: ``output`` exists.
    """
    if hub.find_id(model) is not None:
        with hub.directory(model) as folder:
            return add_tokens_checkpoint(
                folder,
                tokens,
                output,
                init=init,
                special=special,
                reserved=reserved,
                pad_to_multiple_of=pad_to_multiple_of,
                seed=seed,
                dry_run=dry_run,
                progress=progress,
            )
    source, target = Path(model), _target(output, Path(model), dry_run)
    store = registry().open_store(source)
    known = known_tokens(source)
    asked = plan_tokens(
        store,
        known,
        tokens,
        initializers=registry().initializers,
        init=init,
        special=special,
        reserved=reserved,
        pad_to_multiple_of=pad_to_multiple_of,
        seed=seed,
    )
    if asked.new is None:
        named = ", ".join(f"{known.texts[i]!r} is {i}" for i in asked.ids)
        raise ConfigError("the tokens exist already, so there is nothing to write", where=source, found=named)
    _try_encoding(source, asked.new)
    job = _Job(asked.plan, partial(tokens_facts, asked.new))
    return _write(source, target, store, [job], dry_run=dry_run, progress=progress)


def _try_encoding(source: Path, new: NewTokens) -> None:
    """See that text reaches the new tokens, where the library that encodes is there."""
    if importlib.util.find_spec("tokenizers") is None:
        warnings.warn("the tokenizers library is not installed, so whether text reaches the new tokens was not tried",
                      EmbedSurgeryWarning, stacklevel=3)  # fmt: skip
        return
    check_tokens(source, new.tokens)


def _try_front(staging: Path, plan: Plan) -> None:
    """See that text gets what is put before it, where the library that encodes is there."""
    fronts = [edit.front for edit in plan.edits if isinstance(edit, AddTokens) and edit.front is not None]
    for front in fronts if importlib.util.find_spec("tokenizers") is not None else ():
        check_front(staging, front)


@dataclass(frozen=True)
class _Job:
    """A plan, and what its record says: called with the undo and the store when it is done."""

    plan: Plan
    facts: Callable[[Undo, Store], dict[str, Any]]


def _write(
    source: Path, target: Path | None, store: Store, jobs: list[_Job], *, dry_run: bool, progress: Progress | None
) -> MergeReport:
    """A copy of a checkpoint with plans applied to it, each with its record."""
    _check(jobs, store)
    whole = Plan(tuple(edit for job in jobs for edit in job.plan.edits))
    files = tree_files(source)
    report = _report(target, whole, store, files)
    if dry_run or target is None:
        return report
    with staged_directory(target) as staging, _spill(target) as spill:
        rewritten = _rewritten(whole, store)
        _copy(source, staging, files, progress, rewritten)
        staged = registry().open_store(staging)
        with writable(staging, [file for file in _weights(whole, store) if file not in rewritten]):
            for job in jobs:
                undo = apply(job.plan, staged, spill=spill)
                record = next_record(staging)
                staged = registry().open_store(staging)
                _refuse_new_ties(store, staged, undo)
                record.parent.mkdir(parents=True, exist_ok=True)
                replace(undo, facts={**job.plan.facts, **job.facts(undo, staged)}).save(record)
                _try_front(staging, job.plan)
    return replace(report, done=True)


def _check(jobs: list[_Job], store: Store) -> None:
    """All that can be seen before anything is copied: each plan by itself, and rows that two of them set."""
    first = next((job for job in jobs if any(isinstance(e, (Grow, AddTokens)) for e in job.plan.edits)), None)
    if first is not None:
        check(first.plan, store)
    sizes = {table.name: table.shape[0] for table in store.graph.tables}
    rows = [edit for job in jobs for edit in job.plan.edits if isinstance(edit, (SetRows, SetEntries, SetBlocks))]
    sizes |= {name: v.size for v in store.graph.vocabularies for name in v.vectors}
    check(Plan(tuple(edit for edit in rows if _fits(edit, sizes))), store)


def _fits(edit: Edit, sizes: dict[str, int]) -> bool:
    """Whether the base has what an edit sets, so that no growth must come first."""
    if isinstance(edit, SetRows):
        return max(edit.indices) < sizes.get(edit.table, 0)
    return not isinstance(edit, SetEntries) or max(edit.indices) < sizes.get(edit.vector, 0)


def unmerge_checkpoint(
    merged: str | os.PathLike[str],
    output: str | os.PathLike[str] | None,
    *,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Write a new checkpoint directory without the last merge: bit for bit what it was merged into.

    Args:
        merged: A directory that `merge_checkpoint` wrote; or a Hub id, ``org/name@revision``.
        output: A directory that does not exist yet. None for a dry run alone.
        dry_run: Check everything and say what would be done.
        progress: Called as files are copied.

    Raises:
        CheckpointError: There is no record of a merge.
        PlanError: The merged rows have been changed since.
        OutputExistsError: ``output`` exists.
    """
    if hub.find_id(merged) is not None:
        with hub.directory(merged) as folder:
            return unmerge_checkpoint(folder, output, dry_run=dry_run, progress=progress)
    source, target = Path(merged), _target(output, Path(merged), dry_run)
    store = registry().open_store(source)
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
    if dry_run or target is None:
        return report
    with staged_directory(target) as staging, _spill(target) as spill:
        rewritten = _rewritten(undo, store)
        _copy(source, staging, files, progress, rewritten)
        with writable(staging, [file for file in _weights(undo, store) if file not in rewritten]):
            apply(undo, registry().open_store(staging), spill=spill)
    return replace(report, done=True, undo=0)


def _target(output: str | os.PathLike[str] | None, source: Path, dry_run: bool) -> Path | None:
    """Where to write; whatever is there already is refused."""
    if output is None:
        if not dry_run:
            raise ConfigError("no output to write to", expected="a new directory", hint="or a dry run")
        return None
    refuse_existing(Path(output))
    refuse_inside(Path(output), source)
    return Path(output)


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
        return adapter, adapter.source or "adapter"
    found = load(adapter)
    return found, found.source or Path(adapter).absolute().name


def _refuse_new_ties(before: Store, after: Store, undo: Plan) -> None:
    """Two tables that differed in the edited rows alone would now load as one, and could not be parted again."""
    parted = {name for edit in undo.edits if isinstance(edit, Untie) for name in (edit.table, edit.head)}
    for name in (edit.table for edit in undo.edits if isinstance(edit, SetRows) and edit.table not in parted):
        old, new = before.graph.find(name), after.graph.find(name)
        if old is not None and new is not None and set(old.files) < set(new.files):
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


def _weights(plan: Plan, store: Store) -> list[str]:
    """The weight files that hold what a plan changes."""
    return list(dict.fromkeys(file for edit in plan.edits for file in _files(edit, store)))


def _rewritten(plan: Plan, store: Store) -> list[str]:
    """The weight files that growing makes anew before anything is written into them."""
    written: set[str] = set()
    anew: dict[str, None] = {}
    for edit in plan.edits:
        if isinstance(edit, Grow) or (isinstance(edit, Untie) and store.untie_files(edit)[1]):
            anew.update(dict.fromkeys(file for file in _files(edit, store) if file not in written))
        else:
            written.update(_files(edit, store))
    return list(anew)


def _files(edit: Edit, store: Store) -> list[str]:
    """The weight files that an edit touches."""
    if isinstance(edit, (SetRows, SetBlocks)):
        table = store.graph.find(edit.table)  # None for a head that an earlier edit parts
        return [] if table is None else [file for _, file in table.files]
    if isinstance(edit, SetEntries):
        return list(store.vector_files(edit.vector))
    if isinstance(edit, Untie):
        return list(store.untie_files(edit)[0])
    if isinstance(edit, Grow):
        vocabulary = next(v for v in store.graph.vocabularies if v.name == edit.vocabulary)
        return [file for file in store.growth_files(vocabulary) if file in store.weight_files()]
    return []


def _report(target: Path | None, plan: Plan, store: Store, files: list[tuple[str, int]]) -> MergeReport:
    rows: dict[str, int] = {}
    tokens: dict[str, int] = {}
    for edit in plan.edits:
        if isinstance(edit, SetRows):
            rows[edit.table] = rows.get(edit.table, 0) + len(edit.indices)
        elif isinstance(edit, SetBlocks):
            rows[edit.table] = edit.blocks.shape[0]
        elif isinstance(edit, AddTokens):
            tokens.update({token.content: token.id for token in edit.tokens})
    patched = [edit.path for edit in plan.edits if isinstance(edit, PatchFile)]
    touched = (*_weights(plan, store), *dict.fromkeys(patched))
    total = sum(size for _, size in files)
    output = None if target is None else str(target)
    undo = undo_bytes(plan, store.graph)
    return MergeReport(output, tuple(plan.describe()), rows, touched, tokens, total, done=False, undo=undo)


def _copy(
    source: Path, target: Path, files: list[tuple[str, int]], progress: Progress | None, rewritten: list[str]
) -> None:
    """Copy a checkpoint; files that will be made anew are linked, which is safe: they are only ever replaced."""
    total, done = sum(size for _, size in files), 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    linked = [path for path, size in files if path in rewritten and link_file(source / path, target / path)]
    copy_tree(source, target, [(path, size) for path, size in files if path not in linked], count)


@contextmanager
def _spill(target: Path) -> Iterator[Path]:
    """A directory on the output's file system for the undo of whole tables, gone in the end."""
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.undo-", dir=target.absolute().parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)

"""Merges adapters into checkpoints on disk.

This file turns adapters into jobs. ``combining/several.py`` plans them and ``writing.py`` applies the jobs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedsurgery.adapters.adapter import Adapter
from embedsurgery.checkpoints.jobs import Job
from embedsurgery.checkpoints.records import adapter_sha256, merge_facts, read_facts, record_paths
from embedsurgery.checkpoints.writing import open_output, write_jobs
from embedsurgery.combining.several import Conflict, plan_adapters
from embedsurgery.combining.weighted_adapters import WeightedAdapter, parse_weighted_adapters
from embedsurgery.errors import BaseMismatchError
from embedsurgery.loading import load
from embedsurgery.plugins.current import registry

if TYPE_CHECKING:
    from embedsurgery.checkpoints.report import MergeReport, Progress
    from embedsurgery.plan import Undo
    from embedsurgery.stores.store import Store
    from embedsurgery.surgeries.soft_prompt.bake_config import BakeConfig
    from embedsurgery.tokenizer.known import KnownTokens

# Some imports stand inside functions: hashing and tokenizers are not needed by most merges, and a merge of a few rows
# should not wait for them (tests/test_import.py).

AdapterLike = Adapter | str | os.PathLike[str]
AdapterWithWeight = tuple[AdapterLike, float]


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapters: AdapterLike | AdapterWithWeight | Sequence[AdapterLike | AdapterWithWeight],
    output: str | os.PathLike[str] | None = None,
    *,
    bake: BakeConfig | Sequence[BakeConfig | None] | None = None,
    on_conflict: Conflict | None = None,
    allow_nan: bool = False,
    hashes: bool = False,
    in_place: bool = False,
    hardlink: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Write a new checkpoint with adapters merged in; every other byte is the base's.

    The undo is stored in the output's ``.embedsurgery/``; with it `unmerge_checkpoint` restores the base bit for bit.
    In place, the rows are written into the base's own files, under a lock and with a journal: an error is rolled back
    at once, and after a kill `recover_checkpoint` rolls it back. A second merge at the same time is refused.

    Args:
        base: A directory with safetensors weights, in one file or sharded, or a Hub id, ``org/name@revision``.
        adapters: One or several: loaded, as directories or as Hub ids. In a pair with a weight, rows are interpolated:
            ``base + weight * (row - base)``, computed in fp32 and rounded once. Rows of tokens that only the adapter
            has are not weighted. Each adapter gets its own merge record.
        output: A new directory; it appears when it is complete. None for a dry run, or with ``in_place``.
        bake: How soft prompts become tokens: for all, or a sequence with one for each adapter.
        on_conflict: How to resolve rows that several adapters set: "last" keeps those of the adapter given last,
            "average" takes the mean of what each adapter would give alone, with its weight. By default they are
            refused.
        allow_nan: Merge rows with NaN or infinity, which are refused by default.
        hashes: Record the sha256 of every file of the result, for `verify_checkpoint(full=True)`; reads all of it.
        in_place: Change ``base`` itself. Processes that have its files mapped see the rows change.
        hardlink: Share unchanged weight files with ``base`` as hard links.
        dry_run: Check everything and return the report, write nothing.
        progress: Called as files are copied.

    Raises:
        CheckpointError: The base's files are missing or broken.
        BaseMismatchError: An adapter was made from another base.
        PlanError: Two adapters set the same rows, or rows hold NaN or infinity.
        OutputExistsError: ``output`` exists.
        UnsupportedError: ``base`` cannot be changed in place: a file has several names, is a link, or is read-only.
        UnfinishedError: An earlier change of ``base`` in place was interrupted.
        BusyError: Another process is changing ``base`` in place.
    """
    with open_output(base, output, in_place=in_place, hardlink=hardlink, dry_run=dry_run, progress=progress) as out:
        store = registry().open_store(out.source)
        jobs = merge_jobs(store, adapters, bake=bake, on_conflict=on_conflict, allow_nan=allow_nan, hashes=hashes)
        return write_jobs(jobs, store, out)


def merge_jobs(
    store: Store,
    adapters: AdapterLike | AdapterWithWeight | Sequence[AdapterLike | AdapterWithWeight],
    *,
    bake: BakeConfig | Sequence[BakeConfig | None] | None = None,
    on_conflict: Conflict | None = None,
    allow_nan: bool = False,
    hashes: bool = False,
) -> list[Job]:
    """The jobs that merge adapters into a checkpoint, one for each; arguments as of `merge_checkpoint`.

    Raises:
        BaseMismatchError: An adapter was made from another base, or is merged already.
        PlanError: Two adapters set the same rows, or rows hold NaN or infinity.
    """
    weighted = parse_weighted_adapters(adapters, load_named_adapter)
    _refuse_merged_adapters(store.directory, weighted)
    planned = plan_adapters(
        weighted,
        lambda name: registry().find_surgery(name).surgery,
        store,
        cache(partial(_read_known_tokens, store.directory)),
        options=bake,
        on_conflict=on_conflict,
        allow_nan=allow_nan,
    )
    last = planned[-1][0]  # hashes are those of the finished checkpoint, so only the last record has them
    return [
        Job(
            plan,
            partial(_record_facts, item, on_conflict=on_conflict, hashes=hashes and item is last),
            label=item.name,
        )
        for item, plan in planned
    ]


def _record_facts(
    item: WeightedAdapter, undo: Undo, store: Store, *, on_conflict: Conflict | None = None, hashes: bool = False
) -> dict[str, Any]:
    """The facts of an adapter's merge record; called after its plan was applied."""
    facts = merge_facts(item.adapter, item.name, undo, store, weight=item.weight, on_conflict=on_conflict)
    if hashes:
        from embedsurgery.checkpoints.hashes import hash_files

        facts["sha256"] = hash_files(store.directory)
    return facts


def _read_known_tokens(directory: Path) -> KnownTokens:
    from embedsurgery.tokenizer.patching import read_known_tokens

    return read_known_tokens(directory)


def load_named_adapter(adapter: AdapterLike) -> tuple[Adapter, str]:
    """Load an adapter and return it with its name for the merge record."""
    if isinstance(adapter, Adapter):
        return adapter, adapter.source or "adapter"
    loaded = load(adapter)
    return loaded, loaded.source or Path(adapter).absolute().name


def _refuse_merged_adapters(base: Path, adapters: list[WeightedAdapter]) -> None:
    """Refuse adapters that are merged already. Their rows would not match either, but that error is less clear."""
    names = {adapter_sha256(item.adapter): item.name for item in adapters}
    for record in record_paths(base):
        name = names.get(str(read_facts(record).get("adapter_sha256")))
        if name is not None:
            raise BaseMismatchError(
                "the adapter is merged into this base already",
                where=base,
                found=f"{name} in {record.name}",
                hint="unmerge it first, or merge into the original base",
            )

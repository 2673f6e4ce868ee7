"""Baking adapters into checkpoints on disk.

An adapter is located in the store and its surgery plans; what the plans are done to is ``writing.py``'s.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedsurgery.adapters.adapter import Adapter
from embedsurgery.checkpoints.jobs import Job
from embedsurgery.checkpoints.records import adapter_sha256, facts, facts_of, record_paths
from embedsurgery.checkpoints.writing import open_output, write
from embedsurgery.combining.several import Conflict, plan_adapters
from embedsurgery.combining.weighted_adapters import WeightedAdapter, weighted_adapters
from embedsurgery.errors import BaseMismatchError
from embedsurgery.loading import load
from embedsurgery.plugins.current import registry

if TYPE_CHECKING:
    from embedsurgery.checkpoints.report import MergeReport, Progress
    from embedsurgery.plan import Undo
    from embedsurgery.stores.store import Store
    from embedsurgery.surgeries.soft_prompt.bake_config import BakeConfig
    from embedsurgery.tokenizer.known import KnownTokens

AdapterLike = Adapter | str | os.PathLike[str]
Weighted = tuple[AdapterLike, float]


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapters: AdapterLike | Weighted | Sequence[AdapterLike | Weighted],
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
    """Write a new checkpoint directory with adapters baked in; every other byte of it is the base's.

    The undo lies in the output's ``.embedsurgery/``, so that `unmerge_checkpoint` gives the base back bit for bit.
    In place, the rows are written into the base's own files, under a lock and with a journal: a failure takes back what
    was done, and after a kill `recover_checkpoint` does. A second merge meanwhile is refused, it does not wait.

    Args:
        base: A directory with safetensors weights, in one file or in shards; or a Hub id, ``org/name@revision``.
        adapters: One or several, loaded, as directories or as Hub ids, each alone or in a pair with a weight: its rows
            then go that part of the way from the base's, computed in fp32 and rounded once. Rows of tokens that an
            adapter brings and the base does not have are taken as they are. Each adapter gets a record of its own.
        output: A directory that does not exist yet; it appears when it is whole. None for a dry run alone, or with
            ``in_place``.
        bake: How soft prompts become tokens: for all, or for each adapter.
        on_conflict: What becomes of rows that several adapters set: "last", those of the adapter that is named last;
            "average", the mean of what each adapter alone would make of them, its weight included. By default such
            adapters are refused.
        allow_nan: Merge rows with NaN or infinity, which are refused otherwise.
        hashes: Record the sha256 of every file of the result, for `verify_checkpoint(full=True)`: reads all of it once.
        in_place: Change ``base`` itself. Processes that have its files mapped see the rows change.
        hardlink: Share the weight files that do not change with ``base``: another name for the same bytes.
        dry_run: Check everything and say what would be done.
        progress: Called as files are copied.

    Raises:
        CheckpointError: The base's files are missing or broken.
        BaseMismatchError: An adapter was made from another base.
        PlanError: Two adapters set the same rows, or rows hold NaN or infinity.
        OutputExistsError: ``output`` exists.
        UnsupportedError: ``base`` cannot be changed in place: a file with a second name, behind a link, read-only.
        UnfinishedError: ``base`` was being changed in place when something stopped it.
        BusyError: ``base`` is being changed in place by another process.
    """
    with open_output(base, output, in_place=in_place, hardlink=hardlink, dry_run=dry_run, progress=progress) as place:
        store = registry().open_store(place.source)
        jobs = merge_jobs(store, adapters, bake=bake, on_conflict=on_conflict, allow_nan=allow_nan, hashes=hashes)
        return write(jobs, store, place)


def merge_jobs(
    store: Store,
    adapters: AdapterLike | Weighted | Sequence[AdapterLike | Weighted],
    *,
    bake: BakeConfig | Sequence[BakeConfig | None] | None = None,
    on_conflict: Conflict | None = None,
    allow_nan: bool = False,
    hashes: bool = False,
) -> list[Job]:
    """The jobs that bake adapters into a checkpoint, one for each adapter; arguments as of `merge_checkpoint`.

    Raises:
        BaseMismatchError: An adapter was made from another base, or is merged already.
        PlanError: Two adapters set the same rows, or rows hold NaN or infinity.
    """
    asked = weighted_adapters(adapters, named_adapter)
    _refuse_merged(store.directory, asked)
    tokens = cache(partial(_known_tokens, store.directory))
    planned = plan_adapters(
        asked,
        lambda name: registry().named(name).surgery,
        store,
        tokens,
        options=bake,
        on_conflict=on_conflict,
        allow_nan=allow_nan,
    )
    return [
        Job(
            plan,
            partial(_part_facts, part, on_conflict=on_conflict, hashes=hashes and part is planned[-1][0]),
            label=part.name,
        )
        for part, plan in planned
    ]


def _part_facts(
    part: WeightedAdapter, undo: Undo, store: Store, *, on_conflict: Conflict | None = None, hashes: bool = False
) -> dict[str, Any]:
    """What the record of a part says; called when it is done."""
    said = facts(part.adapter, part.name, undo, store, weight=part.weight, on_conflict=on_conflict)
    if hashes:
        from embedsurgery.checkpoints.hashes import file_hashes

        said["sha256"] = file_hashes(store.directory)
    return said


def _known_tokens(directory: Path) -> KnownTokens:
    from embedsurgery.tokenizer.patching import known_tokens

    return known_tokens(directory)


def named_adapter(adapter: AdapterLike) -> tuple[Adapter, str]:
    """An adapter and what to call it in the record."""
    if isinstance(adapter, Adapter):
        return adapter, adapter.source or "adapter"
    found = load(adapter)
    return found, found.source or Path(adapter).absolute().name


def _refuse_merged(base: Path, asked: list[WeightedAdapter]) -> None:
    """An adapter that lies in the base already would only be refused for its rows, which says less."""
    known = {adapter_sha256(part.adapter): part.name for part in asked}
    for record in record_paths(base):
        name = known.get(str(facts_of(record).get("adapter_sha256")))
        if name is not None:
            raise BaseMismatchError(
                "this adapter is in the base already",
                where=base,
                found=f"{name} in {record.name}",
                hint="unmerge it first, or merge into the original base",
            )

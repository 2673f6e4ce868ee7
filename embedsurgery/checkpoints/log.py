"""The merges that a checkpoint records, of a directory or of a model on the Hub."""

from __future__ import annotations

import os
from pathlib import Path

from embedsurgery import hub
from embedsurgery.checkpoints.records import MergeRecord, facts_of, merge_record
from embedsurgery.checkpoints.stack import merges_in
from embedsurgery.files.locking import refuse_unfinished


def log_checkpoint(merged: str | os.PathLike[str]) -> tuple[MergeRecord, ...]:
    """What is recorded of each merge in a checkpoint, the oldest first; empty where none was merged.

    Args:
        merged: A directory; or a Hub id, of which only the headers of the records are read.

    Raises:
        CheckpointError: It is no directory, or a record is broken.
        PlanError: A record is none of embedsurgery's.
        HubError: It cannot be had from the Hub.
    """
    remote = hub.find_id(merged)
    if remote is None:
        if os.path.isdir(merged):
            refuse_unfinished(Path(merged))
        return merges_in(Path(merged))
    found = hub.remote_records(remote)
    return tuple(merge_record(Path(name), facts_of(Path(name), header)) for name, header in found.items())

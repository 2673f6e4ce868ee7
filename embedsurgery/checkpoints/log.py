"""The merges that a checkpoint records, of a directory or of a model on the Hub."""

from __future__ import annotations

import os
from pathlib import Path

from embedsurgery import hub
from embedsurgery.checkpoints.records import MERGES, RECORD, MergeRecord, facts_of, merge_record
from embedsurgery.checkpoints.stack import merges_in
from embedsurgery.files.locking import refuse_unfinished
from embedsurgery.files.safetensors import Header
from embedsurgery.hub.ids import HubId


def list_merges(merged: str | os.PathLike[str]) -> tuple[MergeRecord, ...]:
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
    found = _remote_records(remote)
    return tuple(merge_record(Path(name), facts_of(Path(name), header)) for name, header in found.items())


def _remote_records(of: HubId) -> dict[str, Header]:
    """Path -> header of each record of a merge that a model holds, the oldest first.

    Raises:
        HubError: The repository cannot be read.
        CheckpointError: A record is no safetensors file.
    """
    hub.check_installed()
    from embedsurgery.hub.client import Client
    from embedsurgery.hub.headers import remote_headers

    client = Client()
    at = client.resolve(of)
    held = (name for name in client.files(at, everything=True) if name.startswith(f"{MERGES}/"))
    names = [name for name in held if RECORD.fullmatch(name.removeprefix(f"{MERGES}/"))]
    return remote_headers(client, at, sorted(names, key=lambda name: int(Path(name).stem)))

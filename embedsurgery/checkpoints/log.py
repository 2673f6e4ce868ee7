"""Lists the merges that a checkpoint records, in a directory or on the Hub."""

from __future__ import annotations

import os
from pathlib import Path

from embedsurgery import hub
from embedsurgery.checkpoints.records import MERGES, RECORD, MergeRecord, parse_record, read_facts
from embedsurgery.checkpoints.stack import read_records
from embedsurgery.files.locking import refuse_unfinished
from embedsurgery.files.safetensors import Header
from embedsurgery.hub.ids import HubId


def list_merges(merged: str | os.PathLike[str]) -> tuple[MergeRecord, ...]:
    """List the merges that a checkpoint records, the oldest first; empty if there are none.

    Args:
        merged: A directory or a Hub id. From the Hub only the headers of the records are read.

    Raises:
        CheckpointError: The directory does not exist, or a record is broken.
        PlanError: A file is not a merge record.
        HubError: The model cannot be read from the Hub.
    """
    remote = hub.find_id(merged)
    if remote is None:
        if os.path.isdir(merged):
            refuse_unfinished(Path(merged))
        return read_records(Path(merged))
    headers = _read_record_headers(remote)
    return tuple(parse_record(Path(name), read_facts(Path(name), header)) for name, header in headers.items())


def _read_record_headers(model: HubId) -> dict[str, Header]:
    """Path -> header of each merge record of a model on the Hub, the oldest first.

    Raises:
        HubError: The repository cannot be read.
        CheckpointError: A record is not a safetensors file.
    """
    hub.check_installed()
    # Imported here so that listing the merges of a directory does not load huggingface_hub.
    from embedsurgery.hub.client import Client
    from embedsurgery.hub.headers import read_remote_headers

    client = Client()
    at = client.resolve(model)
    in_merges = (name for name in client.list_files(at, everything=True) if name.startswith(f"{MERGES}/"))
    names = [name for name in in_merges if RECORD.fullmatch(name.removeprefix(f"{MERGES}/"))]
    return read_remote_headers(client, at, sorted(names, key=lambda name: int(Path(name).stem)))

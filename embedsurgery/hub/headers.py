"""Reads the headers of a model on the Hub: kilobytes, whatever the model's size.

The result is the same `Checkpoint` that a directory gives, with the same checks. Headers come by range requests; index
and config are downloaded whole, into the Hub cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from embedsurgery.errors import CheckpointError, HubError
from embedsurgery.files.safetensors import MAX_HEADER, Header, parse_header
from embedsurgery.hub.client import Client, RemoteFile, Snapshot
from embedsurgery.stores.checkpoint import (
    CONFIG,
    INDEX,
    SINGLE,
    Checkpoint,
    checkpoint_from_index,
    is_plain_name,
    read_config,
    read_weight_map,
)

_FIRST = 32_768
"""Bytes of the first request. Most headers fit; the rest of a longer one takes a second request."""

_WORKERS = 8
MAX_SMALL = 64_000_000
"""In bytes. No config or index comes near it; a larger one is not downloaded."""


def read_remote_checkpoint(client: Client, snapshot: Snapshot, files: Mapping[str, RemoteFile]) -> Checkpoint:
    """Read the headers, index and config of a commit, and no weights.

    Args:
        client: Sends the requests.
        snapshot: The commit.
        files: Its files.

    Returns:
        The checkpoint; its directory is only a name.

    Raises:
        HubError: A file cannot be read.
        CheckpointError: The repository has no safetensors weights, or broken ones.
    """
    where = Path(str(snapshot))
    config = read_config(fetch_small_file(client, snapshot, files, CONFIG)) if CONFIG in files else None
    if SINGLE in files and INDEX in files:
        raise CheckpointError(
            "two sets of weights",
            where=where,
            found=f"{SINGLE} beside {INDEX}",
            hint="loaders take the single file and ignore the shards",
        )
    if INDEX in files:
        location = read_weight_map(fetch_small_file(client, snapshot, files, INDEX), where / INDEX)
        missing = next((file for file in location.values() if file not in files), None)
        if missing is not None:
            raise CheckpointError("the index names a missing shard", where=where, expected=missing)
        headers = read_remote_headers(client, snapshot, dict.fromkeys(location.values()))
        return checkpoint_from_index(where, headers, location, config)
    file = SINGLE if SINGLE in files else _find_weights(files, where)
    header = read_remote_header(client, snapshot, file)
    return Checkpoint(where, {file: header}, dict.fromkeys(header.entries, file), config, indexed=False)


def fetch_small_file(client: Client, snapshot: Snapshot, files: Mapping[str, RemoteFile], name: str) -> Path:
    """Return a small file's path in the Hub cache.

    Raises:
        HubError: The file is larger than `MAX_SMALL` and was not downloaded, or the download failed.
    """
    if files[name].size > MAX_SMALL:
        raise HubError(
            "the file is too large for its kind",
            where=f"{snapshot}/{name}",
            expected=f"at most {MAX_SMALL} bytes",
            found=f"{files[name].size} bytes",
        )
    return client.fetch(snapshot, name)


def read_remote_headers(client: Client, snapshot: Snapshot, names: Iterable[str]) -> dict[str, Header]:
    """Read the headers of several safetensors files, `_WORKERS` at a time."""
    files = list(names)
    with ThreadPoolExecutor(_WORKERS) as pool:
        return dict(zip(files, pool.map(lambda name: read_remote_header(client, snapshot, name), files), strict=True))


def read_remote_header(client: Client, snapshot: Snapshot, name: str) -> Header:
    """Read the header of a safetensors file on the Hub, with the checks for one on disk.

    Raises:
        CheckpointError: It is not a safetensors file.
        HubError: It cannot be read.
    """
    return fetch_header(client, snapshot, name)[0]


def fetch_header(client: Client, snapshot: Snapshot, name: str) -> tuple[Header, bytes, int]:
    """As `read_remote_header`; also returns the header's bytes and the size of the whole file."""
    path = Path(str(snapshot)) / name
    data, total = client.read_range(snapshot, name, 0, _FIRST)
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > MAX_HEADER or 8 + length > total:
        raise CheckpointError(
            "not a safetensors file, or a truncated one",
            where=path,
            expected="a header of safetensors' format",
            found=f"{total} bytes",
        )
    if len(data) < 8 + length:
        data += client.read_range(snapshot, name, len(data), 8 + length - len(data))[0]
    head = data[: 8 + length]
    return parse_header(head[8:], total, path), head, total


def _find_weights(files: Mapping[str, RemoteFile], where: Path) -> str:
    """Find the one safetensors file of a repository that has neither `SINGLE` nor `INDEX`."""
    names = sorted(name for name in files if name.endswith(".safetensors") and is_plain_name(name))
    if "adapter_model.safetensors" in names:
        raise CheckpointError(
            "an adapter instead of a model",
            where=where,
            expected=SINGLE,
            found="adapter_model.safetensors",
            hint="name the base model's repository",
        )
    if len(names) == 1:
        return names[0]
    hint = "is it a model that transformers can load?"
    if any(name.endswith((".bin", ".pt", ".pth")) for name in files):
        hint = "its weights are pickles, which can run code: look for a revision with safetensors (refs/pr/N)"
    raise CheckpointError(
        "no safetensors weights",
        where=where,
        expected=f"{SINGLE} or {INDEX}",
        found=", ".join(names)[:200] or "none",
        hint=hint,
    )

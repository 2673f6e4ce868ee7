"""A model on the Hub by its headers alone: kilobytes, whatever its size.

Gives the same `Checkpoint` as a directory does, checked in the same way, from range requests; index and config come
whole, into the Hub cache.
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
    indexed,
    is_plain_name,
    read_config,
    weight_map,
)

_FIRST = 32_768
"""Bytes that are asked for at first; most shards' headers fit, and the rest of a longer one comes with a second."""

_WORKERS = 8
MAX_SMALL = 64_000_000
"""Bytes; no config or index comes near it, and one that does is not downloaded."""


def remote_checkpoint(client: Client, at: Snapshot, files: Mapping[str, RemoteFile]) -> Checkpoint:
    """The headers, index and config of a commit, without a weight; the checkpoint's directory is only a name.

    Args:
        client: Who asks.
        at: The commit.
        files: Its files.

    Raises:
        HubError: A file cannot be read.
        CheckpointError: It has no safetensors weights, or broken ones.
    """
    where = Path(str(at))
    config = read_config(small(client, at, files, CONFIG)) if CONFIG in files else None
    if SINGLE in files and INDEX in files:
        raise CheckpointError(
            "two sets of weights",
            where=where,
            found=f"{SINGLE} beside {INDEX}",
            hint="loaders take the single file and ignore the shards",
        )
    if INDEX in files:
        location = weight_map(small(client, at, files, INDEX), where / INDEX)
        missing = next((file for file in location.values() if file not in files), None)
        if missing is not None:
            raise CheckpointError("the index names a shard that is not there", where=where, expected=missing)
        return indexed(where, remote_headers(client, at, dict.fromkeys(location.values())), location, config)
    file = SINGLE if SINGLE in files else _only_file(files, where)
    header = remote_header(client, at, file)
    return Checkpoint(where, {file: header}, dict.fromkeys(header.entries, file), config, indexed=False)


def small(client: Client, at: Snapshot, files: Mapping[str, RemoteFile], name: str) -> Path:
    """A small file in the Hub cache; one that is not small is refused before it comes.

    Raises:
        HubError: So.
    """
    if files[name].size > MAX_SMALL:
        raise HubError(
            "a file is too large for what it is",
            where=f"{at}/{name}",
            found=f"{files[name].size} bytes",
            expected=f"at most {MAX_SMALL}",
        )
    return client.fetch(at, name)


def remote_headers(client: Client, at: Snapshot, names: Iterable[str]) -> dict[str, Header]:
    """The headers of several files, some at a time."""
    listed = list(names)
    with ThreadPoolExecutor(_WORKERS) as pool:
        return dict(zip(listed, pool.map(lambda name: remote_header(client, at, name), listed), strict=True))


def remote_header(client: Client, at: Snapshot, name: str) -> Header:
    """The header of a safetensors file on the Hub, read as strictly as one on disk.

    Raises:
        CheckpointError: It is no safetensors file.
        HubError: It cannot be read.
    """
    return read_remote(client, at, name)[0]


def read_remote(client: Client, at: Snapshot, name: str) -> tuple[Header, bytes, int]:
    """A file's header, the bytes that it stands in, and the size of the whole file."""
    path = Path(str(at)) / name
    data, total = client.piece(at, name, 0, _FIRST)
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > MAX_HEADER or 8 + length > total:
        raise CheckpointError(
            "not a safetensors file, or cut short",
            where=path,
            found=f"{total} bytes",
            expected="a header of safetensors' format",
        )
    if len(data) < 8 + length:
        data += client.piece(at, name, len(data), 8 + length - len(data))[0]
    head = data[: 8 + length]
    return parse_header(head[8:], total, path), head, total


def _only_file(files: Mapping[str, RemoteFile], where: Path) -> str:
    names = sorted(name for name in files if name.endswith(".safetensors") and is_plain_name(name))
    if "adapter_model.safetensors" in names:
        raise CheckpointError(
            "an adapter, where a model was expected",
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

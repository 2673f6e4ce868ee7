"""Hashes of whole files: recorded by a merge with ``hashes=True``, compared by ``verify --full``.

A merge does not read the files that it copies, so it records no hashes unless asked to. For a downloaded file the Hub's
metadata gives a second source. A file that a later merge changed is compared with neither.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedsurgery.checkpoints.records import parse_record, read_facts, record_paths
from embedsurgery.checkpoints.stack import read_tombstones
from embedsurgery.errors import CheckpointError, PlanError
from embedsurgery.files.locking import STATE_DIRECTORY
from embedsurgery.files.regular import open_regular

_SKIPPED = (STATE_DIRECTORY, ".cache", ".git")
_HEX = re.compile("[0-9a-f]{64}")
_CHUNK = 8 << 20
_MAX_METADATA = 4096


@dataclass(frozen=True)
class KnownHash:
    """The hash that a file should have.

    Attributes:
        sha256: In hex.
        source: Who recorded it, for messages.
    """

    sha256: str
    source: str


def hash_files(directory: Path) -> dict[str, str]:
    """Hash every file of a checkpoint, except what embedsurgery and the Hub's client keep there.

    Returns:
        Path -> sha256 in hex.

    Raises:
        CheckpointError: A file is not a regular file, or cannot be read.
    """
    return {path: sha256_of(directory / path) for path in checkpoint_files(directory)}


def checkpoint_files(directory: Path) -> list[str]:
    """The paths that `hash_files` covers, sorted."""
    return sorted(_walk_files(directory, ""))


def _walk_files(directory: Path, prefix: str) -> Iterator[str]:
    for path in (directory / prefix).iterdir():
        name = f"{prefix}{path.name}"
        if name in _SKIPPED:
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _walk_files(directory, f"{name}/")
        elif not path.is_dir():
            yield name


def sha256_of(path: Path) -> str:
    """The sha256 of a regular file in hex."""
    digest = hashlib.sha256()
    with open_regular(path) as descriptor, open(descriptor, "rb", buffering=0, closefd=False) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def known_hashes(directory: Path) -> dict[str, KnownHash]:
    """Path -> the hash that the file should have, for files with a recorded hash that is still valid.

    Raises:
        CheckpointError, PlanError: A record is broken.
    """
    known: dict[str, KnownHash] = {}
    changed_later: set[str] = set()
    removed = dict(read_tombstones(directory))
    for path in reversed(record_paths(directory)):
        facts = read_facts(path)
        record = parse_record(path, facts)
        # Unmerging an earlier merge also changes its files after this record was made.
        changed_since = changed_later.union(*(files for number, files in removed.items() if number < record.number))
        for name, digest in _recorded_hashes(facts, path).items():
            if name not in changed_since:
                known.setdefault(name, KnownHash(digest, record.label))
        changed_later.update(record.files)
    for name in checkpoint_files(directory):
        etag = None if name in changed_later else _hub_sha256(directory, name)
        if etag is not None:
            known.setdefault(name, KnownHash(etag, "the Hub"))
    return known


def _recorded_hashes(facts: Mapping[str, Any], path: Path) -> dict[str, str]:
    hashes = facts.get("sha256", {})
    if not isinstance(hashes, dict) or not all(isinstance(h, str) and _HEX.fullmatch(h) for h in hashes.values()):
        raise PlanError("file hashes of the record are broken", where=path, expected="path -> sha256 in hex")
    return hashes


def _hub_sha256(directory: Path, name: str) -> str | None:
    """The sha256 that huggingface_hub noted for a large file, or None.

    Its cache names large files by their sha256. A download into a directory leaves a note of three lines (commit, etag,
    time), and the etag of a large file is its sha256. A small file's etag is a git hash, which is shorter.
    """
    path = directory / name
    if path.is_symlink():
        target = path.resolve()
        return target.name if target.parent.name == "blobs" and _HEX.fullmatch(target.name) else None
    note = directory / ".cache" / "huggingface" / "download" / f"{name}.metadata"
    try:
        with open_regular(note) as descriptor, open(descriptor, "rb", closefd=False) as file:
            lines = file.read(_MAX_METADATA).decode("ascii", "replace").split("\n")
    except CheckpointError:
        return None
    etag = lines[1].strip() if len(lines) > 1 else ""
    return etag if _HEX.fullmatch(etag) else None

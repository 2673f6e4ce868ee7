"""Hashes of whole files: taken when a merge is asked to, and compared by ``verify --full``.

A merge does not read what it copies, so it knows no hash of it unless it is told to take one. What else is known of a
file is what the Hub said when it was downloaded. A file that a merge has touched since is compared with neither.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedsurgery.checkpoints.records import facts_of, merge_record, record_paths
from embedsurgery.checkpoints.stack import taken_from_under
from embedsurgery.errors import CheckpointError, PlanError
from embedsurgery.files.regular import open_regular
from embedsurgery.stores.checkpoint import STATE_DIRECTORY

_SKIPPED = (STATE_DIRECTORY, ".cache", ".git")
_HEX = re.compile("[0-9a-f]{64}")
_CHUNK = 8 << 20
_MOST_METADATA = 4096


@dataclass(frozen=True)
class Known:
    """The hash that a file should have.

    Attributes:
        sha256: In hex.
        source: Who says so.
    """

    sha256: str
    source: str


def file_hashes(directory: Path) -> dict[str, str]:
    """Path -> sha256 in hex, of every file of a checkpoint but those that embedsurgery and the Hub's client keep.

    Raises:
        CheckpointError: One of them is no regular file, or cannot be read.
    """
    return {path: sha256_of(directory / path) for path in checkpoint_files(directory)}


def checkpoint_files(directory: Path) -> list[str]:
    """The paths that `file_hashes` is of, in order."""
    return sorted(_files(directory, ""))


def _files(directory: Path, prefix: str) -> Iterator[str]:
    for path in (directory / prefix).iterdir():
        name = f"{prefix}{path.name}"
        if name in _SKIPPED:
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _files(directory, f"{name}/")
        elif not path.is_dir():
            yield name


def sha256_of(path: Path) -> str:
    """Of a regular file's bytes, read once."""
    digest = hashlib.sha256()
    with open_regular(path) as descriptor, open(descriptor, "rb", buffering=0, closefd=False) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def known_hashes(directory: Path) -> dict[str, Known]:
    """Path -> the hash that a file should have, of those where something that still holds says so.

    Raises:
        CheckpointError, PlanError: A record is broken.
    """
    found: dict[str, Known] = {}
    later: set[str] = set()
    under = dict(taken_from_under(directory))
    for path in reversed(record_paths(directory)):
        said = facts_of(path)
        record = merge_record(path, said)
        since = later.union(*(files for number, files in under.items() if number < record.number))
        for name, digest in _recorded(said, path).items():
            if name not in since:
                found.setdefault(name, Known(digest, record.label))
        later.update(record.files)
    for name in checkpoint_files(directory):
        etag = None if name in later else _from_hub(directory, name)
        if etag is not None:
            found.setdefault(name, Known(etag, "the Hub"))
    return found


def _recorded(said: Mapping[str, Any], path: Path) -> dict[str, str]:
    hashes = said.get("sha256", {})
    if not isinstance(hashes, dict) or not all(isinstance(h, str) and _HEX.fullmatch(h) for h in hashes.values()):
        raise PlanError("a record whose hashes of files are none", where=path)
    return hashes


def _from_hub(directory: Path, name: str) -> str | None:
    """What huggingface_hub noted of a file: in its cache large files are named by their hash, and a download into a
    directory leaves a note of three lines, commit, etag and time; a large file's etag is its hash.
    """
    path = directory / name
    if path.is_symlink():
        target = path.resolve()
        return target.name if target.parent.name == "blobs" and _HEX.fullmatch(target.name) else None
    note = directory / ".cache" / "huggingface" / "download" / f"{name}.metadata"
    try:
        with open_regular(note) as descriptor, open(descriptor, "rb", closefd=False) as file:
            lines = file.read(_MOST_METADATA).decode("ascii", "replace").split("\n")
    except CheckpointError:
        return None
    etag = lines[1].strip() if len(lines) > 1 else ""
    return etag if _HEX.fullmatch(etag) else None

"""What is asked of the Hub: a revision's commit, what files it has, a file, a piece of a file.

Everything goes through huggingface_hub's own client, so HF_ENDPOINT, HF_TOKEN, the stored login, HF_HOME,
HF_HUB_OFFLINE, its cache and its retries are as everywhere. Each file is checked against its hash, which the client
leaves to the transport.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, hf_hub_url, try_to_load_from_cache
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # exported lazily, which mypy does not see
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
)

from embedsurgery._version import __version__
from embedsurgery.errors import HubError
from embedsurgery.hub.auth import Token, chosen
from embedsurgery.hub.faults import faults
from embedsurgery.hub.ids import HubId

_NAME = "embedsurgery"
_TRIES = 3
_TIMEOUT = 30


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub lists it.

    Attributes:
        path: In the repository.
        size: In bytes.
        sha256: Of its bytes, for a large file; None for one that git itself holds.
        git_oid: The blob's name in git: of its bytes, or of the pointer to a large file.
        xet: The large file's name in the Hub's content store, without which the Hub copies it nowhere.
    """

    path: str
    size: int
    sha256: str | None
    git_oid: str
    xet: str | None = None

    def holds(self, content: bytes | Path) -> bool:
        """Whether these are its bytes, or those of a file."""
        if self.sha256 is None:
            return _git_oid(content.read_bytes() if isinstance(content, Path) else content) == self.git_oid
        if isinstance(content, bytes):
            return hashlib.sha256(content).hexdigest() == self.sha256
        with open(content, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit: what every file is taken from once a revision was resolved.

    Attributes:
        repo: ``org/name``.
        sha: The commit, 40 hex digits.
    """

    repo: str
    sha: str

    def __str__(self) -> str:
        return f"{self.repo}@{self.sha[:12]}"


class Client:
    """The Hub, to one user.

    Args:
        token: See `Token`; None for that of `using_token`.
    """

    def __init__(self, token: Token = None) -> None:
        self.api = HfApi(token=chosen(token), library_name=_NAME, library_version=__version__)

    def resolve(self, of: HubId) -> Snapshot:
        """The commit that an id means now; without a connection, the one that it meant last.

        Raises:
            HubError: There is no such repository or revision, or none that may be seen.
        """
        with faults(str(of), "find the revision"):
            sha = str(self.api.resolve_revision(of.repo, revision=of.revision).resolved)
        if not re.fullmatch("[0-9a-f]{40}", sha):  # it becomes a directory's name
            raise HubError("the Hub names no commit", where=of, expected="40 hex digits", found=repr(sha)[:80])
        return Snapshot(of.repo, sha)

    def files(self, at: Snapshot, *, everything: bool = False) -> dict[str, RemoteFile]:
        """The files at the top of a repository, or all of them, by path.

        Raises:
            HubError: A file's name is no path inside the repository.
        """
        with faults(str(at), "list the files"):
            listed = list(self.api.list_repo_tree(at.repo, revision=at.sha, recursive=everything))
        found = [_remote(item) for item in listed if isinstance(item, RepoFile)]
        for file in found:
            check_path(file.path, at)
        return {file.path: file for file in found}

    def named(self, at: Snapshot, names: Iterable[str]) -> dict[str, RemoteFile]:
        """Those of some files that are there, by path."""
        asked = list(names)
        with faults(str(at), "look for files"):
            listed = self.api.get_paths_info(at.repo, asked, revision=at.sha)
        return {item.path: _remote(item) for item in listed if isinstance(item, RepoFile) and item.path in asked}

    def cached(self, at: Snapshot, name: str) -> Path | None:
        """A file's path in the Hub cache, None where it is not there."""
        path = try_to_load_from_cache(at.repo, name, revision=at.sha)
        return Path(path) if isinstance(path, str) else None

    def fetch(self, at: Snapshot, name: str) -> Path:
        """A file's path in the Hub cache, downloaded where it is not there yet, and checked against its hash.

        Raises:
            HubError: It is not there, or what came is not what the Hub promised; then nothing is kept of it.
        """
        where = f"{at}/{name}"
        with faults(where, "download"):
            path = Path(self.api.hf_hub_download(at.repo, name, revision=at.sha))
            blob = path.parent / path.readlink() if path.is_symlink() else path
            if _is_intact(blob):
                return path
            for part in (blob.resolve(), blob, path):  # the entry may be a link to what several repositories share
                part.unlink(missing_ok=True)
        raise HubError(
            "a download has the wrong hash",
            where=where,
            expected=blob.name[:12],
            hint="it was removed from the Hub cache: try again",
        )

    def piece(self, at: Snapshot, name: str, start: int, size: int) -> tuple[bytes, int]:
        """Up to ``size`` bytes of a file from ``start``, and the size of the whole file.

        Raises:
            HubError: It is not there, or the Hub does not give pieces.
        """
        where = f"{at}/{name}"
        url = hf_hub_url(at.repo, name, revision=at.sha, endpoint=self.api.endpoint)
        own = build_hf_headers(token=self.api.token, library_name=_NAME, library_version=__version__)
        headers = {**own, "Range": f"bytes={start}-{start + size - 1}", "Accept-Encoding": "identity"}
        with faults(where, "read"):
            for left in reversed(range(_TRIES)):
                try:
                    return self._piece(url, headers, start, size, where)
                except (httpx2.RemoteProtocolError, httpx2.NetworkError, httpx2.TimeoutException) as error:
                    if left == 0 or isinstance(error, httpx2.ConnectError):
                        raise
        raise AssertionError

    def _piece(self, url: str, headers: Mapping[str, str], start: int, size: int, where: str) -> tuple[bytes, int]:
        """One try. The body is streamed, so that a server without ranges cannot send gigabytes."""
        with http_stream_backoff(
            "GET", url, headers=headers, timeout=_TIMEOUT, retry_on_exceptions=(), max_retries=_TRIES
        ) as response:
            hf_raise_for_status(response)
            place = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", ""))
            if response.status_code != 206 or place is None or int(place[1]) != start:
                raise HubError(
                    "the server gives no pieces of files",
                    where=where,
                    expected="206 Partial Content",
                    found=response.status_code,
                    hint="download the repository instead",
                )
            expected = int(place[2]) + 1 - start
            data = bytearray()
            for chunk in response.iter_raw():
                data += chunk
                if len(data) > size:
                    break
        if len(data) != expected or expected > size:
            raise HubError(
                "a piece of a file has the wrong size",
                where=where,
                expected=expected,
                found=len(data),
                hint="try again",
            )
        return bytes(data), int(place[3])


def check_path(path: str, at: Snapshot) -> None:
    """Refuse a name that leads out of the directory that it would be written to, or into git's or ours.

    Raises:
        HubError: So.
    """
    parts = path.split("/")
    if any(p in ("", ".", "..", ".git") for p in parts) or re.search(r"[\\\0-\x1f]|^[A-Za-z]:", path):
        raise HubError(
            "a repository with a file name that is no plain path",
            where=at,
            found=repr(path)[:120],
            hint="do not use this repository",
        )


def _remote(item: RepoFile) -> RemoteFile:
    large = item.lfs
    size = item.size if large is None else large.size
    return RemoteFile(item.path, size, None if large is None else large.sha256, item.blob_id, item.xet_hash)


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _is_intact(blob: Path) -> bool:
    """Whether an entry of the cache is what its name says: sha256 for large files, git's hash for small ones."""
    if re.fullmatch("[0-9a-f]{64}", blob.name):
        with open(blob, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == blob.name
    if re.fullmatch("[0-9a-f]{40}", blob.name):
        return _git_oid(blob.read_bytes()) == blob.name
    return True  # a file system without links keeps no hash

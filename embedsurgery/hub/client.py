"""Requests to the Hub: the commit of a revision, the files that it has, a file, a byte range of a file.

Everything goes through huggingface_hub's own client, so HF_ENDPOINT, HF_TOKEN, the stored login, HF_HOME,
HF_HUB_OFFLINE, the cache and the retries work as elsewhere. Each downloaded file is checked against its hash, which
huggingface_hub leaves to the transport.
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
from embedsurgery.hub.auth import Token, resolve_token
from embedsurgery.hub.faults import translate_errors
from embedsurgery.hub.ids import HubId

_NAME = "embedsurgery"
_TRIES = 3
_TIMEOUT = 30
"""In seconds."""


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub lists it.

    Attributes:
        path: Its path in the repository.
        size: Its size in bytes.
        sha256: The hash of a large file's bytes; None for a small file, whose bytes git stores.
        git_oid: The hash of its git blob: the file's bytes, or the pointer to a large file.
        xet: A large file's hash in the Hub's content store. The Hub copies no large file without one.
    """

    path: str
    size: int
    sha256: str | None
    git_oid: str
    xet: str | None = None

    def matches(self, content: bytes | Path) -> bool:
        """Whether the file has this content: bytes, or the bytes of a local file."""
        if self.sha256 is None:
            return _git_oid(content.read_bytes() if isinstance(content, Path) else content) == self.git_oid
        if isinstance(content, bytes):
            return hashlib.sha256(content).hexdigest() == self.sha256
        with open(content, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit. A revision is resolved once, and all files are taken from that commit.

    Attributes:
        repo: ``org/name``.
        sha: The commit, 40 hex digits.
    """

    repo: str
    sha: str

    def __str__(self) -> str:
        return f"{self.repo}@{self.sha[:12]}"


class Client:
    """The Hub as one user sees it.

    Args:
        token: See `Token`; None for that of `using_token`.
    """

    def __init__(self, token: Token = None) -> None:
        self.api = HfApi(token=resolve_token(token), library_name=_NAME, library_version=__version__)

    def resolve(self, hub_id: HubId) -> Snapshot:
        """Resolve an id to a commit; without a connection, to the commit that it last resolved to.

        Raises:
            HubError: The repository or revision does not exist, or the token cannot see it.
        """
        with translate_errors(str(hub_id), "find the revision"):
            sha = str(self.api.resolve_revision(hub_id.repo, revision=hub_id.revision).resolved)
        if not re.fullmatch("[0-9a-f]{40}", sha):  # it becomes a directory's name
            raise HubError(
                "the Hub returned no commit hash", where=hub_id, expected="40 hex digits", found=repr(sha)[:80]
            )
        return Snapshot(hub_id.repo, sha)

    def list_files(self, snapshot: Snapshot, *, everything: bool = False) -> dict[str, RemoteFile]:
        """List the files at the top of a repository, or all of them, by path.

        Raises:
            HubError: The request fails, or a file's name is not a path inside the repository.
        """
        with translate_errors(str(snapshot), "list the files"):
            items = list(self.api.list_repo_tree(snapshot.repo, revision=snapshot.sha, recursive=everything))
        files = [_remote_file(item) for item in items if isinstance(item, RepoFile)]
        for file in files:
            check_path(file.path, snapshot)
        return {file.path: file for file in files}

    def find_files(self, snapshot: Snapshot, paths: Iterable[str]) -> dict[str, RemoteFile]:
        """Look up some files; those that do not exist are left out.

        Raises:
            HubError: The request fails.
        """
        wanted = list(paths)
        with translate_errors(str(snapshot), "look for files"):
            items = self.api.get_paths_info(snapshot.repo, wanted, revision=snapshot.sha)
        return {item.path: _remote_file(item) for item in items if isinstance(item, RepoFile) and item.path in wanted}

    def find_cached(self, snapshot: Snapshot, name: str) -> Path | None:
        """Find a file in the Hub cache, without a request; None where it is not there."""
        path = try_to_load_from_cache(snapshot.repo, name, revision=snapshot.sha)
        return Path(path) if isinstance(path, str) else None

    def fetch(self, snapshot: Snapshot, name: str) -> Path:
        """Return a file's path in the Hub cache, after downloading it if needed; its hash is checked either way.

        Raises:
            HubError: The file does not exist, or has the wrong hash; then it is removed from the cache.
        """
        where = f"{snapshot}/{name}"
        with translate_errors(where, "download"):
            path = Path(self.api.hf_hub_download(snapshot.repo, name, revision=snapshot.sha))
            blob = path.parent / path.readlink() if path.is_symlink() else path
            if _is_intact(blob):
                return path
            # With xet the blob is a link itself, into a store that several repositories share: remove its target too,
            # or the next download would take the same bytes.
            for part in (blob.resolve(), blob, path):
                part.unlink(missing_ok=True)
        raise HubError(
            "a downloaded file has the wrong hash",
            where=where,
            expected=blob.name[:12],
            hint="it was removed from the Hub cache: try again",
        )

    def read_range(self, snapshot: Snapshot, name: str, start: int, size: int) -> tuple[bytes, int]:
        """Read up to ``size`` bytes of a file from ``start``.

        Returns:
            The bytes, and the size of the whole file.

        Raises:
            HubError: The file does not exist, or the server does not serve byte ranges.
        """
        where = f"{snapshot}/{name}"
        url = hf_hub_url(snapshot.repo, name, revision=snapshot.sha, endpoint=self.api.endpoint)
        own = build_hf_headers(token=self.api.token, library_name=_NAME, library_version=__version__)
        headers = {**own, "Range": f"bytes={start}-{start + size - 1}", "Accept-Encoding": "identity"}
        with translate_errors(where, "read"):
            # http_stream_backoff retries refused requests only; a connection lost within the body is retried here.
            for left in reversed(range(_TRIES)):
                try:
                    return self._request_range(url, headers, start, size, where)
                except (httpx2.RemoteProtocolError, httpx2.NetworkError, httpx2.TimeoutException) as error:
                    if left == 0 or isinstance(error, httpx2.ConnectError):
                        raise
        raise AssertionError

    def _request_range(
        self, url: str, headers: Mapping[str, str], start: int, size: int, where: str
    ) -> tuple[bytes, int]:
        # Streamed: a server that ignores Range would otherwise send the whole file, which may be gigabytes.
        with http_stream_backoff(
            "GET", url, headers=headers, timeout=_TIMEOUT, retry_on_exceptions=(), max_retries=_TRIES
        ) as response:
            hf_raise_for_status(response)
            match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", ""))
            if response.status_code != 206 or match is None or int(match[1]) != start:
                raise HubError(
                    "the server does not serve byte ranges",
                    where=where,
                    expected="206 Partial Content",
                    found=response.status_code,
                    hint="download the repository instead",
                )
            expected = int(match[2]) + 1 - start
            data = bytearray()
            for chunk in response.iter_raw():
                data += chunk
                if len(data) > size:
                    break
        if len(data) != expected or expected > size:
            raise wrong_range_size(where, expected, len(data))
        return bytes(data), int(match[3])


def wrong_range_size(where: str, expected: int, found: int) -> HubError:
    """Return the error for a byte range of the wrong size."""
    return HubError(
        "a byte range has the wrong size",
        where=where,
        expected=f"{expected} bytes",
        found=f"{found} bytes",
        hint="try again",
    )


def check_path(path: str, snapshot: Snapshot) -> None:
    """Refuse a file name that leads out of the directory that it would be written to, or into ``.git``.

    Raises:
        HubError: The name does so.
    """
    parts = path.split("/")
    if any(p in ("", ".", "..", ".git") for p in parts) or re.search(r"[\\\0-\x1f]|^[A-Za-z]:", path):
        raise HubError(
            "unsafe file name in a repository",
            where=snapshot,
            expected="a relative path inside the repository",
            found=repr(path)[:120],
            hint="do not use this repository",
        )


def _remote_file(item: RepoFile) -> RemoteFile:
    large = item.lfs
    size = item.size if large is None else large.size
    return RemoteFile(item.path, size, None if large is None else large.sha256, item.blob_id, item.xet_hash)


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _is_intact(blob: Path) -> bool:
    """Whether a cache entry has the hash that is its name: sha256 for large files, git's hash for small ones."""
    if re.fullmatch("[0-9a-f]{64}", blob.name):
        with open(blob, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == blob.name
    if re.fullmatch("[0-9a-f]{40}", blob.name):
        return _git_oid(blob.read_bytes()) == blob.name
    return True  # on a file system without links the cache keeps no hash

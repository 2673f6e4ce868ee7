"""Repositories in memory: a commit's name is a hash of its tree, its parent and its message."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field

LARGE = (".safetensors", ".bin")


@dataclass(frozen=True)
class Blob:
    """A file's bytes, large or in git."""

    data: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def git_oid(self) -> str:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        data = pointer.encode() if self.large else self.data
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


Tree = dict[str, Blob]


@dataclass
class Repo:
    """A repository: commits, what points at them, and who may see it."""

    private: bool
    gated: bool = False
    commits: dict[str, tuple[str | None, Tree, str]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    requests: dict[int, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    def commit(self, tree: Tree, parent: str | None, message: str) -> str:
        named = [parent, message, len(self.commits), sorted((path, blob.git_oid) for path, blob in tree.items())]
        sha = hashlib.sha1(json.dumps(named).encode()).hexdigest()
        self.commits[sha] = (parent, tree, message)
        return sha

    def find(self, revision: str) -> str | None:
        match = re.fullmatch(r"refs/pr/(\d+)", revision)
        if match:
            return self.requests.get(int(match[1]))
        known = {**{sha: sha for sha in self.commits}, **self.tags, **self.branches}
        return known.get(revision)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path -> bytes at a revision, for a test to look at."""
        return {path: blob.data for path, blob in self.commits[self.find(revision) or ""][1].items()}

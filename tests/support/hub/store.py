"""Repositories as bare git repositories: trees, commits, pointers and refs are git's own, made with its plumbing.

A large file is an LFS pointer in git, and its bytes lie where git-lfs keeps them, in ``lfs/objects`` beside git's
objects. What git has no place for, who may see a repository, is an attribute of `Repo`.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

LARGE = (".safetensors", ".bin")
NONE = "0" * 40
"""What ``git update-ref`` takes for a ref that is not there."""

_WHO = {"NAME": "loopback", "EMAIL": "loopback@localhost", "DATE": "2026-01-01T00:00:00Z"}
_ENVIRONMENT = {"PATH": os.environ["PATH"], "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
_ENVIRONMENT |= {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in _WHO.items()}


@dataclass(frozen=True)
class Blob:
    """A file of a tree.

    Attributes:
        git_oid: Its object in git: its bytes, or the pointer to them.
        size: Of its bytes.
        sha256: Of its bytes, where it is large.
    """

    git_oid: str
    size: int
    sha256: str | None = None


class Repo:
    """A repository.

    Args:
        folder: Where it is made.
        private: Whether only who has a token sees it.
        gated: Whether its files are kept from readers.
    """

    def __init__(self, folder: Path, *, private: bool = False, gated: bool = False) -> None:
        self.folder, self.private, self.gated = folder, private, gated
        self._trees: dict[str, dict[str, Blob]] = {}  # a commit never changes
        folder.mkdir(parents=True)
        self.git("init", "--bare", "--quiet", "--initial-branch=main", "--template=")

    def git(self, *arguments: str, data: bytes = b"") -> bytes:
        """What a git command prints; it fails where git does."""
        done = subprocess.run(
            ["git", "-C", str(self.folder), *arguments], input=data, capture_output=True, check=False, env=_ENVIRONMENT
        )
        if done.returncode:
            raise GitError(done.stderr.decode())
        return done.stdout

    def refs(self, kind: str) -> dict[str, str]:
        """Name -> commit of all refs of a kind: heads, tags, pr."""
        listed = self.git("for-each-ref", "--format=%(refname:lstrip=2) %(objectname)", f"refs/{kind}/")
        return dict(line.split() for line in listed.decode().splitlines())

    @property
    def branches(self) -> dict[str, str]:
        return self.refs("heads")

    @property
    def tags(self) -> dict[str, str]:
        return self.refs("tags")

    @property
    def requests(self) -> dict[int, str]:
        return {int(number): sha for number, sha in self.refs("pr").items()}

    def point(self, ref: str, sha: str, old: str | None) -> bool:
        """Move a ref from where it was seen last, None for nowhere; False where somebody has moved it since."""
        try:
            self.git("update-ref", ref, sha, old or NONE)
        except GitError:
            return False
        return True

    def find(self, revision: str) -> str | None:
        """The commit that a branch, a tag, ``refs/pr/N`` or a whole commit name means."""
        known = {**self.tags, **self.branches, **{f"refs/pr/{n}": sha for n, sha in self.requests.items()}}
        if revision in known or not re.fullmatch("[0-9a-f]{40}", revision):
            return known.get(revision)
        try:
            return self.git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}").decode().strip()
        except GitError:
            return None

    @property
    def commits(self) -> list[str]:
        """Every commit that a ref leads to."""
        return self.git("rev-list", "--all").decode().split()

    def parent(self, sha: str) -> str:
        return self.git("rev-parse", f"{sha}^").decode().strip()

    def message(self, sha: str) -> str:
        return self.git("log", "-1", "--format=%B", sha).decode().strip()

    def tree(self, sha: str) -> dict[str, Blob]:
        """Path -> file, of a commit."""
        if sha not in self._trees:
            listed = self.git("ls-tree", "-r", "-l", "-z", "--full-tree", sha).decode().split("\0")[:-1]
            self._trees[sha] = {
                path: self._blob(path, *facts.split()[2:])
                for facts, _, path in (line.partition("\t") for line in listed)
            }
        return self._trees[sha]

    def _blob(self, path: str, oid: str, size: str) -> Blob:
        if not path.endswith(LARGE) or int(size) > 200:
            return Blob(oid, int(size))
        pointer = re.search(rb"^oid sha256:(\w+)\nsize (\d+)$", self.git("cat-file", "blob", oid), re.MULTILINE)
        return Blob(oid, int(pointer[2]), pointer[1].decode()) if pointer else Blob(oid, int(size))

    def read(self, blob: Blob) -> bytes:
        """A file's bytes."""
        if blob.sha256 is None:
            return self.git("cat-file", "blob", blob.git_oid)
        return self.large(blob.sha256).read_bytes()

    def large(self, sha256: str) -> Path:
        """Where the bytes of a large file lie, or are to lie."""
        return self.folder / "lfs" / "objects" / sha256[:2] / sha256[2:4] / sha256

    def keep(self, data: bytes) -> str:
        """Put a large file's bytes beside git; their sha256."""
        sha256 = hashlib.sha256(data).hexdigest()
        place = self.large(sha256)
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
        return sha256

    def small_object(self, data: bytes) -> str:
        """Bytes as an object of git's."""
        return self.git("hash-object", "-w", "--stdin", data=data).decode().strip()

    def pointer_object(self, sha256: str) -> str:
        """An LFS pointer to bytes that are kept, as an object of git's."""
        size = self.large(sha256).stat().st_size
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        return self.small_object(text.encode())

    def commit(self, changes: Mapping[str, str], parent: str | None, message: str) -> str:
        """A commit with these objects at these paths and all else as in its parent; no ref leads to it yet."""
        before = {path: blob.git_oid for path, blob in self.tree(parent).items()} if parent else {}
        parents = ("-p", parent) if parent else ()
        tree = self._made({**before, **changes})
        return self.git("commit-tree", *parents, "-m", message, tree).decode().strip()

    def _made(self, files: Mapping[str, str]) -> str:
        """A tree object: path -> object."""
        lines, below = [], {}
        for path, oid in files.items():
            name, _, rest = path.partition("/")
            if rest:
                below.setdefault(name, {})[rest] = oid
            else:
                lines.append(f"100644 blob {oid}\t{name}")
        lines += [f"040000 tree {self._made(inner)}\t{name}" for name, inner in below.items()]
        return self.git("mktree", "-z", data="".join(f"{line}\0" for line in lines).encode()).decode().strip()

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path -> bytes at a revision, for a test to look at."""
        return {path: self.read(blob) for path, blob in self.tree(self.find(revision) or "").items()}


class GitError(Exception):
    """A git command failed; what it said."""

"""Repositories of the loopback Hub as bare git repositories, changed by git's plumbing commands.

A large file is an LFS pointer in git; its bytes are where git-lfs keeps them, in ``lfs/objects``. Who may see a
repository is an attribute of `Repo`, since git does not store it.
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
"""The old value that ``git update-ref`` takes for a new ref."""

_WHO = {"NAME": "loopback", "EMAIL": "loopback@localhost", "DATE": "2026-01-01T00:00:00Z"}
_ENVIRONMENT = {"PATH": os.environ["PATH"], "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
_ENVIRONMENT |= {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in _WHO.items()}


@dataclass(frozen=True)
class Blob:
    """A file of a tree.

    Attributes:
        git_oid: The hash of its git object: its bytes, or the pointer to them.
        size: The size of its bytes.
        sha256: The hash of its bytes, if it is large.
    """

    git_oid: str
    size: int
    sha256: str | None = None


class Repo:
    """A repository.

    Args:
        folder: Its directory, which is created.
        private: Whether it is only visible with a token.
        gated: Whether its files need the writer's token.
    """

    def __init__(self, folder: Path, *, private: bool = False, gated: bool = False) -> None:
        self.folder, self.private, self.gated = folder, private, gated
        self._trees: dict[str, dict[str, Blob]] = {}  # a commit never changes
        folder.mkdir(parents=True)
        self.git("init", "--bare", "--quiet", "--initial-branch=main", "--template=")

    def git(self, *arguments: str, data: bytes = b"") -> bytes:
        """Run a git command; returns its output."""
        done = subprocess.run(
            ["git", "-C", str(self.folder), *arguments], input=data, capture_output=True, check=False, env=_ENVIRONMENT
        )
        if done.returncode:
            raise GitError(done.stderr.decode())
        return done.stdout

    def refs(self, kind: str) -> dict[str, str]:
        """Return name -> commit of all refs of a kind: heads, tags, pr."""
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
        """Move a ref from its old commit, None for a new ref; False if it was moved since."""
        try:
            self.git("update-ref", ref, sha, old or NONE)
        except GitError:
            return False
        return True

    def find(self, revision: str) -> str | None:
        """Resolve a branch, a tag, ``refs/pr/N`` or a full commit hash; None if there is none."""
        known = {**self.tags, **self.branches, **{f"refs/pr/{n}": sha for n, sha in self.requests.items()}}
        if revision in known or not re.fullmatch("[0-9a-f]{40}", revision):
            return known.get(revision)
        try:
            return self.git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}").decode().strip()
        except GitError:
            return None

    @property
    def commits(self) -> list[str]:
        """All commits that a ref reaches."""
        return self.git("rev-list", "--all").decode().split()

    def parent(self, sha: str) -> str:
        return self.git("rev-parse", f"{sha}^").decode().strip()

    def message(self, sha: str) -> str:
        return self.git("log", "-1", "--format=%B", sha).decode().strip()

    def tree(self, sha: str) -> dict[str, Blob]:
        """Return path -> file of a commit."""
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
        """Return a file's bytes."""
        if blob.sha256 is None:
            return self.git("cat-file", "blob", blob.git_oid)
        return self.large(blob.sha256).read_bytes()

    def large(self, sha256: str) -> Path:
        """Return the path of a large file's bytes."""
        return self.folder / "lfs" / "objects" / sha256[:2] / sha256[2:4] / sha256

    def keep(self, data: bytes) -> str:
        """Store a large file's bytes; returns their sha256."""
        sha256 = hashlib.sha256(data).hexdigest()
        path = self.large(sha256)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return sha256

    def small_object(self, data: bytes) -> str:
        """Store bytes as a git object; returns its hash."""
        return self.git("hash-object", "-w", "--stdin", data=data).decode().strip()

    def pointer_object(self, sha256: str) -> str:
        """Store an LFS pointer to stored bytes as a git object; returns its hash."""
        size = self.large(sha256).stat().st_size
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        return self.small_object(text.encode())

    def commit(self, changes: Mapping[str, str], parent: str | None, message: str) -> str:
        """Commit changes (path -> git object) to the parent's files; returns the commit, which no ref names yet."""
        before = {path: blob.git_oid for path, blob in self.tree(parent).items()} if parent else {}
        parents = ("-p", parent) if parent else ()
        tree = self._write_tree({**before, **changes})
        return self.git("commit-tree", *parents, "-m", message, tree).decode().strip()

    def _write_tree(self, files: Mapping[str, str]) -> str:
        """Store a tree of path -> git object; returns its hash."""
        lines, below = [], {}
        for path, oid in files.items():
            name, _, rest = path.partition("/")
            if rest:
                below.setdefault(name, {})[rest] = oid
            else:
                lines.append(f"100644 blob {oid}\t{name}")
        lines += [f"040000 tree {self._write_tree(inner)}\t{name}" for name, inner in below.items()]
        return self.git("mktree", "-z", data="".join(f"{line}\0" for line in lines).encode()).decode().strip()

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Return path -> bytes of all files at a revision."""
        return {path: self.read(blob) for path, blob in self.tree(self.find(revision) or "").items()}


class GitError(Exception):
    """A git command failed, with its error output."""

"""The loopback Hub itself: its repositories are git repositories."""

from __future__ import annotations

import subprocess
from pathlib import Path

import embedsurgery as es
from embedsurgery.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME
from tests.support.hub.loopback import Hub
from tests.support.hub.repositories import REPO
from tests.support.hub.store import Repo


def test_what_was_pushed_is_a_repository_that_git_clones(hub: Hub, adapter: es.Adapter, tmp_path: Path) -> None:
    sha = es.push(adapter, REPO, tag="v1").sha
    repo = hub.repos[REPO]
    assert repo.git("fsck", "--strict", "--no-dangling") == b""
    subprocess.run(
        ["git", "clone", "--quiet", "--branch", "v1", repo.folder, tmp_path / "clone"], check=True, capture_output=True
    )
    folder = adapter.save(tmp_path / "saved")
    assert (tmp_path / "clone" / CONFIG_NAME).read_bytes() == (folder / CONFIG_NAME).read_bytes()
    pointer = (tmp_path / "clone" / WEIGHTS_NAME).read_text()
    weights = repo.tree(sha)[WEIGHTS_NAME]
    assert weights.sha256 is not None
    assert pointer == f"version https://git-lfs.github.com/spec/v1\noid sha256:{weights.sha256}\nsize {weights.size}\n"
    assert repo.large(weights.sha256).read_bytes() == (folder / WEIGHTS_NAME).read_bytes()


def test_a_pull_request_is_a_ref_beside_the_branch(hub: Hub, adapter: es.Adapter) -> None:
    head = hub.add(REPO, {"x": b""})
    request = es.push(adapter, REPO, create_pr=True)
    repo = hub.repos[REPO]
    assert repo.git("for-each-ref", "--format=%(refname) %(objectname)").decode().splitlines() == [
        f"refs/heads/main {head}",
        f"refs/pr/1 {request.sha}",
    ]
    assert repo.parent(request.sha) == head


def test_a_branch_moves_only_from_where_it_was_seen(tmp_path: Path) -> None:
    repo = Repo(tmp_path / "repo")
    one = repo.commit({"a/b/c": repo.small_object(b"1"), "a/d": repo.small_object(b"2")}, None, "one")
    assert repo.point("refs/heads/main", one, None)
    two = repo.commit({"a/d": repo.small_object(b"3")}, one, "two")
    assert repo.point("refs/heads/main", two, one)
    assert not repo.point("refs/heads/main", one, one)
    assert not repo.point("refs/tags/v1", one, two)
    assert repo.branches == {"main": two}
    assert repo.files() == {"a/b/c": b"1", "a/d": b"3"}
    assert repo.files(one) == {"a/b/c": b"1", "a/d": b"2"}

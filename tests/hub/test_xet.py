"""Push, pull and merge with xet, where hf_xet uses a local store of its own; and with xet installed but off."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import embedsurgery as es
from embedsurgery.adapters.adapter import WEIGHTS_NAME
from tests.support.comparing import contents
from tests.support.hub.answers import says, when
from tests.support.hub.loopback import Hub
from tests.support.hub.processes import run
from tests.support.hub.repositories import REPO
from tests.support.hub.xet import XetStore
from tests.support.processes import python

pytest.importorskip("hf_xet")

MERGED = "team/merged"
UPLOAD = "import sys, huggingface_hub as h; h.HfApi().upload_folder(repo_id=sys.argv[1], folder_path=sys.argv[2])"


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    with Hub(folder / "git", XetStore(folder / "xet")).running() as running:
        yield running


@pytest.fixture
def xet(env: dict[str, str]) -> dict[str, str]:
    kept = {key: value for key, value in env.items() if key != "HF_HUB_DISABLE_XET"}
    return {**kept, "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1"}  # the default takes minutes


def plain(hub: Hub) -> list[str]:
    """List the large files that were transferred whole by plain LFS."""
    return [r.path for r in hub.seen("(PUT|GET) .*signature") if "range" not in r.headers]


def test_push_and_pull(hub: Hub, adapter: es.Adapter, tmp_path: Path, xet: dict[str, str]) -> None:
    folder = adapter.save(tmp_path / "rows")
    done = run(xet, "push", folder, REPO)
    assert done.stderr == ""
    (token,) = {r.path for r in hub.seen("GET .*xet-write-token")}
    assert token == f"/api/models/{REPO}/xet-write-token/main"
    assert hub.repos[REPO].files()[WEIGHTS_NAME] == (folder / WEIGHTS_NAME).read_bytes()
    assert run(xet, "push", folder, REPO).stdout.startswith("unchanged")
    run({**xet, "HF_HOME": str(tmp_path / "fresh")}, "pull", REPO, "-o", tmp_path / "out")
    assert hub.seen("GET .*xet-read-token")
    assert (tmp_path / "out" / WEIGHTS_NAME).read_bytes() == (folder / WEIGHTS_NAME).read_bytes()
    assert not plain(hub)
    request = run(xet, "push", adapter_of(tmp_path), REPO, "--create-pr")
    assert f"{hub.url}/{REPO}/discussions/1" in request.stdout
    assert [r.path for r in hub.seen("GET .*xet-write-token.*create_pr=1")]


def adapter_of(tmp_path: Path) -> Path:
    from tests.support.models import tiny, trained

    return trained(tiny("llama-untied"), [9]).save(tmp_path / "other")


def test_merge_into_another_repository(
    hub: Hub, base: Path, pushed: str, adapter: es.Adapter, tmp_path: Path, xet: dict[str, str]
) -> None:
    """huggingface_hub uploads the base, so that its shards are in the content store."""
    run(xet, "push", adapter.save(tmp_path / "rows"), "team/probe")
    done = python(UPLOAD, "team/probe", base, env=xet)
    assert done.returncode == 0, done.stderr
    hub.log.clear()
    out = run(xet, "merge", "team/probe", REPO, "--push", MERGED).stdout
    assert any("copied" in line and "model-0000" in line for line in out.splitlines())
    es.merge_checkpoint(base, adapter, tmp_path / "local")
    local = contents(tmp_path / "local")
    remote = hub.repos[MERGED].files()
    weights = {name for name in local if name.endswith(".safetensors") and "/" not in name}
    assert {name: remote[name] for name in weights} == {name: local[name] for name in weights}
    assert not plain(hub)
    run({**xet, "HF_HOME": str(tmp_path / "fresh")}, "unmerge", MERGED, "-o", tmp_path / "back")
    back = contents(tmp_path / "back")
    assert all(back[name] == (base / name).read_bytes() for name in weights)


def test_off_is_off(hub: Hub, adapter: es.Adapter, tmp_path: Path, env: dict[str, str], xet: dict[str, str]) -> None:
    """Plain LFS pulls what hf_xet pushed, and the other way round."""
    folder = adapter.save(tmp_path / "rows")
    run(xet, "push", folder, REPO)
    hub.log.clear()
    run(env, "pull", REPO, "-o", tmp_path / "out")
    run(env, "push", adapter_of(tmp_path), "team/plain")
    assert not hub.seen("xet-(read|write)-token")
    assert len(plain(hub)) == 2
    hub.log.clear()
    run(xet, "pull", "team/plain", "-o", tmp_path / "two")
    assert len(plain(hub)) == 1
    assert (tmp_path / "two" / WEIGHTS_NAME).read_bytes() == (tmp_path / "other" / WEIGHTS_NAME).read_bytes()


def test_a_content_store_that_refuses(hub: Hub, adapter: es.Adapter, tmp_path: Path, xet: dict[str, str]) -> None:
    folder = adapter.save(tmp_path / "rows")
    for status in (403, 500):
        hub.rules.append(when("GET .*xet-write-token", says(status, "no")))
        done = run(xet, "push", folder, REPO, code=1)
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("embedsurgery: ")
        assert all(word in done.stderr for word in (REPO, "push"))
        assert len(hub.repos[REPO].commits) == 1
        hub.rules.clear()
    run(xet, "push", folder, REPO)
    hub.rules.append(when("GET .*xet-read-token", says(403, "no")))
    fresh = {**xet, "HF_HOME": str(tmp_path / "fresh")}
    done = run(fresh, "pull", REPO, "-o", tmp_path / "out", code=1)
    assert done.stderr.count("\n") == 1
    assert WEIGHTS_NAME in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_spoiled_file_of_the_shared_cache_is_seen(
    hub: Hub, adapter: es.Adapter, tmp_path: Path, xet: dict[str, str]
) -> None:
    """With xet on, the Hub cache links to files that repositories share, whose names are not their sha256."""
    run(xet, "push", adapter.save(tmp_path / "rows"), REPO)
    run(xet, "pull", REPO, "-o", tmp_path / "one")
    (weights,) = (tmp_path / "home").rglob(WEIGHTS_NAME)
    stored, name = weights.resolve(), weights.readlink().name
    assert stored.name != name
    stored.chmod(0o644)
    stored.write_bytes(stored.read_bytes()[:-1] + b"!")
    done = run(xet, "pull", REPO, "-o", tmp_path / "two", code=1)
    assert all(word in done.stderr for word in (WEIGHTS_NAME, name[:12]))
    run(xet, "pull", REPO, "-o", tmp_path / "two")
    assert (tmp_path / "two" / WEIGHTS_NAME).read_bytes() == (tmp_path / "rows" / WEIGHTS_NAME).read_bytes()


def test_a_content_store_that_has_lost_a_block(
    hub: Hub, adapter: es.Adapter, tmp_path: Path, xet: dict[str, str]
) -> None:
    run(xet, "push", adapter.save(tmp_path / "rows"), REPO)
    assert hub.xet is not None
    shutil.rmtree(hub.xet.blocks / "xorbs")
    done = run({**xet, "HF_HOME": str(tmp_path / "fresh")}, "pull", REPO, "-o", tmp_path / "out", code=1)
    assert all(word in done.stderr.splitlines()[-1] for word in ("embedsurgery: ", f"{REPO}@", WEIGHTS_NAME))
    assert not (tmp_path / "out").exists()

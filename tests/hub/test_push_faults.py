"""Every fault on the way to the Hub: our own error on one line, with the way out, no token, and nothing half made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import embedsurgery as es
from embedsurgery.errors import HubError
from tests.support.hub.answers import Rule, drops, loses, says, when
from tests.support.hub.loopback import READER, WRITER, Hub
from tests.support.hub.repositories import REPO
from tests.support.hub.secrets import refused
from tests.support.models import trained


def test_no_token_at_all(hub: Hub, adapter: es.Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError) as caught:
        es.push(adapter, REPO)
    refused(caught.value, "401", "HF_TOKEN", "log in")


def test_a_token_with_a_line_break_is_not_shown(hub: Hub, adapter: es.Adapter) -> None:
    with pytest.raises(HubError) as caught:
        es.push(adapter, REPO, token=f"{WRITER}\nhf_other")
    refused(caught.value)
    assert "hf_other" not in str(caught.value)


def test_no_write_permission(hub: Hub, adapter: es.Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(HubError) as caught:
        es.push(adapter, REPO)
    refused(caught.value, "403", "write access")
    head = hub.add(REPO, {"x": b""})
    with pytest.raises(HubError) as caught:
        es.push(adapter, REPO)
    refused(caught.value, "403", "write access")
    assert hub.repos[REPO].branches["main"] == head


def test_a_gated_repository(hub: Hub, pushed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos[REPO].gated = True
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(HubError) as caught:
        es.load(REPO)
    refused(caught.value, "gated", "ask for access")
    monkeypatch.setenv("HF_TOKEN", WRITER)
    assert es.load(REPO).source


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (when("POST /api/repos/create", says(409, "in the making")), ()),
        (when("POST /api/repos/create", says(403, "not yours")), ("403", "write access")),
        (when("POST /api/repos/create", says(500)), ("500", "later")),
        (when("POST .*preupload", says(500)), ("500", "later")),
        (when("POST .*batch", says(503)), ("503", "later")),
        (when("PUT ", drops), ("connection broke", "try again")),
        (when("PUT ", says(403, "expired")), ("403",)),
        (when("POST .*/verify", says(404, "no such object")), ("404",)),
        (when("POST .*/commit/", says(412, "moved")), ("412", "somebody pushed", "push again")),
        (when("POST .*/commit/", says(409, "locked")), ("409", "locked")),
        (when("POST .*/commit/", says(429, Retry_After="9")), ("429", "wait 9 seconds")),
        (when("POST .*/commit/", says(500)), ("500", "later")),
        (when("POST .*/commit/", drops), ("connection broke", "try again")),
        (when("POST .*validate-yaml", says(400, "bad card")), ()),
    ],
)
def test_a_push_that_fails_commits_nothing(hub: Hub, adapter: es.Adapter, rule: Rule, words: tuple[str, ...]) -> None:
    hub.rules.append(rule)
    with pytest.raises(HubError) as caught:
        es.push(adapter, REPO)
    refused(caught.value, REPO, *words)
    assert REPO not in hub.repos or len(hub.repos[REPO].commits) == 1
    assert len(hub.seen("POST .*/commit/")) <= 1
    hub.rules.clear()
    assert es.push(adapter, REPO).changed


@pytest.mark.parametrize("patience", [0, 100])
def test_a_connection_that_drops_in_the_middle_of_an_upload(hub: Hub, adapter: es.Adapter, patience: int) -> None:
    hub.patience = patience
    with pytest.raises(HubError) as caught:
        es.push(adapter, REPO)
    refused(caught.value, REPO, "connection broke", "try again")
    assert set(hub.repos[REPO].files()) == {".gitattributes"}
    hub.patience = None
    assert es.push(adapter, REPO).changed


def test_two_who_push_at_once(hub: Hub, adapter: es.Adapter, model: Any) -> None:
    es.push(adapter, REPO)

    def other(request: Any, go: Any) -> None:
        if "/commit/" in request.path:
            hub.rules.clear()
            es.push(trained(model, [9]), REPO)

    hub.rules.append(other)
    mine = trained(model, [11])
    with pytest.raises(HubError) as caught:
        es.push(mine, REPO)
    refused(caught.value, "412", "push again")
    assert es.load(REPO).manifest.tables[0].indices == (9,)
    assert es.push(mine, REPO).changed


@pytest.mark.parametrize("create_pr", [False, True])
def test_a_commit_whose_answer_was_lost_is_recognised(hub: Hub, adapter: es.Adapter, create_pr: bool) -> None:
    hub.add(REPO, {"x": b""})
    hub.rules.append(when("POST .*/commit/", loses, times=1))
    report = es.push(adapter, REPO, create_pr=create_pr)
    repo = hub.repos[REPO]
    assert report.recognised
    assert report.changed
    assert len(repo.commits) == 2
    assert len(hub.seen("POST .*/commit/")) == 1
    assert report.sha == (repo.requests[1] if create_pr else repo.branches["main"])
    assert (report.pull_request is not None) == create_pr


def test_somebody_elses_commit_is_not_taken_for_ours(hub: Hub, adapter: es.Adapter) -> None:
    hub.add(REPO, {"x": b""})

    def lost(go: Any) -> Any:
        hub.add(REPO, {"y": b""})
        return drops(go)

    hub.rules.append(when("POST .*/commit/", lost, times=1))
    with pytest.raises(HubError, match="connection broke"):
        es.push(adapter, REPO)


@pytest.mark.parametrize("head", ["license: [mit", "- a\n- b", "a: 1\n b: 2", "a: !!python/object:os.system x"])
def test_a_card_with_broken_yaml(hub: Hub, adapter: es.Adapter, tmp_path: Path, head: str) -> None:
    readme = f"---\n{head}\n---\nMine.\n"
    folder = adapter.save(tmp_path / "mine")
    (folder / "README.md").write_text(readme)
    with pytest.raises(HubError) as caught:
        es.push(folder, REPO)
    refused(caught.value, "README", "front matter")
    assert REPO not in hub.repos
    hub.add(REPO, {"README.md": readme.encode()})
    with pytest.raises(HubError, match="front matter"):
        es.push(adapter, REPO)
    assert hub.repos[REPO].files()["README.md"] == readme.encode()

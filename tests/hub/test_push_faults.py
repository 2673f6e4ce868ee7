"""Every failure of a push: an error on one line with the way out and without a token, and nothing half done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import embedsurgery as es
from embedsurgery.errors import HubError
from tests.support.errors import raises
from tests.support.hub.answers import Rule, drops, loses, says, when
from tests.support.hub.loopback import READER, WRITER, Hub
from tests.support.hub.repositories import REPO
from tests.support.hub.secrets import raises_safely
from tests.support.models import trained

LOST = "RemoteProtocolError"
"""httpx2's error for a connection that was closed too early."""


def test_no_token_at_all(hub: Hub, adapter: es.Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with raises_safely(found="401", hint=("HF_TOKEN", "hf auth login")):
        es.push(adapter, REPO)


def test_a_token_with_a_line_break_is_not_shown(hub: Hub, adapter: es.Adapter) -> None:
    with raises_safely() as caught:
        es.push(adapter, REPO, token=f"{WRITER}\nhf_other")
    assert "hf_other" not in str(caught.value)


def test_no_write_permission(hub: Hub, adapter: es.Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", READER)
    with raises_safely(found="403", hint="write access"):
        es.push(adapter, REPO)
    head = hub.add(REPO, {"x": b""})
    with raises_safely(found="403", hint="write access"):
        es.push(adapter, REPO)
    assert hub.repos[REPO].branches["main"] == head


def test_a_gated_repository(hub: Hub, pushed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos[REPO].gated = True
    monkeypatch.setenv("HF_TOKEN", READER)
    with raises_safely(found=("403", "gated"), hint="hf auth login"):
        es.load(REPO)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    assert es.load(REPO).source


@pytest.mark.parametrize(
    ("rule", "fields"),
    [
        (when("POST /api/repos/create", says(409, "in the making")), {"found": "KeyError"}),
        (when("POST /api/repos/create", says(403, "not yours")), {"found": "403 not yours", "hint": "write access"}),
        (when("POST /api/repos/create", says(500)), {"found": "500", "hint": "try again"}),
        (when("POST .*preupload", says(500)), {"found": "500", "hint": "try again"}),
        (when("POST .*batch", says(503)), {"found": "503", "hint": "try again"}),
        (when("PUT ", drops), {"found": LOST, "hint": "try again"}),
        (when("PUT ", says(403, "expired")), {"found": "403"}),
        (when("POST .*/verify", says(404, "no such object")), {"found": "404"}),
        (when("POST .*/commit/", says(412, "moved")), {"found": "412", "hint": "push again"}),
        (when("POST .*/commit/", says(409, "locked")), {"found": "409 locked"}),
        (when("POST .*/commit/", says(429, Retry_After="9")), {"found": "429", "hint": "9 seconds"}),
        (when("POST .*/commit/", says(500)), {"found": "500", "hint": "try again"}),
        (when("POST .*/commit/", drops), {"found": LOST, "hint": "try again"}),
        (when("POST .*validate-yaml", says(400, "bad card")), {}),
    ],
)
def test_a_push_that_fails_commits_nothing(hub: Hub, adapter: es.Adapter, rule: Rule, fields: dict[str, Any]) -> None:
    hub.rules.append(rule)
    with raises_safely(where=REPO, **fields):
        es.push(adapter, REPO)
    assert REPO not in hub.repos or len(hub.repos[REPO].commits) == 1
    assert len(hub.seen("POST .*/commit/")) <= 1
    hub.rules.clear()
    assert es.push(adapter, REPO).changed


@pytest.mark.parametrize("patience", [0, 100])
def test_a_connection_that_drops_in_the_middle_of_an_upload(hub: Hub, adapter: es.Adapter, patience: int) -> None:
    hub.patience = patience
    with raises_safely(where=REPO, found="connection", hint="try again"):
        es.push(adapter, REPO)
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
    with raises_safely(found="412", hint="push again"):
        es.push(mine, REPO)
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


def test_another_commit_is_not_taken_for_the_lost_one(hub: Hub, adapter: es.Adapter) -> None:
    hub.add(REPO, {"x": b""})

    def lost(go: Any) -> Any:
        hub.add(REPO, {"y": b""})
        return drops(go)

    hub.rules.append(when("POST .*/commit/", lost, times=1))
    with raises(HubError, where=REPO, found=LOST):
        es.push(adapter, REPO)


@pytest.mark.parametrize(
    ("head", "fields"),
    [
        ("license: [mit", {"where": "line 3", "expected": "YAML", "hint": "---"}),
        ("- a\n- b", {"expected": "key: value", "found": "list"}),
        ("a: 1\n b: 2", {"where": "line 3", "expected": "YAML", "hint": "---"}),
        ("a: !!python/object:os.system x", {"where": "line 2", "expected": "YAML", "hint": "---"}),
    ],
)
def test_a_card_with_broken_yaml(
    hub: Hub, adapter: es.Adapter, tmp_path: Path, head: str, fields: dict[str, str]
) -> None:
    fields = {**fields, "where": "README.md" + (f", {fields['where']}" if "where" in fields else "")}
    readme = f"---\n{head}\n---\nMine.\n"
    folder = adapter.save(tmp_path / "mine")
    (folder / "README.md").write_text(readme)
    with raises_safely(**fields):
        es.push(folder, REPO)
    assert REPO not in hub.repos
    hub.add(REPO, {"README.md": readme.encode()})
    with raises(HubError, **fields):
        es.push(adapter, REPO)
    assert hub.repos[REPO].files()["README.md"] == readme.encode()

"""Push and pull over HTTP: what is sent, what is kept, what is not sent again."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

import embedsurgery as es
from embedsurgery.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME
from embedsurgery.errors import EmbedSurgeryWarning
from embedsurgery.hub import HubId, find_id
from tests.support.comparing import contents, listing
from tests.support.errors import raises
from tests.support.hub.loopback import READER, WRITER, Hub
from tests.support.hub.repositories import REPO, point

FILES = {CONFIG_NAME, WEIGHTS_NAME, "README.md"}


def same(a: es.Adapter, b: es.Adapter) -> bool:
    return a.manifest == b.manifest and a.raw == b.raw


def test_a_push_is_one_commit_on_the_commit_that_was_read(hub: Hub, adapter: es.Adapter) -> None:
    report = es.push(adapter, REPO)
    repo = hub.repos[REPO]
    assert (report.created, report.private, report.changed, repo.private) == (True, True, True, True)
    assert len(repo.commits) == 2
    assert repo.branches["main"] == report.sha
    assert report.url == f"{hub.url}/{REPO}/commit/{report.sha}"
    assert set(repo.files()) == FILES | {".gitattributes"}
    (sent,) = hub.seen(f"POST /api/models/{REPO}/commit/")
    assert json.loads(sent.body.splitlines()[0])["value"]["parentCommit"] == repo.parent(report.sha)


def test_what_was_pushed_is_pulled(hub: Hub, adapter: es.Adapter) -> None:
    sha = es.push(adapter, REPO).sha
    got = es.pull(REPO)
    assert same(got, adapter)
    assert got.source == f"{REPO}@{sha}"
    assert same(es.load(f"{REPO}@{sha}"), adapter)
    assert same(es.load(REPO), adapter)


def test_an_unchanged_push_is_no_commit(hub: Hub, adapter: es.Adapter) -> None:
    first = es.push(adapter, REPO)
    second = es.push(adapter, REPO)
    assert (second.changed, second.created, second.sha, second.uploaded) == (False, False, first.sha, {})
    assert not es.push(adapter, REPO, create_pr=True).changed
    assert len(hub.repos[REPO].commits) == 2
    assert not hub.repos[REPO].requests


def test_public_is_an_option_and_the_report_says_what_it_is(hub: Hub, adapter: es.Adapter) -> None:
    assert es.push(adapter, REPO, private=False).private is False
    assert hub.repos[REPO].private is False
    assert es.push(adapter, REPO).private is False


def test_branch_tag_message_and_pull_request(hub: Hub, adapter: es.Adapter, model: Any) -> None:
    from tests.support.models import trained

    one = es.push(adapter, REPO, revision="next", tag="v1", message="rows of two tokens")
    repo = hub.repos[REPO]
    assert repo.branches["next"] == repo.tags["v1"] == one.sha != repo.branches["main"]
    assert repo.message(one.sha) == "rows of two tokens"
    assert es.pull(REPO, revision="v1").source == f"{REPO}@{one.sha}"
    again = es.push(adapter, REPO, revision="next", tag="v1")
    assert (again.changed, again.tag) == (False, "v1")
    other = trained(model, [9])
    with raises(es.errors.HubError, where=f"{REPO}@v1", found=one.sha[:12]):
        es.push(other, REPO, revision="next", tag="v1")
    assert repo.branches["next"] == one.sha
    request = es.push(other, REPO, create_pr=True)
    assert request.pull_request == f"{hub.url}/{REPO}/discussions/1" == request.url
    assert set(repo.files("refs/pr/1")) >= FILES
    assert CONFIG_NAME not in repo.files("main")
    assert same(es.load(f"{REPO}@refs/pr/1"), other)
    with raises(es.errors.ConfigError, found="v2"):
        es.push(other, REPO, create_pr=True, tag="v2")


def test_a_directory_is_pushed_as_it_is(hub: Hub, adapter: es.Adapter, tmp_path: Path) -> None:
    folder = adapter.save(tmp_path / "mine")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nMy own words.\n")
    (folder / "optimizer.pt").write_bytes(b"a pickle that stays here")
    es.push(folder, REPO)
    files = hub.repos[REPO].files()
    assert set(files) == FILES | {".gitattributes"}
    assert files[WEIGHTS_NAME] == (folder / WEIGHTS_NAME).read_bytes()
    assert b"license: mit" in files["README.md"]
    assert b"My own words." in files["README.md"]


def test_the_readme_of_the_hub_is_kept(hub: Hub, adapter: es.Adapter, model: Any) -> None:
    from tests.support.models import trained

    es.push(adapter, REPO)
    text = hub.repos[REPO].files()["README.md"].decode()
    text = text.replace("---\n", "---\nlicense: mit # chosen\n", 1).replace("# rows", "# My rows\n\nWords.")
    edited = f"{text}\nEnd.\n"
    hub.add(REPO, {"README.md": edited.encode()})
    assert es.push(adapter, REPO).changed is False
    es.push(trained(model, [9]), REPO)
    new = hub.repos[REPO].files()["README.md"].decode()
    assert "license: mit # chosen\n" in new
    assert "# My rows\n\nWords." in new
    assert new.endswith("\nEnd.\n")
    assert "1 x 16" in new
    assert "2 x 16" not in new


def test_only_the_adapters_files_are_downloaded_and_the_header_first(hub: Hub, pushed: str) -> None:
    hub.add(REPO, {"evil.py": b"raise SystemExit", "training_args.bin": b"pickle", "big.safetensors": b"x" * 1000})
    es.load(REPO)
    asked = {r.path.rpartition("/")[2] for r in hub.seen("(GET|HEAD) .*/resolve/")}
    assert asked == {CONFIG_NAME, WEIGHTS_NAME}
    weights = hub.seen(f"(GET|HEAD) .*/resolve/.*{WEIGHTS_NAME}")
    assert weights[0].method == "GET"
    assert "range" in weights[0].headers
    shas = {r.path.split("/")[4] for r in hub.seen("(GET|HEAD) .*/resolve/")}
    assert shas == {hub.repos[REPO].branches["main"]}
    assert len(hub.seen("GET /api/models/[^/]+/[^/]+$")) == 1


def test_the_storage_never_sees_a_token_and_the_hub_sees_who_asks(hub: Hub, adapter: es.Adapter) -> None:
    es.push(adapter, REPO)
    es.pull(REPO)
    stored = [r for r in hub.log if "signature=" in r.path]
    assert {r.method for r in stored} == {"PUT", "GET"}
    assert all(r.token is None for r in stored)
    api = [r for r in hub.log if r not in stored]
    assert all(r.token == WRITER for r in api)
    assert all(r.headers["user-agent"].startswith(f"embedsurgery/{es.__version__}; hf_hub/") for r in api)


def test_a_token_can_be_given_or_kept_back(hub: Hub, adapter: es.Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    es.push(adapter, REPO)
    monkeypatch.delenv("HF_TOKEN")
    with raises(es.errors.HubError, found="401", hint="HF_TOKEN"):
        es.pull(REPO)
    assert es.pull(REPO, token=READER).source
    monkeypatch.setenv("HF_TOKEN", WRITER)
    with raises(es.errors.HubError, found="401", hint="HF_TOKEN"):
        es.pull(REPO, revision="main", token=False)


def test_the_cache_serves_offline(hub: Hub, pushed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    online = es.load(REPO)
    count = len(hub.log)
    assert es.load(f"{REPO}@{pushed}").source == online.source
    assert len(hub.log) == count
    point(monkeypatch, hub.url, tmp_path / "hf-home", offline=True)
    assert same(es.load(REPO), online)
    assert es.load(REPO).source == online.source
    assert len(hub.log) == count
    with raises(es.errors.HubError, where=f"{REPO}@other", hint="HF_HUB_OFFLINE"):
        es.load(f"{REPO}@other")


def test_pull_into_a_directory(hub: Hub, pushed: str, adapter: es.Adapter, tmp_path: Path) -> None:
    es.pull(REPO, output=tmp_path / "new" / "rows")
    folder = tmp_path / "new" / "rows"
    assert listing(folder) == [".embedsurgery", ".embedsurgery/source.json", CONFIG_NAME, WEIGHTS_NAME]
    assert not (folder / WEIGHTS_NAME).is_symlink()
    assert {k: v for k, v in contents(folder).items() if k in FILES} == {
        k: v for k, v in hub.repos[REPO].files().items() if k in FILES
    }
    assert same(es.load(folder), adapter)
    assert es.load(folder).source == f"{REPO}@{pushed}"
    with pytest.raises(es.errors.OutputExistsError):
        es.pull(REPO, output=folder)


def test_a_path_that_exists_wins(hub: Hub, pushed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_id(REPO) == HubId(REPO)
    Path("team").mkdir()
    assert find_id(Path(REPO)) == HubId(REPO)
    Path("team/rows").mkdir()
    assert find_id(REPO) is None
    with raises(es.errors.AdapterError, where=REPO):
        es.load(REPO)
    assert not hub.log


@pytest.mark.parametrize(
    "text",
    [
        "gpt2",
        "a/b/c",
        "../b",
        "a/..",
        "/a/b",
        "a/b@",
        "a/b@../../x",
        "a/b@-x",
        "a/b c",
        "a--b/c@main",
        "a/b@x//y",
        "a\\b/c",
    ],
)
def test_what_is_not_an_id(text: str) -> None:
    with raises(es.errors.ConfigError, expected="org/name@revision", found=repr(text)):
        HubId.parse(text)


def test_a_base_named_by_a_path_is_warned_of(hub: Hub, adapter: es.Adapter) -> None:
    from dataclasses import replace

    named = replace(adapter, manifest=replace(adapter.manifest, base_model="/home/me/base"))
    with pytest.warns(EmbedSurgeryWarning, match="/home/me/base"):
        es.push(named, REPO)
    assert b"/home/me" not in hub.repos[REPO].files()["README.md"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", EmbedSurgeryWarning)
        es.push(replace(adapter, manifest=replace(adapter.manifest, base_model="team/base", revision="a" * 40)), REPO)
    card = hub.repos[REPO].files()["README.md"].decode()
    assert "base_model: team/base\nbase_model_relation: adapter\n" in card
    assert "a" * 40 in card

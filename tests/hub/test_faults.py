"""Every failure of a pull: an error on one line with the way out and without a token, and no partial files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

import embedsurgery as es
from embedsurgery.adapters.adapter import CONFIG_NAME, METADATA_KEY, WEIGHTS_NAME
from embedsurgery.checkpoints.hub_merging import push_merged
from embedsurgery.errors import AdapterError, CheckpointError, EmbedSurgeryError, HubError, UnknownSurgeryError
from embedsurgery.files.safetensors import encode_header
from tests.support.comparing import listing
from tests.support.errors import raises
from tests.support.hub.answers import Answer, Rule, cuts, drops, says, shortens, spoils, when
from tests.support.hub.loopback import WRITER, Hub
from tests.support.hub.repositories import BASE, REPO, point
from tests.support.hub.secrets import raises_safely
from tests.support.models import tiny, trained

LOST = "RemoteProtocolError"
"""httpx2's error for a connection that was closed too early."""


@pytest.mark.parametrize(
    ("rule", "fields"),
    [
        (when("GET /api/models/", says(401)), {"found": "401", "hint": ("hf auth login", "HF_TOKEN")}),
        (when("GET /api/models/", says(401, f"bad token {WRITER} at https://x/y?signature=1")), {"found": "401"}),
        (when("GET /api/models/", says(403, "Forbidden")), {"found": ("403", "Forbidden"), "hint": "token"}),
        (when("GET /api/models/", says(403, "restricted", "GatedRepo")), {"found": "403", "hint": "hf auth login"}),
        (when("GET /api/models/", says(404, "gone", "RepoNotFound")), {"found": "404", "hint": "hf auth login"}),
        (
            when("GET /api/models/", says(404, "Invalid rev id", "RevisionNotFound")),
            {"found": "404", "expected": ("branch", "tag", "commit")},
        ),
        (when("GET /api/models/", says(429, Retry_After="7")), {"found": "429", "hint": "7 seconds"}),
        (when("GET /api/models/", says(429)), {"found": "429", "hint": "minutes"}),
        (when("GET /api/models/", says(500)), {"found": "500", "hint": "try again"}),
        (when("GET /api/models/", drops), {"found": LOST, "hint": "try again"}),
        (when("POST .*paths-info", says(500)), {"found": "500", "hint": "try again"}),
        (when("POST .*paths-info", says(418, "a teapot")), {"found": "418 a teapot"}),
        (when("POST .*paths-info", drops), {"found": LOST, "hint": "try again"}),
        (when("HEAD .*adapter_config", says(403, "no", "GatedRepo")), {"found": "403", "hint": "hf auth login"}),
        (
            when("HEAD .*adapter_config", says(404, "gone", "EntryNotFound")),
            {"where": (REPO, CONFIG_NAME), "found": "404", "hint": "revision"},
        ),
        (when("HEAD .*adapter_config", says(503)), {"where": (REPO, CONFIG_NAME), "found": "503"}),
        (when("HEAD .*adapter_config", drops), {"where": (REPO, CONFIG_NAME), "found": LOST, "hint": "try again"}),
        (when("GET .*resolve.*adapter_config", says(429, Retry_After="3")), {"found": "429", "hint": "3 seconds"}),
        (when("GET .*signature", says(403, "expired signature=1")), {"where": (REPO, WEIGHTS_NAME), "found": "403"}),
        (when("GET .*signature", drops), {"where": (REPO, WEIGHTS_NAME), "found": LOST}),
        (when("GET .*signature", cuts(10)), {"where": (REPO, WEIGHTS_NAME), "found": LOST}),
        (when("GET .*signature", shortens(10)), {"where": (REPO, WEIGHTS_NAME), "found": "10 bytes"}),
    ],
)
def test_a_pull_that_fails(hub: Hub, pushed: str, tmp_path: Path, rule: Rule, fields: dict[str, object]) -> None:
    hub.rules.append(rule)
    with raises_safely(**{"where": REPO, **fields}):
        es.pull(REPO, output=tmp_path / "out" / "rows")
    assert not (tmp_path / "out").exists()
    hub.rules.clear()
    assert es.pull(REPO, output=tmp_path / "out" / "rows").source == f"{REPO}@{pushed}"


def _weights(change: Any, times: int | None = None) -> Rule:
    """Changes the download itself, not the range request before it."""
    rule = when("GET .*signature", change, times)
    return lambda request, go: None if request.headers.get("range", "").startswith("bytes=0-") else rule(request, go)


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        (shortens(100), {"expected": "bytes", "found": "100 bytes", "hint": "try again"}),
        (spoils, {"expected": "SHA256", "found": None, "hint": "try again"}),
        (cuts(100), {"found": LOST, "hint": "try again"}),
        (says(500), {"found": "500", "hint": "try again"}),
    ],
)
def test_weights_that_come_wrong_are_not_kept(
    hub: Hub, pushed: str, tmp_path: Path, change: Any, fields: dict[str, object]
) -> None:
    if fields.get("expected") == "SHA256":
        fields = {**fields, "expected": hub.repos[REPO].tree(pushed)[WEIGHTS_NAME].sha256[:12]}  # type: ignore[index]
    hub.rules.append(_weights(change))
    with raises_safely(where=(REPO, WEIGHTS_NAME), **fields):
        es.pull(REPO, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    kept = [name for name in listing(tmp_path / "hf-home") if WEIGHTS_NAME in name or "incomplete" in name]
    assert not kept
    hub.rules.clear()
    assert es.load(REPO).source


def test_a_cache_that_was_spoiled_is_seen(hub: Hub, pushed: str, tmp_path: Path) -> None:
    es.load(REPO)
    (weights,) = (tmp_path / "hf-home").rglob(WEIGHTS_NAME)
    blob = weights.resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"!")
    with raises(HubError, where=WEIGHTS_NAME, expected=blob.name[:12]):
        es.load(REPO)
    assert es.load(REPO).source


def test_a_drop_in_the_middle_is_tried_again(hub: Hub, pushed: str) -> None:
    hub.rules.append(_weights(cuts(100), times=1))
    assert es.load(REPO).source
    assert len([r for r in hub.seen("GET .*signature") if "range" not in r.headers]) == 2


def test_a_range_that_breaks_off_is_asked_for_again(hub: Hub, pushed: str) -> None:
    hub.rules.append(when("GET .*signature", cuts(10), times=2))
    assert es.load(REPO).source
    assert len([r for r in hub.seen("GET .*signature") if "range" in r.headers]) == 3


def test_retry_after_is_waited_for(hub: Hub, pushed: str, slept: list[float]) -> None:
    hub.rules.append(when("GET .*resolve.*adapter_config", says(429, Retry_After="41"), times=1))
    assert es.load(REPO).source
    assert 42.0 in slept


def test_no_name_server_and_no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, adapter: es.Adapter) -> None:
    point(monkeypatch, "http://no-such-host.invalid", tmp_path / "other")
    for call in (lambda: es.load(REPO), lambda: es.push(adapter, REPO), lambda: es.walk(REPO)):
        with raises_safely(found="ConnectError", hint="HF_ENDPOINT"):
            call()


def test_no_name_server_with_a_cache(hub: Hub, pushed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    es.load(REPO)
    point(monkeypatch, "http://no-such-host.invalid", tmp_path / "hf-home")
    assert es.load(REPO).source == f"{REPO}@{pushed}"


def test_offline_without_a_cache(
    hub: Hub, pushed: str, adapter: es.Adapter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    point(monkeypatch, hub.url, tmp_path / "hf-home", offline=True)
    for call in (
        lambda: es.load(REPO),
        lambda: es.load(f"{REPO}@{pushed}"),
        lambda: es.push(adapter, REPO),
        lambda: es.walk(REPO),
    ):
        with raises_safely(found="offline", hint="HF_HUB_OFFLINE"):
            call()
    assert not hub.log


@pytest.mark.parametrize(
    ("files", "kind", "fields"),
    [
        (
            {"adapter_config.json": b"{}", "adapter_model.bin": b"\x80\x04"},
            AdapterError,
            {"expected": WEIGHTS_NAME, "hint": ("adapter_model.bin", "pickle", "safetensors")},
        ),
        (
            {"config.json": b"{}", "model.safetensors": b""},
            AdapterError,
            {"expected": WEIGHTS_NAME, "found": "config.json", "hint": "a model"},
        ),
        ({"adapter_model.safetensors": b"x"}, AdapterError, {"expected": CONFIG_NAME, "found": WEIGHTS_NAME}),
        ({"README.md": b""}, AdapterError, {"expected": WEIGHTS_NAME, "found": "none"}),
        (
            {"adapter_config.json": b"[1]", "adapter_model.safetensors": b"x"},
            CheckpointError,
            {"where": CONFIG_NAME, "found": "list"},
        ),
        (
            {"adapter_config.json": b"{}", "adapter_model.safetensors": b"\x80\x04pickled after all"},
            CheckpointError,
            {"where": WEIGHTS_NAME, "expected": "header", "found": "19 bytes"},
        ),
        (
            {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"},
            CheckpointError,
            {"where": WEIGHTS_NAME, "expected": "header", "found": "1 bytes"},
        ),
    ],
)
def test_repositories_that_hold_no_adapter(
    hub: Hub, files: dict[str, bytes], kind: type[EmbedSurgeryError], fields: dict[str, object]
) -> None:
    hub.add(REPO, files)
    with raises_safely(kind, **fields):
        es.load(REPO)
    assert not [r for r in hub.seen("(GET|HEAD) .*adapter_model") if "range" not in r.headers]


def _adapter_files(
    config: object, tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> dict[str, bytes]:
    size = sum(4 * shape[0] * shape[-1] for _, shape in tensors.values())
    weights = encode_header(tensors, metadata) + bytes(size)
    return {CONFIG_NAME: json.dumps(config).encode(), WEIGHTS_NAME: weights}


ROWS = "base_model.model.model.embed_tokens.trainable_tokens_delta"


@pytest.mark.parametrize(
    ("config", "tensors", "metadata", "kind", "fields"),
    [
        (
            {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1, 2]},
            {ROWS: ("F32", (3, 4))},
            {},
            AdapterError,
            {"where": ROWS, "expected": "(2, D)", "found": "[3, 4]"},
        ),
        (
            {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1]},
            {ROWS: ("I32", (1, 4))},
            {},
            AdapterError,
            {"where": ROWS, "expected": "F32", "found": "I32"},
        ),
        (
            {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1]},
            {},
            {},
            AdapterError,
            {"where": WEIGHTS_NAME, "found": "0"},
        ),
        (
            {"peft_type": "os.system"},
            {ROWS: ("F32", (1, 4))},
            {},
            UnknownSurgeryError,
            {"where": REPO, "expected": "os.system", "hint": ("os.system", "plugin")},
        ),
        (
            {"peft_type": "TRAINABLE_TOKENS"},
            {ROWS: ("F32", (1, 4))},
            {METADATA_KEY: '{"surgery": "color_shift"}'},
            UnknownSurgeryError,
            {"where": REPO, "expected": "color_shift", "hint": ("embedsurgery plugin", "color_shift")},
        ),
        (
            {"peft_type": "TRAINABLE_TOKENS"},
            {ROWS: ("F32", (1, 4))},
            {METADATA_KEY: "["},
            AdapterError,
            {"where": WEIGHTS_NAME, "expected": METADATA_KEY},
        ),
    ],
)
def test_what_the_header_tells_before_the_weights_come(
    hub: Hub,
    config: object,
    tensors: Any,
    metadata: dict[str, str],
    kind: type[EmbedSurgeryError],
    fields: dict[str, object],
) -> None:
    hub.add(REPO, _adapter_files(config, tensors, metadata))
    with raises_safely(kind, **fields):
        es.load(REPO)
    assert not [r for r in hub.seen("(GET|HEAD) .*adapter_model") if "range" not in r.headers]


def test_a_server_without_ranges_is_refused_before_it_sends_everything(hub: Hub, pushed: str) -> None:
    def whole(request: Any, go: Any) -> Any:
        if "signature" not in request.path:
            return None
        request.headers.pop("range", None)
        return go()

    hub.rules.append(whole)
    with raises(HubError, where=WEIGHTS_NAME, expected="206", found="200"):
        es.load(REPO)


@pytest.mark.parametrize(
    "name", ["../evil.json", "a/../../evil.json", "/etc/evil", "a\\b", ".git/hooks/x", "C:evil", "a//b", "x\ny"]
)
def test_a_repository_whose_file_names_are_paths(hub: Hub, base: Path, tmp_path: Path, name: str) -> None:
    """As a Hub would list it: git itself takes few of these names."""
    hub.add(BASE, {"placeholder": b"evil"})

    def renamed(go: Any) -> Any:
        answer = go()
        answer.body = answer.body.replace(b'"placeholder"', json.dumps(name).encode())
        return answer

    hub.rules.append(when("GET .*/tree/", renamed))
    for call in (
        lambda: es.merge_checkpoint(BASE, trained_on(base), tmp_path / "out"),
        lambda: es.walk(BASE),
        lambda: push_merged(BASE, [trained_on(base)], "team/merged"),
    ):
        with raises_safely(where=BASE, found=repr(name), hint=""):
            call()
    assert not [path for path in tmp_path.rglob("*") if "evil" in path.name]
    assert not hub.seen("placeholder|evil|hooks")


def trained_on(base: Path) -> es.Adapter:
    return trained(tiny("llama-untied"), [5, 7])


def test_a_commit_that_is_a_path(hub: Hub, pushed: str) -> None:
    def answer(request: Any, go: Any) -> Any:
        got = go()
        if re.fullmatch("/api/models/team/rows", request.path):
            got.body = got.body.replace(pushed.encode(), b"../../../../evil")
        return got

    hub.rules.append(answer)
    with raises(HubError, where=REPO, expected="40 hex digits", found="../../../../evil"):
        es.load(REPO)


def test_a_cache_that_cannot_be_written(hub: Hub, pushed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with raises_safely(where=str(tmp_path / "file"), hint="HF_HOME"):
        es.load(REPO)


def test_the_endpoint_is_no_hub(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    hub.rules.append(when("GET /api", lambda go: Answer(200, b"<html>")))
    with raises_safely(where=REPO, found=""):
        es.load(REPO)
    close_session()

"""A loopback Hub, and the client of this process pointed at it: nothing of the user's login or cache is touched."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http, close_session

import embedsurgery as es
from embedsurgery.hub import commits
from tests.conftest import ROOT, contents, save, tiny, trained
from tests.hub.loopback import WRITER, Hub

CLIENTS_OWN = "ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning"
"""What huggingface_hub 2.4.0 does to httpx2 when it uploads a large file."""

REPO, BASE = "team/rows", "team/base"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings(CLIENTS_OWN))


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with Hub(tmp_path_factory.mktemp("hub")).running() as running:
        yield running


@pytest.fixture(autouse=True)
def slept(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Points the client at the Hub; returns how long it would have slept between tries."""
    home = tmp_path / "hf-home"
    point(monkeypatch, hub.url, home)
    waits: list[float] = []
    monkeypatch.setattr(_http.time, "sleep", waits.append)
    monkeypatch.setattr(commits, "_PAUSE", 0.0)
    return waits


def point(monkeypatch: pytest.MonkeyPatch, url: str, home: Path, *, offline: bool = False) -> None:
    """As the environment would, had it been set before the client was imported."""
    close_session()
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)


@pytest.fixture
def env(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """A process's environment: this Hub, a home of its own, online, xet off, this package wherever it runs."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    return {**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": WRITER,
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT)}  # fmt: skip


@pytest.fixture(scope="session")
def model() -> Any:
    return tiny("llama-untied")


@pytest.fixture(scope="session")
def adapter(model: Any) -> es.Adapter:
    """Rows 5 and 7 of a tiny untied Llama's input table."""
    return trained(model, [5, 7])


@pytest.fixture
def pushed(hub: Hub, adapter: es.Adapter, tmp_path: Path) -> str:
    """The adapter on the Hub, put there by hand; its commit."""
    folder = adapter.save(tmp_path / "by-hand")
    return hub.add(REPO, contents(folder))


@pytest.fixture
def base(hub: Hub, model: Any, tmp_path: Path) -> Path:
    """The model in shards, in a directory and on the Hub."""
    folder = save(model, tmp_path / "base", shards=True)
    hub.add(BASE, contents(folder))
    return folder

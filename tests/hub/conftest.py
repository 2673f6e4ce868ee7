"""A loopback Hub, and huggingface_hub in this process pointed at it. The user's login and cache are not touched."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import _http

import embedsurgery as es
from embedsurgery.hub import commits
from tests.support.comparing import contents
from tests.support.hub.loopback import WRITER, Hub
from tests.support.hub.repositories import BASE, REPO, point
from tests.support.models import save, tiny, trained
from tests.support.processes import ROOT

IGNORED = "ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning"
"""A deprecated call of httpx2 by huggingface_hub 2.4.0, when it uploads a large file."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings(IGNORED))


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with Hub(tmp_path_factory.mktemp("hub")).running() as running:
        yield running


@pytest.fixture(autouse=True)
def slept(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Point huggingface_hub at the loopback Hub; returns the seconds that it would have slept between retries."""
    home = tmp_path / "hf-home"
    point(monkeypatch, hub.url, home)
    waits: list[float] = []
    monkeypatch.setattr(_http.time, "sleep", waits.append)
    monkeypatch.setattr(commits, "_PAUSE", 0.0)
    return waits


@pytest.fixture
def env(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """The environment of a process: this Hub, its own home, online, xet off, this package importable."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    return {
        **kept,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": WRITER,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
    }


@pytest.fixture(scope="session")
def model() -> Any:
    return tiny("llama-untied")


@pytest.fixture(scope="session")
def adapter(model: Any) -> es.Adapter:
    """Rows 5 and 7 of a tiny untied Llama's input table."""
    return trained(model, [5, 7])


@pytest.fixture
def pushed(hub: Hub, adapter: es.Adapter, tmp_path: Path) -> str:
    """The adapter on the Hub, added without a push; returns its commit."""
    folder = adapter.save(tmp_path / "by-hand")
    return hub.add(REPO, contents(folder))


@pytest.fixture
def base(hub: Hub, model: Any, tmp_path: Path) -> Path:
    """The model in shards, in a directory and on the Hub."""
    folder = save(model, tmp_path / "base", shards=True)
    hub.add(BASE, contents(folder))
    return folder

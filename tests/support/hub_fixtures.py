"""A Hub for the kit's round trip: the loopback Hub of these tests, with the client of this process pointed at it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.hub.conftest import hub as hub
from tests.support.hub.repositories import point


@pytest.fixture
def embedsurgery_hub(hub: Any, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> str:
    """A repository that the kit may push to."""
    point(monkeypatch, hub.url, tmp_path_factory.mktemp("hf-home"))
    return "team/kit"

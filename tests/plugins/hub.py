"""A Hub for the kit's round trip: the loopback Hub of these tests, with the client of this process pointed at it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.conftest import point
from tests.hub.loopback import Hub


@pytest.fixture
def embedsurgery_hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A repository that the kit may push to."""
    home: Path = tmp_path_factory.mktemp("hf-home")
    with Hub().running() as hub:
        point(monkeypatch, hub.url, home)
        yield "team/kit"

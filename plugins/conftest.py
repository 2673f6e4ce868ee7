"""Makes plugins importable that are not installed, and gives the test kit the loopback Hub."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests.support.hub_fixtures import embedsurgery_hub as embedsurgery_hub
from tests.support.hub_fixtures import hub as hub

for _folder in sorted(Path(__file__).resolve().parent.glob("embedsurgery-*")):
    if find_spec(_folder.name.replace("-", "_")) is None:
        sys.path.insert(0, str(_folder))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)

"""Fixtures and settings of all tests; helpers are in ``support/``."""

from __future__ import annotations

import gc
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests.support.models import save, tiny

_SLOW = (
    "benchmarks",
    "distributed",
    "demo/",
    "test_readme",
    "test_generation",
    "hub",
    "faults",
    "test_guide",
    "test_real_encoder",
    "test_import",
)
"""Files with few and slow tests: they come first, so that no process is left alone with them in the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first; within a file nothing moves."""
    items.sort(key=lambda item: not any(part in item.nodeid for part in _SLOW))


def pytest_collection_finish() -> None:
    """What thousands of collected tests and their modules take is not searched for garbage again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tied tiny Llama in one file, fp32."""
    return save(tiny("llama-tied"), tmp_path / "base")

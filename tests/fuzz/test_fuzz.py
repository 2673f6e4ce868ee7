"""Runs the fuzzer for some seconds; ``python -m tests.fuzz --inputs 100000`` runs it for longer."""

from __future__ import annotations

import pytest

from tests.fuzz.campaign import fuzz
from tests.fuzz.targets import TARGETS, Bed

INPUTS = 80
"""Per kind of file; all of them take some ten seconds of one core."""


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Bed:
    return Bed(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", TARGETS)
def test_only_own_errors_are_raised(kind: str, bed: Bed) -> None:
    before = bed.count
    fuzz(bed, kind, INPUTS)
    assert bed.count - before >= INPUTS // 2  # Hypothesis stops when it has drawn all of a small space

"""The fuzzer for some seconds; ``python -m tests.fuzz --inputs 100000`` runs it for longer."""

from __future__ import annotations

import pytest

from tests.fuzz.campaign import fuzz
from tests.fuzz.targets import TARGETS, Bed

INPUTS = 80
"""For each kind of file: the whole takes some ten seconds of one core."""


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Bed:
    return Bed(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", TARGETS)
def test_only_errors_of_our_own_come_out(kind: str, bed: Bed) -> None:
    before = bed.count
    fuzz(bed, kind, INPUTS)
    assert bed.count - before >= INPUTS // 2  # small spaces are drawn empty

"""An adapter for the tests of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.models import tiny, trained

INDICES = [11, 3, 29]
"""Its rows."""


class StubTokenizer:
    """Gives ids texts that a terminal must not obey."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"t\u00f6k{i}\n\x1b[31m" for i in ids]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return trained(tiny("llama-tied"), INDICES).save(tmp_path / "adapter")

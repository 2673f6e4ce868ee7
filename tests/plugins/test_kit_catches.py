"""Every check of the test kit can fail: each is run on something that is wrong in just what it checks."""

from __future__ import annotations

from typing import Any

import pytest

from embedsurgery.testing import InitializerContract, StoreContract, SurgeryContract
from tests.support import wrong_plugins as wrong

WRONG: dict[str, Any] = {
    name: kind for name, kind in vars(wrong).items() if isinstance(kind, type) and "caught" in vars(kind)
}
INI = "[pytest]\npython_classes = Wrong*\naddopts = -p no:cacheprovider\nfilterwarnings = error\n"


class Recorder:
    """Which checks of which class ran, and what they said that failed."""

    def __init__(self) -> None:
        self.said: dict[tuple[str, str], list[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        _, kind, check = report.nodeid.split("::", 2)
        said = self.said.setdefault((kind, check.partition("[")[0]), [])
        if report.failed:
            said.append(f"{report.when}: {report.longreprtext}")


@pytest.fixture(scope="session")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[str]]:
    """All of them, run at once."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "pytest.ini").write_text(INI)
    (folder / "test_wrong.py").write_text("from tests.support.wrong_plugins import *\n")
    recorder = Recorder()
    nodes = [f"{folder}/test_wrong.py::{name}::{check}" for name, kind in WRONG.items() for check in kind.caught]
    options = ["-c", f"{folder}/pytest.ini", f"--rootdir={folder}", "--tb=short", "--import-mode=importlib"]
    pytest.main([*options, *nodes], plugins=[recorder])
    return recorder.said


@pytest.mark.parametrize(("name", "check"), [(name, check) for name, kind in WRONG.items() for check in kind.caught])
def test_it_is_caught(name: str, check: str, said: dict[tuple[str, str], list[str]]) -> None:
    failures = said[name, check]
    assert failures, "it passes"
    assert any(text.startswith("call: ") and WRONG[name].caught[check] in text for text in failures), failures[0]


@pytest.mark.parametrize("contract", [SurgeryContract, InitializerContract, StoreContract])
def test_every_check_has_something_wrong(contract: type) -> None:
    caught = {check for kind in WRONG.values() if issubclass(kind, contract) for check in kind.caught}
    assert caught == {name for name in dir(contract) if name.startswith("test_")}

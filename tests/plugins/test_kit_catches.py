"""Every test of the kit can fail: each is run on a plugin with the fault that it must catch."""

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
    """Collects (class, test) -> output of its failures, an empty list if it passed."""

    def __init__(self) -> None:
        self.failures: dict[tuple[str, str], list[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        _, kind, test = report.nodeid.split("::", 2)
        outputs = self.failures.setdefault((kind, test.partition("[")[0]), [])
        if report.failed:
            outputs.append(f"{report.when}: {report.longreprtext}")


@pytest.fixture(scope="session")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[str]]:
    """Run all faulty plugins at once."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "pytest.ini").write_text(INI)
    (folder / "test_wrong.py").write_text("from tests.support.wrong_plugins import *\n")
    recorder = Recorder()
    nodes = [f"{folder}/test_wrong.py::{name}::{test}" for name, kind in WRONG.items() for test in kind.caught]
    options = ["-c", f"{folder}/pytest.ini", f"--rootdir={folder}", "--tb=short", "--import-mode=importlib"]
    pytest.main([*options, *nodes], plugins=[recorder])
    return recorder.failures


@pytest.mark.parametrize(("name", "test"), [(name, test) for name, kind in WRONG.items() for test in kind.caught])
def test_the_fault_is_caught(name: str, test: str, failures: dict[tuple[str, str], list[str]]) -> None:
    outputs = failures[name, test]
    assert outputs, "it passes"
    assert any(text.startswith("call: ") and WRONG[name].caught[test] in text for text in outputs), outputs[0]


@pytest.mark.parametrize("contract", [SurgeryContract, InitializerContract, StoreContract])
def test_every_test_of_the_kit_catches_a_fault(contract: type) -> None:
    caught = {test for kind in WRONG.values() if issubclass(kind, contract) for test in kind.caught}
    assert caught == {name for name in dir(contract) if name.startswith("test_")}

"""Kills at every system call that writes, syncs, renames or removes: after `recover` all is as before, or as after.

`scenarios.py` defines what runs, `sweep.py` what must hold. By default some calls of every scenario are tried; with
``-m sweep`` every call is, one run for each.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.scenarios import SCENARIOS
from tests.faults.tracer import unavailable
from tests.support.processes import ROOT

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

ALL = ("kill", "tear", "full", "full-for-good", "broken", "interrupt")


def sweep(faults: tuple[str, ...], every: int, *scenarios: str) -> dict[tuple[str, str], dict[str, Any]]:
    """(scenario, fault) -> the result, from a process without torch."""
    command = [sys.executable, "-m", "tests.faults.sweep", *faults, "--every", str(every)]
    command += [part for name in scenarios for part in ("--scenario", name)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT, timeout=3000)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    return {(line["scenario"], line["fault"]): line for line in lines}


def check(found: dict[tuple[str, str], dict[str, Any]], least: int) -> None:
    """No run went wrong, and there were at least so many."""
    wrong = [text for line in found.values() for text in line["wrong"]]
    assert not wrong, "\n".join(wrong)
    assert sum(line["runs"] for line in found.values()) >= least


def test_every_call_of_a_merge_in_place() -> None:
    found = sweep(("kill",), 1, "merge in place")
    check(found, 25)
    assert all(line["runs"] == line["calls"] for line in found.values())


def test_some_calls_of_everything() -> None:
    found = sweep(("kill",), 9)
    assert {scenario for scenario, _ in found} == set(SCENARIOS)
    check(found, 90)


def test_other_faults_at_some_calls() -> None:
    """Torn writes, a full disk (once and for good), I/O errors, Ctrl-C."""
    names = ("merge into a new directory", "two adapters in place", "growth in place", "unmerge in place")
    found = sweep(ALL[1:], 7, *names)
    assert all(line["runs"] for line in found.values())
    check(found, 60)


@pytest.mark.sweep
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_fault_at_every_call(scenario: str) -> None:
    found = sweep(ALL, 1, scenario)
    check(found, 13)
    assert found[scenario, "kill"]["runs"] == found[scenario, "kill"]["calls"]


_CLI = """
import os, signal, sys
from pathlib import Path
from embedsurgery.files import atomic
from embedsurgery.cli.main import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores SIGINT for background processes
real = Path.rename
def stop(path, target):
    os.kill(os.getpid(), int(sys.argv[1]))
    return real(path, target)
Path.rename = stop
main(sys.argv[2:])
"""


def test_a_killed_command_and_the_next_one(tmp_path: Path) -> None:
    """End to end, with a real interpreter: killed before the rename, cleaned up by recover or by the next run."""
    from tests.faults.scenarios import adapter, make
    from tests.support.comparing import listing
    from tests.support.processes import cli

    base = make(tmp_path / "base")
    adapter(base, [3], 1.0).save(tmp_path / "adapter")
    verb = ["merge", str(base), str(tmp_path / "adapter"), "-o", str(tmp_path / "out")]
    before = listing(tmp_path)
    killed = subprocess.run([sys.executable, "-c", _CLI, "9", *verb], check=False, timeout=60)
    assert killed.returncode == -9
    assert any(name.startswith(".embedsurgery-") for name in listing(tmp_path))
    done = cli("recover", tmp_path / "out", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["removed"] == ["out"]
    assert listing(tmp_path) == before
    subprocess.run([sys.executable, "-c", _CLI, "9", *verb], check=False, timeout=60)
    done = cli(*verb)
    assert done.returncode == 0
    assert str(tmp_path) in done.stderr
    assert re.search(r"\bout\b", done.stderr.replace(str(tmp_path), ""))
    assert not any(name.startswith(".embedsurgery-") for name in listing(tmp_path))
    interrupted = subprocess.run(
        [sys.executable, "-c", _CLI, "2", *verb[:-1], str(tmp_path / "other")],
        check=False,
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert interrupted.returncode == 130
    (line,) = interrupted.stderr.strip().splitlines()
    assert line.startswith("embedsurgery: ")
    assert not any(name.startswith(".embedsurgery-") for name in listing(tmp_path))

"""The launcher of these tests reports workers that fail or hang, and leaves none running."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.distributed.launch import port, run

SLEEPER = """
import os, pathlib, sys, time
pathlib.Path(sys.argv[1], str(os.getpid())).touch()
print("asleep", flush=True)
time.sleep(600)
"""


def torchrun(folder: Path, code: str, seconds: float) -> None:
    (folder / "worker.py").write_text(code)
    run(
        [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--master-addr",
            "127.0.0.1",
            "--master-port",
            str(port()),
            str(folder / "worker.py"),
            str(folder / "pids"),
        ],
        seconds,
    )


@pytest.mark.sweep
def test_workers_that_hang_are_stopped(tmp_path: Path) -> None:
    (tmp_path / "pids").mkdir()
    with pytest.raises(AssertionError, match="asleep"):
        torchrun(tmp_path, SLEEPER, seconds=10)
    pids = os.listdir(tmp_path / "pids")
    assert len(pids) == 2
    assert not [pid for pid in pids if Path("/proc", pid).exists()]


@pytest.mark.sweep
def test_workers_that_fail_are_quoted(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no such thing"):
        torchrun(tmp_path, "raise SystemExit('no such thing')", seconds=60)

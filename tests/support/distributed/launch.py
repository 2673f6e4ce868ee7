"""Runs a worker on two processes; returns what each rank wrote."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.support.processes import ROOT

WORKERS = Path(__file__).parent / "workers"
SECONDS = 60
"""A worker that takes longer is taken to hang."""


def port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def run(command: list[str], seconds: float = SECONDS, **environment: str) -> None:
    """Run a launcher; stop it and its workers if it takes too long."""
    more = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryFile("w+") as output:  # no pipe: workers that outlive their launcher would keep it open
        process = subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **more, **environment},
            start_new_session=True,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _stop(process)
        output.seek(0)
        text = output.read()
    assert code is not None, f"it hangs:\n{text[-4000:]}"
    assert code == 0, text[-6000:]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a launcher. It has to stop its workers, which run in other sessions and do not get its signals."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(40)  # it gives them 30 s
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def torchrun(worker: str, out: Path, *arguments: str, **environment: str) -> list[Any]:
    """Run a worker on two ranks; returns what they wrote into ``out``, by rank."""
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
            str(WORKERS / f"{worker}.py"),
            str(out),
            *arguments,
        ],
        **environment,
    )
    return [torch.load(out / f"{worker}-{rank}.pt") for rank in (0, 1)]

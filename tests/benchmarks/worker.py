"""A long-lived process that holds variants of one case, as a rule one, and does a step whenever it is told to.

Lines of JSON in on stdin, one line of JSON back on stdout for each. What libraries print goes to stderr.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.cases import Case
from tests.benchmarks.counting import count
from tests.benchmarks.models import build, state_bytes, work

_M_MMAP_THRESHOLD = -3  # malloc.h


class Worker:
    """Answers "build", "step" (timed), "count" (a step's arithmetic and traffic) and "peak" (a step's memory, with the
    allocator kept from hoarding).
    """

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.steps: dict[str, Callable[[], float]] = {}
        self.loaded = 0

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what is asked for."""
        if request["do"] == "build":
            if request["threads"]:
                torch.set_num_threads(request["threads"])
            case = Case(**{**request["case"], "batch": tuple(request["case"]["batch"])})
            if not request["beside"]:
                self.steps.clear()
            return self._build(case, request["variant"], request["device"])
        step = self.steps[request["variant"]]
        if request["do"] == "count":
            return dict(count(step))
        return self._timed(step) if request["do"] == "step" else self._peak(step)

    def _build(self, case: Case, variant: str, device: str) -> dict[str, Any]:
        self.device = torch.device(device)
        self.steps.pop(variant, None)
        # A tiny one first: the pages of the libraries' code, and their thread pools, are no part of a step's memory.
        tiny = replace(case, vocabulary=500, width=256, rows=10, batch=(1, 16), keep=0, layers=1)
        work(tiny, build(tiny, variant, self.device), self.device)()
        model = build(case, variant, self.device)
        self.steps[variant] = work(case, model, self.device)
        _release()
        self.loaded = self._held()
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return {
            "loaded_bytes": self.loaded,
            "trained_parameters": trained,
            "threads": torch.get_num_threads(),
            "state_bytes": state_bytes(case, model),
        }

    def _timed(self, step: Callable[[], float]) -> dict[str, Any]:
        gc.collect()
        start, processor = time.perf_counter(), time.process_time()
        value = step()
        self._wait()
        return {
            "seconds": time.perf_counter() - start,
            "processor_seconds": time.process_time() - processor,
            "value": value,
        }

    def _peak(self, step: Callable[[], float]) -> dict[str, Any]:
        _release(exact=True)
        self._reset_peak()
        step()
        self._wait()
        cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if cuda else _status("VmHWM")
        return {"peak_bytes": peak - self.loaded}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _held(self) -> int:
        if self.device.type == "cuda":
            self._wait()
            return torch.cuda.memory_allocated(self.device)
        return _status("VmRSS")

    def _reset_peak(self) -> None:
        self._wait()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with suppress(OSError):  # elsewhere than on Linux the peak is the process's whole life's
            Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    """A line of /proc/self/status in bytes; without one, the process's largest resident size."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _release(*, exact: bool = False) -> None:
    """Give freed memory back to the system, so that it is not counted.

    Args:
        exact: From now on do so with every tensor above 1 MiB at once. glibc keeps them below 32 MiB, or not, by
            what it has seen: tens of megabytes of noise in a peak. It costs page faults, so timed steps come before.
    """
    gc.collect()
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        if exact:
            libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        libc.malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    """Serve until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except Exception:  # the parent shows it and ends this process
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()

"""Runs a scenario once for each system call that it makes, with a fault at that call, and checks what is left.

``python -m tests.faults.sweep FAULT... [--scenario NAME] [--every N]`` prints a line of JSON for each scenario and
fault.
"""

from __future__ import annotations

import argparse
import errno
import json
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import embedsurgery as es
from embedsurgery.errors import CheckpointError, EmbedSurgeryError, UnfinishedError
from embedsurgery.files.locking import journal_segments
from embedsurgery.loading import open_store
from tests.faults.scenarios import SCENARIOS, Scenario, Snapshot
from tests.faults.tracer import BROKEN, COUNTED, DONE, INTERRUPTED, RAISED, Fault, Outcome, run

ALLOWED = (EmbedSurgeryError, OSError)
"""Errors that a run may raise when a call fails."""

_NEEDS_SPACE = (
    "openat",
    "write",
    "pwrite64",
    "copy_file_range",
    "sendfile",
    "fallocate",
    "mkdir",
    "mkdirat",
    "link",
    "linkat",
)
_NEEDS_DISK = ("fsync", "fdatasync", "rename", "renameat2", "unlink", "ftruncate")


def kill(name: str) -> Fault | None:
    """A kill at every call."""
    return Fault()


def tear(name: str) -> Fault | None:
    """Half of every write, then a kill."""
    return Fault(kind="tear") if name in COUNTED else None


def full(name: str) -> Fault | None:
    """A full disk at every call that needs space, once: there is space again for the rollback."""
    return Fault(kind="errno", number=errno.ENOSPC) if name in _NEEDS_SPACE else None


def full_for_good(name: str) -> Fault | None:
    """A full disk from every call that needs space on."""
    return Fault(kind="errno", number=errno.ENOSPC, ever=_NEEDS_SPACE) if name in _NEEDS_SPACE else None


def broken(name: str) -> Fault | None:
    """An I/O error at every call that syncs, renames or removes."""
    return Fault(kind="errno", number=errno.EIO) if name in _NEEDS_DISK else None


def interrupt(name: str) -> Fault | None:
    """Ctrl-C at every call."""
    return Fault(kind="signal", number=signal.SIGINT)


FAULTS: dict[str, Callable[[str], Fault | None]] = {
    "kill": kill,
    "tear": tear,
    "full": full,
    "full-for-good": full_for_good,
    "broken": broken,
    "interrupt": interrupt,
}


class Sweep:
    """One scenario, prepared: its directory, and snapshots of it before and after."""

    def __init__(self, scenario: Scenario, folder: Path) -> None:
        self.scenario = scenario
        self.template = folder / "template"
        self.copy = folder / "copy"
        self.template.mkdir()
        scenario.prepare(self.template)
        self.before = Snapshot.of(self.template)
        self.between = bool(journal_segments(self.template / "base"))  # the operation is itself a recovery
        self.reset()
        scenario.act(self.copy)  # imports everything, so that the forked runs do not
        self.reset()
        traced = run(lambda: scenario.act(self.copy), ())
        if traced.code != DONE:
            raise RuntimeError(f"{scenario.name}: {traced.error}")
        self.calls = traced.calls
        self.after = Snapshot.of(self.copy)
        if self.between:
            scenario.base(folder / "base")
            if self.after.files != {f"base/{name}": file for name, file in Snapshot.of(folder / "base").files.items()}:
                raise RuntimeError(f"{scenario.name}: the files are not those before")

    def reset(self) -> None:
        """Replace the copy by a new one of the template."""
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.template, self.copy, symlinks=True)

    def faults(self, of: Callable[[str], Fault | None], every: int) -> Iterator[Fault]:
        """Faults of one kind at the calls of the scenario."""
        found = [(place, of(call.partition(" ")[0])) for place, call in enumerate(self.calls, 1)]
        for place, fault in [(place, fault) for place, fault in found if fault is not None][::every]:
            yield replace(fault, at=place)

    def try_one(self, fault: Fault) -> str | None:
        """Run with a fault, recover, run again; return what is wrong, or None."""
        self.reset()
        outcome = run(lambda: self.scenario.act(self.copy), ALLOWED, fault)
        wrong = self._check_before_recovery(fault, outcome)
        if wrong is None:
            wrong = self._check_recovery()
        return wrong and f"{self.scenario.name}: {fault} at {self.calls[fault.at - 1]}: {wrong} [{outcome.error}]"

    def _check_before_recovery(self, fault: Fault, outcome: Outcome) -> str | None:
        """Check what must hold before any recovery."""
        base = self.copy / "base"
        now = Snapshot.of(self.copy)
        whole = now.files in (self.before.files, self.after.files)
        if fault.kind in ("kill", "tear") or fault.ever:
            if fault.ever and outcome.code not in (DONE, RAISED):
                return f"exit code {outcome.code}"
            if not fault.ever and outcome.code != -signal.SIGKILL:
                return f"not killed, exit code {outcome.code}"
            if whole and not journal_segments(base):
                return None
            try:
                open_store(base)
            except UnfinishedError as error:
                return None if "embedsurgery recover" in (error.hint or "") else f"no hint in: {error}"
            return "the files are half changed, and no error says so"
        if outcome.code == BROKEN or outcome.code not in (DONE, RAISED, INTERRUPTED):
            return f"exit code {outcome.code}"
        if self.between:
            return None
        if journal_segments(base) or not whole:
            return "not rolled back"
        if fault.kind == "signal" and now.state not in (self.before.state, self.after.state):
            return f"left behind: {sorted(now.state - self.before.state - self.after.state)}"
        if outcome.code == DONE and now.files != self.after.files:
            return "it reported success"
        return None

    def _check_recovery(self) -> str | None:
        """Check what must hold after a recovery, and after running the scenario again."""
        try:
            es.recover_checkpoint(self.copy / self.scenario.target)
        except CheckpointError as error:
            if (self.copy / self.scenario.target).exists():
                return f"recover refused: {error}"
        now = Snapshot.of(self.copy)
        if now.files == self.before.files and not self.between:
            if now.state != self.before.state:
                return f"left after recovery: {sorted(now.state ^ self.before.state)}"
            if now.times != self.before.times:
                changed = [name for name in now.times if now.times[name] != self.before.times[name]]
                return f"other times after recovery: {changed}"
            self.scenario.act(self.copy)
            now = Snapshot.of(self.copy)
        if now.files != self.after.files:
            return "the files are neither as before nor as after"
        if now.state != self.after.state:
            return f"left at the end: {sorted(now.state ^ self.after.state)}"
        return None


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("faults", nargs="+", choices=list(FAULTS))
    parser.add_argument("--scenario", action="append", choices=list(SCENARIOS))
    parser.add_argument("--every", type=int, default=1, metavar="N", help="Every N-th call only.")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    for name in options.scenario or SCENARIOS:
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
            sweep = Sweep(SCENARIOS[name], Path(folder))
            for kind in options.faults:
                faults = list(sweep.faults(FAULTS[kind], options.every))
                wrong = [text for text in map(sweep.try_one, faults) if text is not None]
                line: dict[str, Any] = {"scenario": name, "fault": kind, "calls": len(sweep.calls), "runs": len(faults)}
                print(json.dumps({**line, "wrong": wrong}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

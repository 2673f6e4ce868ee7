"""Does what a scenario does once for each system call that it makes, with a fault there, and checks what is left.

``python -m tests.faults.sweep FAULT... [--scenario NAME] [--every N]`` prints a line of JSON for each of both.
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
from embedsurgery.files.locking import segments
from embedsurgery.loading import open_store
from tests.faults.scenarios import SCENARIOS, Scenario, Snapshot
from tests.faults.tracer import BROKEN, COUNTED, DONE, INTERRUPTED, RAISED, Fault, Outcome, run

ALLOWED = (EmbedSurgeryError, OSError)
"""What a run may raise when a call fails."""

_ROOM = (
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
_DISK = ("fsync", "fdatasync", "rename", "renameat2", "unlink", "ftruncate")


def kill(name: str) -> Fault | None:
    """A kill at every call."""
    return Fault()


def tear(name: str) -> Fault | None:
    """Half of every write, and a kill."""
    return Fault(kind="tear") if name in COUNTED else None


def full(name: str) -> Fault | None:
    """No space at every call that needs some, once: there is room again to take things back."""
    return Fault(kind="errno", number=errno.ENOSPC) if name in _ROOM else None


def full_for_good(name: str) -> Fault | None:
    """No space from every call on that needs some."""
    return Fault(kind="errno", number=errno.ENOSPC, ever=_ROOM) if name in _ROOM else None


def broken(name: str) -> Fault | None:
    """An input or output error at every call that syncs, renames or removes."""
    return Fault(kind="errno", number=errno.EIO) if name in _DISK else None


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
    """One scenario, prepared: the directory as it is before, and what it is before and after."""

    def __init__(self, scenario: Scenario, folder: Path) -> None:
        self.scenario = scenario
        self.template = folder / "template"
        self.copy = folder / "copy"
        self.template.mkdir()
        scenario.prepare(self.template)
        self.before = Snapshot.of(self.template)
        self.between = bool(segments(self.template / "base"))  # what is done is itself a recovery
        self.fresh()
        scenario.act(self.copy)  # here, so that what it imports is imported before a process is forked for each run
        self.fresh()
        traced = run(lambda: scenario.act(self.copy), ())
        if traced.code != DONE:
            raise RuntimeError(f"{scenario.name}: {traced.said}")
        self.calls = traced.calls
        self.after = Snapshot.of(self.copy)
        if self.between:
            scenario.base(folder / "base")
            if self.after.files != {f"base/{name}": file for name, file in Snapshot.of(folder / "base").files.items()}:
                raise RuntimeError(f"{scenario.name}: not what was there before")

    def fresh(self) -> None:
        """A new copy of the template."""
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.template, self.copy, symlinks=True)

    def faults(self, of: Callable[[str], Fault | None], every: int) -> Iterator[Fault]:
        """The faults of one sort."""
        found = [(place, of(call.partition(" ")[0])) for place, call in enumerate(self.calls, 1)]
        for place, fault in [(place, fault) for place, fault in found if fault is not None][::every]:
            yield replace(fault, at=place)

    def try_one(self, fault: Fault) -> str | None:
        """Run with a fault, recover, run again; returns what is wrong, None where nothing is."""
        self.fresh()
        outcome = run(lambda: self.scenario.act(self.copy), ALLOWED, fault)
        wrong = self._at_once(fault, outcome)
        if wrong is None:
            wrong = self._recovered()
        return wrong and f"{self.scenario.name}: {fault} at {self.calls[fault.at - 1]}: {wrong} [{outcome.said}]"

    def _at_once(self, fault: Fault, outcome: Outcome) -> str | None:
        """What must hold before anybody recovers anything."""
        base = self.copy / "base"
        now = Snapshot.of(self.copy)
        whole = now.files in (self.before.files, self.after.files)
        if fault.kind in ("kill", "tear") or fault.ever:
            if fault.ever and outcome.code not in (DONE, RAISED):
                return f"ended with {outcome.code}"
            if not fault.ever and outcome.code != -signal.SIGKILL:
                return f"not killed but {outcome.code}"
            if whole and not segments(base):
                return None
            try:
                open_store(base)
            except UnfinishedError as error:
                return None if "embedsurgery recover" in str(error) else f"no way out in: {error}"
            return "the files are in between, and nobody is told"
        if outcome.code == BROKEN or outcome.code not in (DONE, RAISED, INTERRUPTED):
            return f"ended with {outcome.code}"
        if self.between:
            return None
        if segments(base) or not whole:
            return "not taken back"
        if fault.kind == "signal" and now.ours not in (self.before.ours, self.after.ours):
            return f"left behind: {sorted(now.ours - self.before.ours - self.after.ours)}"
        if outcome.code == DONE and now.files != self.after.files:
            return "it said that it was done"
        return None

    def _recovered(self) -> str | None:
        """What must hold after recovery, and after the same was done again."""
        try:
            es.recover_checkpoint(self.copy / self.scenario.target)
        except CheckpointError as error:
            if (self.copy / self.scenario.target).exists():
                return f"recover refused: {error}"
        now = Snapshot.of(self.copy)
        if now.files == self.before.files and not self.between:
            if now.ours != self.before.ours:
                return f"left after recovery: {sorted(now.ours ^ self.before.ours)}"
            if now.times != self.before.times:
                changed = [name for name in now.times if now.times[name] != self.before.times[name]]
                return f"other times after recovery: {changed}"
            self.scenario.act(self.copy)
            now = Snapshot.of(self.copy)
        if now.files != self.after.files:
            return "neither as before nor as after"
        if now.ours != self.after.ours:
            return f"left at the end: {sorted(now.ours ^ self.after.ours)}"
        return None


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("faults", nargs="+", choices=list(FAULTS))
    parser.add_argument("--scenario", action="append", choices=list(SCENARIOS))
    parser.add_argument("--every", type=int, default=1, metavar="N", help="Every N-th call only.")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    for name in options.scenario or SCENARIOS:
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
            sweep = Sweep(SCENARIOS[name], Path(folder))
            for sort in options.faults:
                faults = list(sweep.faults(FAULTS[sort], options.every))
                wrong = [text for text in map(sweep.try_one, faults) if text is not None]
                line: dict[str, Any] = {"scenario": name, "fault": sort, "calls": len(sweep.calls), "runs": len(faults)}
                print(json.dumps({**line, "wrong": wrong}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

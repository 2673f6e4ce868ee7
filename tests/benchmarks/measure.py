"""Runs a case: one process for each variant, asked in turn for one step at a time, and the ratios of what they say."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.benchmarks.cases import Case

ROOT = Path(__file__).resolve().parents[2]
WARM_UP = 2
PEAKS = 2
ROUNDS = 3
"""How often the processes are started anew: the pages that one is given make it some per cent slower or faster."""
FLOOR = 1 << 20
"""Peaks below this many bytes are taken as this many in ratios of peaks."""


class Child:
    """The parent's end of a worker."""

    def __init__(self) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.worker"],
            cwd=ROOT,
            text=True,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def send(self, **request: Any) -> None:
        """Ask, without waiting for the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Wait for the answer.

        Raises:
            RuntimeError: The worker failed, or is gone (for instance killed for want of memory).
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with code {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def groups(case: Case, variants: list[str], available: int) -> tuple[list[list[str]], list[str]]:
    """Which variants run beside each other: all, if they fit; else each with the base alone. And those that never fit.

    Args:
        available: Bytes.
    """
    others = [v for v in variants if v != "base"]
    if _fits(case, ["base", *others], available):
        return [["base", *others]], []
    paired = [v for v in others if _fits(case, ["base", v], available)]
    return [["base", v] for v in paired], [v for v in others if v not in paired]


def _fits(case: Case, variants: list[str], available: int) -> bool:
    needs = [case.estimate(variant) for variant in variants]
    return sum(resident for resident, _ in needs) + max(step for _, step in needs) < available


class Pool:
    """Workers by variant: fresh ones for each group of a case, or, where time is short, the same for all."""

    def __init__(self, *, fresh: bool) -> None:
        self.fresh = fresh
        self.children: dict[str, Child] = {}

    def take(self, variants: list[str]) -> dict[str, Child]:
        """A worker for each."""
        if self.fresh:
            self.close()
        for variant in variants:
            if variant not in self.children:
                self.children[variant] = Child()
        return {variant: self.children[variant] for variant in variants}

    def take_one(self, variants: list[str]) -> dict[str, Child]:
        """One fresh worker for all of them."""
        self.close()
        child = self.children[""] = Child()
        return dict.fromkeys(variants, child)

    def close(self) -> None:
        """End them all."""
        while self.children:
            self.children.popitem()[1].close()


def run(
    case: Case, variants: list[str], pool: Pool, available: int, *, together: bool = False, **settings: Any
) -> dict[str, Any]:
    """Measure a case.

    Args:
        case: What to measure.
        variants: Of those, what fits.
        pool: Where the workers come from.
        available: Bytes of memory that may be used.
        together: Time the steps in one process; counts and peaks are taken in processes of their own all the same.
        settings: ``device`` and ``threads``, for the workers.

    Returns:
        The case, and for each variant its seconds, peaks, arithmetic and traffic, and their ratios to the base's; and,
        where embedsurgery ran beside them, how many times longer PEFT took, and its ratios to the floor.
    """
    beside, left_out = groups(case, variants, available)
    found: dict[str, Any] = {}
    for group in beside:
        raw = _rounds(case, pool, group, settings, together)
        for variant in group:
            if variant not in found:
                found[variant] = summary(raw[variant], raw["base"])
        if {"embedsurgery", "floor"} <= raw.keys():
            found["embedsurgery"]["over_floor"] = _ratios(summary(raw["embedsurgery"], raw["floor"]))
        if case.repeats and {"embedsurgery", "peft"} <= raw.keys():
            for clock in ("seconds", "processor_seconds"):
                found["embedsurgery"][f"faster_than_peft_{clock}"] = _paired(raw["peft"], raw["embedsurgery"], clock)
    return {"case": case.as_dict(), "variants": found, "left_out": left_out, "groups": beside}


def _rounds(
    case: Case, pool: Pool, group: list[str], settings: dict[str, Any], together: bool
) -> dict[str, dict[str, Any]]:
    """The case's steps, spread over processes that are started anew; counts and peaks are the first ones'."""
    count = min(ROUNDS, case.repeats) if pool.fresh and case.repeats else 1
    parts = [case.repeats // count + (number < case.repeats % count) for number in range(count)]
    if together and case.repeats:
        parts = [0, case.repeats]
    raw = _alternate(replace(case, repeats=parts[0]), pool.take(group), settings)
    for part in parts[1:]:
        children = pool.take_one(group) if together else pool.take(group)
        again = _alternate(replace(case, repeats=part), children, settings, timed_alone=True)
        for variant in group:
            for field in ("seconds", "processor_seconds"):
                raw[variant][field] += again[variant][field]
    return raw


def _alternate(
    case: Case, children: dict[str, Child], settings: dict[str, Any], *, timed_alone: bool = False
) -> dict[str, dict[str, Any]]:
    """One turn after the other, each variant one step in each, the order turning."""
    group = list(children)
    raw: dict[str, dict[str, Any]] = {}
    for variant, child in children.items():
        beside = child is children[group[0]] and variant != group[0]
        child.send(do="build", case=case.as_dict(), variant=variant, beside=beside, **settings)
    for variant, child in children.items():
        raw[variant] = {**child.receive(), "seconds": [], "processor_seconds": [], "peaks": [], "values": []}
    for turn in range(WARM_UP + case.repeats if case.repeats else 1):  # one finds out what the first step does beside
        first = turn % len(group)
        for variant in group[first:] + group[:first]:
            children[variant].send(do="step", variant=variant)
            answer = children[variant].receive()
            raw[variant]["values"].append(answer["value"])
            if turn >= WARM_UP:
                raw[variant]["seconds"].append(answer["seconds"])
                raw[variant]["processor_seconds"].append(answer["processor_seconds"])
    for variant, child in () if timed_alone else children.items():
        child.send(do="count", variant=variant)
        raw[variant].update(child.receive())
        for _ in range(PEAKS):
            child.send(do="peak", variant=variant)
            raw[variant]["peaks"].append(child.receive()["peak_bytes"])
    return raw


def summary(raw: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Medians and paired ratios of a variant against the base that ran beside it."""
    peak = statistics.median(raw["peaks"])
    base_peak = statistics.median(base["peaks"])
    stateless = peak - raw["state_bytes"]
    return {
        **raw,
        **(_times(raw, base) if raw["seconds"] else {}),
        "arithmetic_ratio": raw["arithmetic"] / max(base["arithmetic"], 1),
        "traffic_ratio": raw["traffic_bytes"] / max(base["traffic_bytes"], 1),
        "peak_bytes": peak,
        "peak_ratio": max(peak, FLOOR) / max(base_peak, FLOOR),
        "peak_ratio_without_state": max(stateless, FLOOR) / max(base_peak, FLOOR),
    }


def _ratios(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if "_ratio" in name}


def _times(raw: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    return {
        "median_seconds": statistics.median(raw["seconds"]),
        "median_processor_seconds": statistics.median(raw["processor_seconds"]),
        "time_ratio": _paired(raw, base, "seconds"),
        "processor_ratio": _paired(raw, base, "processor_seconds"),
    }


def _paired(raw: dict[str, Any], base: dict[str, Any], field: str) -> dict[str, float]:
    return spread([ours / max(theirs, 1e-9) for ours, theirs in zip(raw[field], base[field], strict=True)])


def spread(ratios: list[float]) -> dict[str, float]:
    """The median and the quartiles."""
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}

"""What a step does beside the frozen base's, counted for every case, in minutes on any machine.

``python -m tests.benchmarks.counts [--cases PATTERN...] [--variants NAME...] [--json FILE]``

Counts depend on the sizes of tensors alone, so no large product is computed: what stands for its result is memory that
nothing was written into. Everything else runs. Under "generate" the counts are a decoded token's.
"""

from __future__ import annotations

import argparse
import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.benchmarks.cases import VARIANTS, Case, choose, main_cases
from tests.benchmarks.counting import count
from tests.benchmarks.models import build, work
from tests.benchmarks.training import describe

_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm"})
_SMALL = 1 << 16
"""Products of fewer elements are computed."""


class Unwritten(TorchDispatchMode):
    """Gives memory that nothing was written into for each large product."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.partition("::")[2] in _PRODUCTS and func._overloadname in ("default", "out"):
            left, right = args[-2:]
            shape = (*left.shape[:-1], right.shape[-1])
            if left.numel() + right.numel() > _SMALL:
                given = (kwargs or {}).get("out")
                return torch.empty(shape, dtype=left.dtype, device=left.device) if given is None else given
        return func(*args, **(kwargs or {}))


def counts(case: Case, variant: str, *, dry: bool = True) -> dict[str, int]:
    """A step's arithmetic and traffic, after one that is not counted.

    Args:
        case: What the step does.
        variant: Which of the case's variants.
        dry: Whether large products are left out.
    """
    step = work(case, build(case, variant, torch.device("cpu")), torch.device("cpu"))
    if not dry:
        step()
        return count(step)
    with Unwritten():
        step()
        found = count(step)
    if not case.work.endswith("generate"):
        return found
    shorter = replace(case, batch=(case.batch[0], 1))  # what comes before the second token is no token's
    with Unwritten():
        first = count(work(shorter, build(shorter, variant, torch.device("cpu")), torch.device("cpu")))
    return {name: (found[name] - first[name]) // (case.batch[1] - 1) for name in found}


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.counts")
    parser.add_argument("--cases", nargs="+", metavar="PATTERN", default=["train/*", "lookup/*", "generate/*"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS[1:], default=["floor", "embedsurgery"])
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(arguments)
    results = []
    print("| case | " + " | ".join(f"{v}: arithmetic, traffic" for v in options.variants) + " |")
    print("| --- |" + " --- |" * len(options.variants))
    for case in choose(main_cases(), options.cases):
        found: dict[str, dict[str, Any]] = {}
        for variant in ("base", *(v for v in options.variants if v in case.variants)):
            found[variant] = dict(counts(case, variant))
            gc.collect()
        for each in found.values():
            for name in ("arithmetic", "traffic_bytes"):
                each[f"{name}_ratio"] = each[name] / max(found["base"][name], 1)
        results.append({"case": case.as_dict(), "variants": found})
        print(
            f"| {describe(case.as_dict())} | " + " | ".join(_shown(found.get(v)) for v in options.variants) + " |",
            flush=True,
        )
        if options.json:
            Path(options.json).write_text(json.dumps(results, indent=1) + "\n")
    return 0


def _shown(found: dict[str, Any] | None) -> str:
    return "-" if found is None else f"{found['arithmetic_ratio']:.4f}, {found['traffic_bytes_ratio']:.4f}"


if __name__ == "__main__":
    raise SystemExit(main())

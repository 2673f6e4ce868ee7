"""What training rows costs beside a frozen model, PEFT, and a fully trained embedding.

``python -m tests.benchmarks.training [--quick] [--cases PATTERN...] [--json FILE] [--plots DIR]``

Each variant of a case lives in its own process; the parent asks them in turn for one step at a time, so that the
machine's noise hits all alike, and reports the median and the quartiles of the paired ratios to the frozen base. The
processes are started anew twice in between: by the pages that it is given, one is slower than its like for life.
``--together`` times them in one process instead, which needs the memory of all and is the steadier.

- base: every parameter frozen. The embedding's output requires a gradient, as gradient checkpointing has it, so that
  the backward runs through the whole model; this holds for all variants.
- floor: the base with the rows in its table already, and a plain parameter of K rows beside it that gets their
  gradient by one product and one sum, and the optimizer's step: what K trainable rows cost however they are reached.
- embedsurgery, peft: the K rows are trained, AdamW. full: the whole embedding is, AdamW. In the cases called "prompt"
  a soft prompt of n virtual tokens is, and the base has none.

A training step is the forward, the library's loss over the logits, the backward, and the optimizer's step. "answers"
are cases with logits and loss at the last 16 positions of a sample only, as in training on answers: there the logits
hide less. A quarter of the batch's tokens are among the K. Memory is the peak during a step over the loaded model, the
optimizer's state included: resident size on a CPU, the allocator's own count on a GPU. Cases that the free memory does
not hold are left out and named; PEFT and the full embedding then run with the base alone. Arithmetic and memory traffic
are counted (``counting.py``), and so are the same wherever this runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.benchmarks.cases import VARIANTS, Case, choose, main_cases, quick_cases, sweep_cases
from tests.benchmarks.measure import Pool, run

CLOCKS = {"wall": ("median_seconds", "time_ratio"), "processor": ("median_processor_seconds", "processor_ratio")}


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    options = _parser().parse_args(arguments)
    cases = _chosen(options)
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    device = options.device or _device()
    report: dict[str, Any] = {"machine": machine(device), "results": [], "skipped": []}
    print(
        f"{report['machine']['device']}, {report['machine']['cores']} cores, "
        + ", ".join(f"{k} {v}" for k, v in report["machine"]["versions"].items()),
        file=sys.stderr,
    )
    pool = Pool(fresh=not options.quick)
    try:
        for case in cases:
            _measure(case, options, pool, device, report)
            if options.json:
                Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    finally:
        pool.close()
    print(table(report["results"], options.clock))
    for skipped in report["skipped"]:
        print(f"\nskipped: {skipped['case']} ({skipped['why']})")
    if options.plots:
        from tests.benchmarks.plots import draw

        for path in draw(report["results"], Path(options.plots)):
            print(f"wrote {path}", file=sys.stderr)
    return 0


def _measure(case: Case, options: argparse.Namespace, pool: Pool, device: str, report: dict[str, Any]) -> None:
    start = time.monotonic()
    wanted = [v for v in VARIANTS if v in case.variants and v in ("base", *options.variants)]
    if case.name.startswith("sweep") and "full" in wanted:
        wanted.remove("full")
    if options.repeats is not None:
        case = Case(**{**case.as_dict(), "repeats": options.repeats})
    free = available_memory(device)
    try:
        result = run(
            case, wanted, pool, int(free * 0.9), device=device, threads=options.threads, together=options.together
        )
    except RuntimeError as error:  # a worker that the system killed for want of memory is one
        pool.close()
        report["skipped"].append({"case": case.name, "why": str(error)})
        print(f"{case.name}: {error}", file=sys.stderr)
        return
    if len(result["variants"]) < 2:
        report["skipped"].append(
            {"case": case.name, "why": f"needs more than the {free / 2**30:.1f} GiB that are free"}
        )
        print(f"{case.name}: skipped", file=sys.stderr)
        return
    report["results"].append(result)
    said = ", ".join(
        f"{v} {r['traffic_ratio']:.3f} traffic {r['peak_ratio']:.3f} peak{_time(r, options.clock)}"
        for v, r in result["variants"].items()
        if v != "base"
    )
    print(f"{case.name}: {said} ({time.monotonic() - start:.0f} s)", file=sys.stderr)


def _time(found: dict[str, Any], clock: str) -> str:
    ratio = found.get(CLOCKS[clock][1])
    return "" if ratio is None else f" {ratio['median']:.3f} time"


def table(results: list[dict[str, Any]], clock: str) -> str:
    """Markdown: three lines for each case, ratios to the frozen base with their quartiles."""
    lines = [
        "| case | frozen base | floor | embedsurgery | PEFT | full embedding |",
        "| --- |" + " --- |" * len(VARIANTS),
    ]
    median, ratio = CLOCKS[clock]
    for result in results:
        case, found = result["case"], result["variants"]
        base = found["base"]
        count, unit = (case["batch"][1], " a token") if case["work"].endswith("generate") else (1, "")
        if median in base:
            times = [f"{1000 * base[median] / count:,.4g} ms{unit}"]
            times += [_ratio(found[v][ratio]) if v in found else "-" for v in VARIANTS[1:]]
            lines.append(f"| {describe(case)}: {clock} time | " + " | ".join(times) + " |")
        peaks = [_megabytes(base["peak_bytes"])]
        peaks += [_peak(case, found[v]) if v in found else "-" for v in VARIANTS[1:]]
        lines.append(f"| {describe(case)}: peak memory | " + " | ".join(peaks) + " |")
        counts = [f"{base['arithmetic'] / 1e9:,.4g} GFLOP, {_megabytes(base['traffic_bytes'])}"]
        counts += [_counted(case, found[v]) if v in found else "-" for v in VARIANTS[1:]]
        lines.append(f"| {describe(case)}: arithmetic, memory traffic | " + " | ".join(counts) + " |")
    return "\n".join(lines)


def _counted(case: dict[str, Any], found: dict[str, Any]) -> str:
    if case["work"] == "lookup":  # which has no products
        return f"-, {found['traffic_ratio']:.3g}"
    return f"{found['arithmetic_ratio']:.3f}, {found['traffic_ratio']:.3f}"


def _peak(case: dict[str, Any], found: dict[str, Any]) -> str:
    if case["work"] not in ("train", "prompt"):  # the base takes next to nothing there
        return _megabytes(found["peak_bytes"])
    ratio, stateless = found["peak_ratio"], found["peak_ratio_without_state"]
    return f"{ratio:.2f}" + (f" ({stateless:.2f} without AdamW's state)" if ratio - stateless > 0.02 else "")


def describe(case: dict[str, Any]) -> str:
    """A case in words."""
    count = f"{'n' if case['work'].startswith('prompt') else 'K'}={case['rows']:,}"
    words = [case["work"], f"V={case['vocabulary']:,}", f"D={case['width']:,}", count]
    if case["work"] != "lookup":
        words.append("tied" if case["tied"] else "untied")
    if case["dtype"] != "float32":
        words.append(case["dtype"])
    if not case["work"].endswith("generate"):
        words.append("{} x {:,}".format(*case["batch"]))
    if case.get("consecutive"):
        words.append("the last rows")
    if case["keep"]:
        words.append(f"loss over {case['keep']}")
    return ", ".join(words)


def _ratio(found: dict[str, float]) -> str:
    digits = 2 if found["median"] < 10 else 0
    return f"{found['median']:.{digits}f} ({found['low']:.{digits}f}-{found['high']:.{digits}f})"


def _megabytes(count: float) -> str:
    return f"{max(count, 0) / 1e6:,.0f} MB"


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    names = ("embedsurgery", "torch", "transformers", "peft")
    return {
        "device": _device_name(device),
        "kind": device,
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load": list(os.getloadavg()),
        "memory_bytes": available_memory(device),
        "versions": {n: version(n) for n in names},
    }


def _device_name(device: str) -> str:
    if device != "cpu":
        import torch

        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def available_memory(device: str) -> int:
    """Bytes that may be taken."""
    if device != "cpu":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _chosen(options: argparse.Namespace) -> list[Case]:
    every = quick_cases() if options.quick else main_cases() + sweep_cases()
    if options.cases:
        return choose(every, options.cases)
    return [case for case in every if options.plots or not case.name.startswith("sweep")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.training", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that everything runs")
    parser.add_argument("--cases", nargs="+", metavar="PATTERN", help="only those, for instance 'lookup/*'")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS[1:], default=list(VARIANTS[1:]), help="beside the base"
    )
    parser.add_argument("--repeats", type=int, help="timed steps of each variant; 0 counts alone")
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="shown in the table and the plots; processor time, best with --threads 1, is the steadier "
        "one on a machine that does other work",
    )
    parser.add_argument("--threads", type=int, default=0, help="of each process; by default torch's choice")
    parser.add_argument(
        "--together", action="store_true", help="time the variants in one process, which has the same pages for all"
    )
    parser.add_argument("--device", help="cpu or cuda; by default cuda where there is one")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured")
    parser.add_argument(
        "--plots", metavar="DIR", help="also run the sweeps, and draw benchmark-k.png and benchmark-v.png"
    )
    parser.add_argument("--list", action="store_true", help="print the cases' names and stop")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())

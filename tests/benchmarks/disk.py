"""What surgery on disk costs beside ``cp -r`` of the same checkpoint, PEFT's load-merge-save, and mergekit.

``python -m tests.benchmarks.disk [--gigabytes 4] [--repeats 5] [--directory DIR] [--mergekit SITE] [--json FILE]``

A synthetic bf16 Llama in shards of 0.9 GB, its embedding and head V=128,000 by D=2,048, and an adapter of 100 rows.
Every way runs in a process of its own, in turn, and what it writes is fsynced (``cp -r`` by ``sync`` of its files; PEFT
and mergekit as they are, which is without). Reported: seconds of the whole process, interpreter start included, and the
median of the paired ratios to ``cp -r``; its processor time; its peak resident size; the bytes that it asked the kernel
to write. "the call alone" is timed without the interpreter's start and imports, the second time that a process does it;
its other columns are of the whole process.

Then `inspect` and a merge in place on a checkpoint of ``--large`` gigabytes in some 60 sparse files, beside the same on
the first one. mergekit is run where ``--mergekit`` names a directory that it was installed into
(``pip install --no-deps --target SITE mergekit immutables``).
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import embedsurgery as es
from embedsurgery.adapters.adapter import Adapter
from embedsurgery.stores.shards import ShardStore
from embedsurgery.surgeries.surgery import Base
from embedsurgery.surgeries.trainable_tokens.surgery import TrainableTokens
from embedsurgery.tensors.raw import RawArray
from tests.benchmarks.checkpoints import ROWS, SPARE, TABLE, Size, make

CHANGED = 100
BIG_TOKENIZER = 200
"""Characters of a token of the large ``tokenizer.json``: about 28 MB."""

_CP = (
    "import subprocess, sys; a, b = sys.argv[1:3]; subprocess.run(['cp', '-r', a, b], check=True); "
    "subprocess.run(['find', b, '-type', 'f', '-exec', 'sync', '{}', '+'], check=True)"
)
_CLI = "from embedsurgery.cli.main import main; main()"
_CALLS = """
import sys, time
import embedsurgery as es
there = lambda: es.merge_checkpoint(sys.argv[1], sys.argv[2], in_place=True)
back = lambda: es.unmerge_checkpoint(sys.argv[1], in_place=True)
first, second = (there, back) if sys.argv[3] == "merge" else (back, there)
first(), second()
began = time.perf_counter()
first()
print("took", time.perf_counter() - began, file=sys.stderr)
"""
_PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3], max_shard_size="900MB")
"""
_MERGEKIT = """
import sys
sys.path.append(sys.argv[1])
from mergekit.scripts.run_yaml import main
main(sys.argv[2:], standalone_mode=False)
"""


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--large", type=float, default=100.0, help="Gigabytes of the sparse checkpoint; 0: none.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--slow", type=int, default=1, help="Repeats of PEFT and mergekit.")
    parser.add_argument("--directory", type=Path, help="Where to work; by default the temporary directory.")
    parser.add_argument("--mergekit", type=Path, metavar="SITE")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    compileall.compile_dir(Path(es.__file__ or "").parent, quiet=1)  # as an installation has it
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        folder = Path(name)
        report = {"gigabytes": options.gigabytes, "ways": measure(folder, options)}
        report["same time"] = grown(folder, options) if options.large else {}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    return 0


def measure(folder: Path, options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Every way of changing the first checkpoint, in turn, ``repeats`` times; the slow ones fewer."""
    base = make(folder / "base", Size.of(int(options.gigabytes * 1e9)))
    adapter, out = str(adapt(base).save(folder / "adapter")), folder / "out"
    texts = make(folder / "texts", Size(256, 256, 1), text=BIG_TOKENIZER)
    beyond = [part for number in range(SPARE + 1) for part in ("--token", f"<tool {number}>")]
    ways: dict[str, list[str]] = {
        "cp -r": [_CP, str(base), str(out)],
        "merge -o": [_CLI, "merge", str(base), adapter, "-o", str(out)],
        "merge -o --hardlink": [_CLI, "merge", str(base), adapter, "-o", str(out), "--hardlink"],
        "merge --in-place": [_CLI, "merge", str(base), adapter, "--in-place"],
        "unmerge --in-place": [_CLI, "unmerge", str(base), "--in-place"],
        "es.merge_checkpoint(in_place=True), the call alone": [_CALLS, str(base), adapter, "merge"],
        "es.unmerge_checkpoint(in_place=True), the call alone": [_CALLS, str(base), adapter, "unmerge"],
        "tokens add -o, spare row": [_CLI, "tokens", "add", str(base), "--token", "<tool>", "-o", str(out)],
        "tokens add -o, tables grow": [_CLI, "tokens", "add", str(base), *beyond, "-o", str(out)],
        "tokens add -o, spare row, tokenizer.json of 28 MB": [
            _CLI,
            "tokens",
            "add",
            str(texts),
            "--token",
            "<tool>",
            "-o",
            str(out),
        ],
    }
    slow = {"PEFT: load, merge_and_unload, save_pretrained": [_PEFT, str(base), adapter, str(out)]}
    if options.mergekit:
        recipe = folder / "recipe.yaml"
        recipe.write_text(f"merge_method: passthrough\ndtype: bfloat16\nmodels:\n  - model: {base}+{adapter}\n")
        slow["mergekit: base+adapter, passthrough"] = [
            _MERGEKIT,
            str(options.mergekit),
            str(recipe),
            str(out),
            "--copy-tokenizer",
            "--lazy-unpickle",
            "--lora-merge-cache",
            str(folder / "cache"),
        ]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (*ways, *slow)}
    for number in range(options.repeats):
        for name, command in (ways if number >= options.slow else {**ways, **slow}).items():
            found[name].append(run(command))
            for made in (out, folder / "cache"):
                shutil.rmtree(made, ignore_errors=True)
            os.sync()
    if len({path.stat().st_nlink for path in base.glob("*.safetensors")}) != 1:
        raise RuntimeError("the base has been linked")
    return found


def grown(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """`inspect` and a merge in place, at both sizes in turn."""
    small = folder / "base"
    large = make(folder / "large", Size.of(int(options.large * 1e9)), sparse=True)
    space = used(large)
    adapters = {small: folder / "adapter", large: adapt(large).save(folder / "adapter of large")}
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for _ in range(options.repeats):
        for model, name in ((small, "small"), (large, "large")):
            for verb, command in (
                ("inspect", ["inspect", str(model)]),
                ("merge --in-place", ["merge", str(model), str(adapters[model]), "--in-place"]),
                ("unmerge --in-place", ["unmerge", str(model), "--in-place"]),
            ):
                found.setdefault(verb, {}).setdefault(name, []).append(run([_CLI, *command]))
    files = [path.stat().st_size for path in large.glob("*.safetensors")]
    sizes = {
        "gigabytes": sum(files) / 1e9,
        "shards": len(files),
        "MB on disk before": space / 1e6,
        "MB on disk after": used(large) / 1e6,
    }
    return {"sizes": sizes, "verbs": found}


def used(folder: Path) -> int:
    """Bytes that a directory really takes, as ``du`` says."""
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir())


def adapt(base: Path) -> Adapter:
    """An adapter of rows that are spread over the table."""
    rows = [int(row) for row in np.linspace(5, ROWS - 100, CHANGED).astype(int)]
    store = ShardStore.open(base)
    started = TrainableTokens().start(es.TrainableTokensConfig(rows), store, Base())
    width = store.graph.table(TABLE).shape[1]
    values = np.random.default_rng(1).standard_normal((CHANGED, width)).astype(np.float32)
    return Adapter(started.manifest, {TABLE: RawArray.of(values)}, started.surgery)


def run(command: list[str]) -> dict[str, float]:
    """Seconds (of what it times itself, or else of all), peak resident bytes and written bytes of a process."""
    code = "import re, sys; sys.argv = ['-'] + sys.argv[1:]\n"
    code += f"try:\n    exec({command[0]!r})\nfinally:\n"
    code += "    print('peak', re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1], file=sys.stderr)\n"
    code += "    print('wrote', re.search(r'wchar: (\\d+)', open('/proc/self/io').read())[1], file=sys.stderr)\n"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    used, began = processor(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *command[1:]], capture_output=True, text=True, check=False, env=environment
    )
    seconds = time.perf_counter() - began
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    said = [line.split() for line in done.stderr.splitlines()]
    facts = {line[0]: float(line[1]) for line in said if len(line) == 2 and line[0] in ("peak", "wrote", "took")}
    return {
        "seconds": facts.get("took", seconds),
        "processor": processor() - used,
        "peak": facts["peak"] * 1024,
        "bytes": facts["wrote"],
    }


def processor() -> float:
    """Seconds of processor time that the processes have taken that this one has waited for."""
    found = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found.ru_utime + found.ru_stime


def table(report: dict[str, Any]) -> str:
    """Two Markdown tables."""
    ways = report["ways"]
    lines = [
        "| way | time, cp -r = 1 | seconds | of processor | peak MB | MB written |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, runs in ((name, runs) for name, runs in ways.items() if runs):
        ratios = [r["seconds"] / c["seconds"] for r, c in zip(runs, ways["cp -r"], strict=False)]
        seconds, used, written = (statistics.median(r[key] for r in runs) for key in ("seconds", "processor", "bytes"))
        peak = max(r["peak"] for r in runs) / 1e6
        spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(runs) > 1 else ""
        lines.append(
            f"| {name} | {statistics.median(ratios):.2f}{spread} | {seconds:.2f} | {used:.2f} "
            f"| {peak:.0f} | {written / 1e6:.1f} |"
        )
    if report["same time"]:
        sizes = report["same time"]["sizes"]
        large = f"{sizes['gigabytes']:.0f} GB in {sizes['shards']} sparse shards"
        lines += ["", f"| verb | {report['gigabytes']:.0f} GB | {large} |", "| --- | --- | --- |"]
        for verb, found in report["same time"]["verbs"].items():
            cells = [
                (statistics.median(r["seconds"] for r in runs), max(r["peak"] for r in runs) / 1e6)
                for runs in found.values()
            ]
            lines.append(f"| {verb} | {' | '.join(f'{seconds:.2f} s, {peak:.0f} MB' for seconds, peak in cells)} |")
        lines += [
            "",
            f"The sparse files took {sizes['MB on disk before']:.1f} MB on disk before and "
            f"{sizes['MB on disk after']:.1f} MB after.",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())

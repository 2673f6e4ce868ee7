"""What surgery on disk costs beside ``cp -r`` of the same checkpoint.

``python -m tests.benchmarks.disk [--gigabytes 4] [--repeats 5] [--directory DIR] [--json FILE]``

A synthetic bf16 checkpoint in shards of 0.9 GB, its embedding and head first, each V=128,000 by D=2,048, with a
tokenizer. Every way runs in a process of its own, in turn, and writes a new directory, fsynced; ``cp -r`` is followed
by ``sync`` on what it wrote. Reported are the median of the paired ratios to ``cp -r``, the peak resident size of the
process, and the size of what was written.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from embedsurgery.safetensors_file import TensorSource, write_file

ROWS, WIDTH = 128_000, 2_048
SHARD = 900_000_000
BLOCK = 1 << 24
CHANGED = (5, 77, 12_345)

_CP = "import subprocess, sys; a, b = sys.argv[1:3]; subprocess.run(['cp', '-r', a, b], check=True); " \
      "subprocess.run(['sync', '-f', b], check=True)"  # fmt: skip
_CLI = "from embedsurgery.cli.main import main; main()"


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="Where to work; by default the temporary directory.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        report = measure(Path(folder), int(options.gigabytes * 1e9), options.repeats)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    return 0


def measure(folder: Path, size: int, repeats: int) -> dict[str, Any]:
    """Every way, in turn, ``repeats`` times."""
    base, tuned = folder / "base", folder / "tuned"
    make(base, size)
    tune(base, tuned)
    ways: dict[str, Callable[[Path], list[str]]] = {
        "cp -r": lambda out: [_CP, str(base), str(out)],
        "tokens add (tables grow)": lambda out: [_CLI, "tokens", "add", str(base), "--token", "<tool>", "-o", str(out)],
        "extract": lambda out: [_CLI, "extract", str(base), str(tuned), "-o", str(out)],
        "merge of what was extracted": lambda out: [_CLI, "merge", str(base), str(folder / "adapter"), "-o", str(out)],
    }
    run(ways["extract"](folder / "adapter"))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, command in ways.items():
            out = folder / "out"
            found[name].append(run(command(out)))
            found[name][-1]["bytes"] = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
            shutil.rmtree(out)
    return {"bytes": sum(p.stat().st_size for p in base.iterdir()), "ways": found}


def run(command: list[str]) -> dict[str, float]:
    """Seconds and peak resident bytes of one process; the kernel's ``ru_maxrss`` would begin with its parent's."""
    code = "import re, sys; sys.argv = ['-'] + sys.argv[1:]\n"
    code += f"try:\n    exec({command[0]!r})\nfinally:\n"
    code += "    print('peak', re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1], file=sys.stderr)\n"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *command[1:]], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return {"seconds": seconds, "peak": float(done.stderr.rsplit("peak", 1)[1]) * 1024}


def make(folder: Path, size: int) -> None:
    """A checkpoint of about so many bytes."""
    folder.mkdir()
    table = ROWS * WIDTH * 2
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (ROWS, WIDTH), "lm_head.weight": (ROWS, WIDTH)}
    layer = (WIDTH * 4, WIDTH)
    for number in range(max(1, (size - 2 * table) // (layer[0] * layer[1] * 2))):
        names[f"model.layers.{number}.mlp.up_proj.weight"] = layer
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in names.items():
        if sum(a * b * 2 for a, b in shards[-1].values()) + shape[0] * shape[1] * 2 > SHARD and shards[-1]:
            shards.append({})
        shards[-1][name] = shape
    where = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        where.update(dict.fromkeys(shard, file))
        sources = {n: TensorSource("BF16", s, _noise(s[0] * s[1] * 2, n)) for n, s in shard.items()}
        write_file(folder / file, sources, {"format": "pt"})
    total = sum(a * b * 2 for a, b in names.values())
    _write(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    _write(folder / "config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": ROWS,
                                    "hidden_size": WIDTH, "tie_word_embeddings": False})  # fmt: skip
    vocabulary = {f"t{n}": n for n in range(ROWS)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"}
    tokenizer = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    _write(folder / "tokenizer.json", tokenizer)


def tune(base: Path, tuned: Path) -> None:
    """A copy in which a few rows of the embedding differ."""
    shutil.copytree(base, tuned)
    first = min(tuned.glob("*.safetensors"))
    with open(first, "r+b") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
        for row in CHANGED:
            file.seek(begin + row * WIDTH * 2)
            file.write(np.full(WIDTH, 0x3F80, np.uint16).tobytes())


def _noise(size: int, name: str) -> Iterator[bytes]:
    """Bytes that are finite bf16 numbers: a block of random ones, again and again."""
    values = np.random.default_rng(len(name)).standard_normal(BLOCK // 2).astype(np.float32)
    block = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    for start in range(0, size, BLOCK):
        yield block[: min(BLOCK, size - start)]


def _write(path: Path, body: object) -> None:
    path.write_text(json.dumps(body) + "\n")
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def table(report: dict[str, Any]) -> str:
    """A Markdown table."""
    ways = report["ways"]
    lines = ["| way | time, cp -r = 1 | seconds | peak MB | MB written |", "| --- | --- | --- | --- | --- |"]
    for name, runs in ways.items():
        ratios = [r["seconds"] / c["seconds"] for r, c in zip(runs, ways["cp -r"], strict=True)]
        seconds = statistics.median(r["seconds"] for r in runs)
        peak = max(r["peak"] for r in runs) / 1e6
        lines.append(f"| {name} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
                     f"| {seconds:.1f} | {peak:.0f} | {runs[0]['bytes'] / 1e6:.1f} |")  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())

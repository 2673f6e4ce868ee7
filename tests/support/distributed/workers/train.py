"""Trains every kind of model in every wrapper; writes the losses and final rows of each rank."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.support.distributed.cases import BATCH, KINDS, MANY, WRAPS, attached, train, wrap
from tests.support.distributed.mixing import MIXES, train_mix
from tests.support.distributed.setups import SETUPS, trained
from tests.support.distributed.workers import leave


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    share = slice(rank * BATCH // size, (rank + 1) * BATCH // size)

    def mean(loss: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(loss)
        return loss / size

    cases = {f"{kind} {how}": (kind, how, None, torch.float32, {}) for kind in KINDS for how in WRAPS}
    cases["one row"] = ("llama-tied", "fsdp-layers", [5], torch.float32, {})
    for how in ("ddp", "fsdp-root", "fsdp-layers"):
        for kind in ("llama-tied", "llama-untied", "bert"):
            cases[f"many rows {kind} {how}"] = (kind, how, MANY, torch.float32, {})
    cases["bf16"] = ("llama-tied", "fsdp-layers", None, torch.bfloat16, {})
    cases["resharded"] = ("llama-tied", "fsdp-root", None, torch.float32, {"reshard_after_forward": True})
    results = {}
    for name, (kind, how, rows, dtype, options) in cases.items():
        results[name] = train(wrap(attached(kind, rows, dtype), how, **options), share, mean)
    for name, setup in SETUPS.items():
        results[name] = trained(setup, rank, mean)
    for name, mix in MIXES.items():
        results[name] = train_mix(mix, share, mean)
    torch.save(results, out / f"train-{rank}.pt")
    leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))

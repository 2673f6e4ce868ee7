"""Trains under DeepSpeed's ZeRO, stages 1 to 3, and does what is refused there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

import embedsurgery as es
from embedsurgery.errors import UnsupportedError
from tests.support.distributed.cases import BATCH, ROWS, STEPS, attached, batch, loss_of
from tests.support.distributed.described import Described, describe
from tests.support.distributed.workers import leave
from tests.support.models import tiny


def engine_of(model: Any, stage: int, parameters: Any) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(),
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(parameters, lr=0.5, momentum=0.9)
    return deepspeed.initialize(model=model, model_parameters=parameters, optimizer=optimizer, config=config)[0]


def refused(action: Any) -> Described:
    try:
        action()
    except UnsupportedError as error:
        return describe(error)
    return {"type": "nothing"}


def attach_and_step(model: Any) -> None:
    es.attach(model, es.TrainableTokensConfig(ROWS))
    loss_of(model, batch(0)).backward()


def main(out: Path) -> None:
    # A kernel for inference: compiling it takes a minute, and a compiler that not every machine has.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    share = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    results: dict[str, Any] = {}
    for kind in ("llama-tied", "llama-untied"):
        for stage in (1, 2, 3):
            model = attached(kind)
            attachment = es.get_attachment(model)
            engine = engine_of(model, stage, list(attachment.parameters()))
            losses = []
            for step in range(STEPS):
                loss = loss_of(engine, batch(step)[share])
                engine.backward(loss)
                engine.step()
                total = loss.detach().clone()
                dist.all_reduce(total)
                losses.append((total / size).item())
            adapter = attachment.adapter()
            results[f"{kind} {stage}"] = {"losses": losses, "rows": adapter.tensors}
            results[f"restored {stage}"] = refused(lambda held=attachment, same=adapter: held.restore(same))
            results[f"merged {stage}"] = refused(attachment.merge)
    for stage in (2, 3):
        late = tiny("llama-tied")
        engine_of(late, stage, list(late.parameters()))
        results[f"late {stage}"] = refused(lambda model=late: attach_and_step(model))
    torch.save(results, out / f"deepspeed_zero-{rank}.pt")
    leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))

"""Trains under Accelerate, with FSDP configured by its launcher."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin

import embedsurgery as es
from embedsurgery.integrations import keep_rows
from tests.support.distributed.cases import BATCH, STEPS, attached, batch, loss_of
from tests.support.distributed.workers import leave


def main(out: Path, kind: str) -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.distributed_type == DistributedType.MULTI_CPU
    # Accelerate 1.15 refuses nothing and shards nothing on CPUs: its list of devices for FSDP lacks them
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin()  # from the launcher's environment
    model = attached(kind)
    optimizer = torch.optim.SGD(es.get_attachment(model).parameters(), lr=0.5, momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    rank, size = accelerator.process_index, accelerator.num_processes
    share = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    losses = []
    for step in range(STEPS):
        loss = loss_of(model, batch(step)[share])
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1e6)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    attachment = es.get_attachment(accelerator.unwrap_model(model))
    attachment.save(out / f"adapter-{kind}")
    rows = attachment.adapter().tensors
    keep_rows(accelerator)
    accelerator.save_state(str(out / f"state-{kind}"))
    after = []
    for _ in range(2):
        loss = loss_of(model, batch(STEPS)[share])
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        after.append({"loss": loss.item(), "rows": attachment.adapter().tensors})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the state dict holds no rows
            accelerator.load_state(str(out / f"state-{kind}"))
        after.append({"rows": attachment.adapter().tensors})
    keys = sorted(accelerator.get_state_dict(model))
    result = {
        "losses": losses,
        "rows": rows,
        "after": after,
        "keys": keys,
        "model": type(model).__name__,
        "type": str(accelerator.distributed_type),
        "fsdp": accelerator.is_fsdp2,
        "processes": size,
    }
    torch.save(result, out / f"accelerate-{kind}-{rank}.pt")
    leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])

"""Loads, saves, restores and moves rows on sharded models; writes the results of each rank."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import embedsurgery as es
from embedsurgery.adapters.adapter import Adapter
from embedsurgery.errors import AdapterError, AttachmentError
from embedsurgery.integrations import EmbedSurgeryCallback
from embedsurgery.tensors.convert import to_raw
from embedsurgery.tensors.sharded import gather_rows
from tests.support import integrations
from tests.support.distributed.cases import CHECKPOINTED, KINDS, ROWS, WRAPS, attached, batch, loss_of, targets, wrap
from tests.support.distributed.described import describe
from tests.support.distributed.workers import leave
from tests.support.models import logits, tiny


class Largest(TorchDispatchMode):
    """Records the largest number of elements of any tensor that an operation returned inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not hasattr(tensor, "_local_tensor"):
                self.numel = max(self.numel, tensor.numel())
        return out


def loaded(kind: str, how: str, adapter: Adapter) -> dict[str, Any]:
    """Attach an adapter to a model that is sharded already."""
    model = wrap(tiny(kind), how)
    seen = Largest()
    with seen:
        attachment = es.attach(model, adapter)
    with seen:
        again = attachment.adapter()
    attachment.restore(adapter)
    return {"logits": logits(model), "numel": seen.numel, "rows": again.tensors}


def restored(how: str, adapter: Adapter) -> dict[str, Any]:
    """Restore rows in place on a sharded model, after a forward that left the root gathered."""
    model = wrap(attached("llama-tied"), how)
    attachment = es.get_attachment(model)
    logits(model)
    attachment.restore(adapter)
    loss_of(model, batch(0)).backward()
    return {"logits": logits(model), "rows": attachment.adapter().tensors}


def from_meta(by_load: bool) -> dict[str, Any]:
    """Shard a model on the meta device, then load its weights in one of two ways."""
    model = attached("llama-tied")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to("meta")
    model.tie_weights()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    if by_load:
        parts = {n: distribute_tensor(state[n], p.device_mesh, p.placements) for n, p in model.state_dict().items()}
        model.load_state_dict(parts, assign=True)
        model.tie_weights()
        inverse = tiny("llama-tied").model.rotary_emb
        model.model.rotary_emb = inverse
    else:
        model.to_empty(device="cpu")
        model.model.rotary_emb = tiny("llama-tied").model.rotary_emb
        set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))
    return {"logits": logits(model), "keys": sorted(get_model_state_dict(model))}


def saved(out: Path) -> dict[str, Any]:
    """Save on all ranks; returns who wrote, what is there, and the error for a directory that cannot be written."""
    model = wrap(attached("llama-tied"), "fsdp-layers")
    calls: list[Path] = []
    save = Adapter.save
    Adapter.save = lambda self, directory: (calls.append(Path(directory)), save(self, directory))[1]
    try:
        path = es.get_attachment(model).save(out / "saved")
    finally:
        Adapter.save = save
    files = sorted(p.name for p in path.iterdir())
    (out / "file").write_text("no directory")
    errors = []
    try:
        es.get_attachment(model).save(out / "file")
    except AdapterError as error:
        errors.append(describe(error))
    return {"calls": len(calls), "files": files, "errors": errors}


def checkpoint(how: str, folder: Path) -> dict[str, Any]:
    """Resume torch's checkpoint of model and optimizer with the rows that were saved beside it, and without them."""
    model = wrap(attached("llama-tied"), how)
    optimizer = torch.optim.AdamW(es.get_attachment(model).parameters(), lr=1e-2)
    steps(model, optimizer, 0, 2)
    sharded, states = get_state_dict(inner(model), optimizer)
    dcp.save({"model": sharded, "optimizer": states}, checkpoint_id=str(folder))
    es.get_attachment(model).save(folder / "rows")
    expected = steps(model, optimizer, 2, 4)
    found: dict[str, Any] = {"expected": expected, "keys": sorted(sharded)}
    for name in ("resumed", "forgotten"):
        model = tiny("llama-tied")
        attachment = es.attach(model, es.TrainableTokensConfig(ROWS))
        model = wrap(model, how)
        optimizer = torch.optim.AdamW(attachment.parameters(), lr=1e-2)
        state = dict(zip(("model", "optimizer"), get_state_dict(inner(model), optimizer), strict=True))
        dcp.load(state, checkpoint_id=str(folder))
        set_state_dict(inner(model), optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        if name == "resumed":
            attachment.restore(es.load(folder / "rows"))
        try:
            found[name] = steps(model, optimizer, 2, 4)
        except AttachmentError as error:
            found[name] = describe(error)
    return found


def inner(model: Any) -> Any:
    """Return the model that torch.distributed.checkpoint accepts: of DDP the wrapped module."""
    return model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model


def steps(model: Any, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        loss = loss_of(model, batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def by_the_trainer(out: Path) -> dict[str, Any]:
    """Train, resume, and resume without the callback, with transformers' Trainer, which wraps in DDP."""
    options = {"ddp_backend": "gloo", "ddp_find_unused_parameters": False}
    written: list[str] = []
    save = Adapter.save
    Adapter.save = lambda self, folder: (written.append(Path(folder).relative_to(out).as_posix()), save(self, folder))[
        1
    ]
    try:
        model, attachment = integrations.attach_tiny()
        trained = integrations.trainer(model, out, callbacks=[EmbedSurgeryCallback()], **options)
        trained.train()
    finally:
        Adapter.save = save
    found = {
        "losses": integrations.losses(trained),
        "rows": integrations.rows(attachment),
        "written": written,
        "wrapper": type(trained.model_wrapped).__name__,
    }
    model, attachment = integrations.attach_tiny()
    half = str(out / "checkpoint-3")
    resumed = integrations.trainer(model, out / "more", callbacks=[EmbedSurgeryCallback(half)], **options)
    resumed.train(resume_from_checkpoint=half)
    found |= {"resumed losses": integrations.losses(resumed), "resumed rows": integrations.rows(attachment)}
    model, _ = integrations.attach_tiny()
    try:
        integrations.trainer(model, out / "no", **options).train(resume_from_checkpoint=half)
    except AttachmentError as error:
        found["forgotten"] = describe(error)
    return found


def bits() -> bool:
    """Whether rows of every layout are gathered bit for bit, including -0.0 and the payloads of NaNs."""
    size = dist.get_world_size()
    line, square = init_device_mesh("cpu", (size,)), init_device_mesh("cpu", (1, size))
    odd = torch.randint(-(2**31), 2**31, (7, 5), dtype=torch.int64).to(torch.int32).view(torch.float32)
    dist.broadcast(odd.view(torch.int32), 0)
    odd[3] = -0.0
    index = torch.tensor([6, 0, 3, 3])
    layouts = [
        (line, [Shard(0)]),
        (line, [Shard(1)]),
        (line, [Replicate()]),
        (square, [Shard(0), Shard(0)]),
        (square, [Replicate(), Shard(1)]),
    ]
    want = to_raw(odd[index])
    return all(to_raw(gather_rows(distribute_tensor(odd, mesh, where), index)) == want for mesh, where in layouts)


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    adapters = {kind: es.get_attachment(attached(kind)).adapter() for kind in KINDS}
    results: dict[str, Any] = {"bits": bits(), "saved": saved(out)}
    for kind in KINDS:
        for how in WRAPS[1:]:
            results[f"loaded {kind} {how}"] = loaded(kind, how, adapters[kind])
    fresh = es.attach(tiny("llama-tied"), es.TrainableTokensConfig(ROWS, **targets("llama-tied"))).adapter()
    for how in WRAPS:
        results[f"restored {how}"] = restored(how, fresh)
    results["meta load"], results["meta empty"] = from_meta(True), from_meta(False)
    for how in CHECKPOINTED:
        results[f"checkpoint {how}"] = checkpoint(how, out / f"checkpoint {how}")
    results["trainer"] = by_the_trainer(out / "trainer")
    torch.save(results, out / f"loading-{dist.get_rank()}.pt")
    leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))

"""Trains rows on models whose tables are DTensors in the forward: tensor parallelism by torch and by transformers."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import embedsurgery as es
from tests.support.distributed.cases import ROWS, targets, train
from tests.support.distributed.workers import leave
from tests.support.models import tiny


class Whole(nn.Module):
    """Gathers logits that a head leaves sharded, for the loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> Any:
        output = self.model(input_ids=input_ids)
        output.logits = output.logits.full_tensor()
        return output


PLANS: dict[str, dict[str, Any]] = {
    "vocabulary": {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    },
    "width": {"model.embed_tokens": ColwiseParallel(output_layouts=Replicate())},
    "sharded logits": {"lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)},
}


def started(model: nn.Module, kind: str) -> nn.Module:
    attachment = es.attach(model, es.TrainableTokensConfig(ROWS, **targets(kind)))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    results: dict[str, Any] = {}
    for kind in ("llama-tied", "llama-untied"):
        for name, plan in PLANS.items():
            if kind == "llama-tied" and name != "vocabulary":
                continue  # the other plans would untie
            model = parallelize_module(tiny(kind), mesh, plan)
            if kind == "llama-tied":
                model.lm_head.weight = model.model.embed_tokens.weight  # parallelize_module untied them
            model = started(model, kind)
            results[f"{kind} {name}"] = train(
                Whole(model) if name == "sharded logits" else model, slice(None), lambda loss: loss
            )
    for kind in ("llama-tied", "llama-untied"):
        for name, more in (("auto", {}), ("auto and embedding", {"embed_tokens": "embedding_rowwise"})):
            folder = out / f"{kind}-{name}"
            if dist.get_rank() == 0:
                model = tiny(kind)
                model.config.base_model_tp_plan = {**model.config.base_model_tp_plan, **more}
                model.save_pretrained(folder)
            dist.barrier()
            results[f"{kind} {name}"] = transformers_parallel(folder, kind, more)
    torch.save(results, out / f"tensor_parallel-{dist.get_rank()}.pt")
    leave()


def transformers_parallel(folder: Path, kind: str, more: dict[str, str]) -> Any:
    import transformers as tr

    config = tr.LlamaConfig.from_pretrained(folder)
    config.base_model_tp_plan = {**config.base_model_tp_plan, **more}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tr.LlamaForCausalLM.from_pretrained(folder, config=config, tp_plan="auto", dtype=torch.float32)
    assert any(hasattr(p, "_local_tensor") for p in model.parameters())
    return train(started(model, kind), slice(None), lambda loss: loss)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))

"""What workers and their tests share: models, batches, the training loop, and ways to wrap a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import embedsurgery as es
from tests.support.models import VOCABULARY, tiny

STEPS, BATCH, LENGTH = 3, 4, 6
ROWS = [5, 31, 7]
MANY = [5, 31, 7, *range(8, 24)]  # more rows than a process has tokens
KINDS = ("llama-tied", "llama-untied", "gpt2", "bert")
WRAPS = ("ddp", "fsdp-root", "fsdp-layers", "fsdp-own")
CHECKPOINTED = ("ddp", "fsdp-own")


def batch(step: int) -> torch.Tensor:
    """Return the ids for all processes; in the last step the second half has no trained token."""
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(8, VOCABULARY - 10, (BATCH, LENGTH), generator=generator)
    ids[0, 0], ids[1, 3] = 5, 7
    if step < STEPS - 1:
        ids[2, 1], ids[3, 4] = 31, 5
    return ids


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids).logits.float()
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def targets(kind: str) -> dict[str, Any]:
    return {"target_modules": ["embed_tokens", "lm_head"]} if kind == "llama-untied" else {}


def attached(kind: str, rows: list[int] | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a tiny model with attached rows that differ from the base's, so that the losses show the override."""
    model = tiny(kind, dtype=dtype)
    attachment = es.attach(model, es.TrainableTokensConfig(rows or ROWS, **targets(kind)))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def train(model: nn.Module, share: slice, reduce: Callable[[torch.Tensor], torch.Tensor], steps: int = STEPS) -> Any:
    """Train by SGD, which unlike Adam depends on the gradients' scale; returns all processes' losses and the rows."""
    attachment = es.get_attachment(model)
    assert attachment is not None
    optimizer = torch.optim.SGD(attachment.parameters(), lr=0.5, momentum=0.9)
    losses = []
    for step in range(steps):
        loss = loss_of(model, batch(step)[share])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(reduce(loss.detach().clone()).item())
    return {"losses": losses, "rows": attachment.adapter().tensors}


def reference(kind: str, rows: list[int] | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """Train in one process on the whole batch."""
    return train(attached(kind, rows, dtype), slice(None), lambda loss: loss)


def blocks(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__ in ("LlamaDecoderLayer", "GPT2Block", "BertLayer")]


def wrap(model: Any, how: str, **options: Any) -> nn.Module:
    """Wrap a model as a user would; with FSDP, tables belong to the root or to groups of their own."""
    from torch.distributed.fsdp import fully_shard

    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if how != "fsdp-root":
        for block in blocks(model):
            fully_shard(block, **options)
    if how == "fsdp-own":
        lookup, head = model.get_input_embeddings(), model.get_output_embeddings()
        if lookup.weight is head.weight:  # tied tables must be in one group, and so must BERT's shared bias
            fully_shard([lookup, getattr(model, "cls", head)], **options)
        else:
            fully_shard(lookup, **options)
            fully_shard(head, **options)
    return fully_shard(model, **options)

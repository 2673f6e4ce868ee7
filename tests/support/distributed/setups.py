"""Ways to train on several processes, each compared with a dense model without embedsurgery."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

import embedsurgery as es
from tests.support.distributed.cases import ROWS, loss_of, targets, wrap
from tests.support.models import tiny

STEPS, PROCESSES = 3, 2
WIDE = 403
"""Rows of a larger table, an odd number, so that two processes get different shares."""
END, SPREAD = tuple(range(WIDE - 41, WIDE)), tuple(range(4, WIDE, 9))[::-1]
"""A tenth of the rows: the last ones, and every ninth in reverse order."""


@dataclass(frozen=True)
class Setup:
    """One way to train.

    Attributes:
        how: See `cases.wrap`.
        kind: The tiny model.
        rows: The trained rows.
        vocabulary: Number of rows of the table.
        sizes: Batch size of each process.
        accumulate: Batches per step; gradients are only averaged after the last.
        clip: Maximum norm of the gradient.
        checkpointing: Reentrant activation checkpointing or not; None for none.
        wrapper: Options of the wrapper.
        keeps: Whether parameters stay gathered between the backwards of a step.
        tolerance: Of losses and rows.
    """

    how: str
    kind: str = "llama-tied"
    rows: tuple[int, ...] = tuple(ROWS)
    vocabulary: int = 40
    sizes: tuple[int, int] = (2, 2)
    accumulate: int = 1
    clip: float | None = None
    checkpointing: bool | None = None
    wrapper: dict[str, Any] = field(default_factory=dict)
    keeps: bool = False
    tolerance: float = 2e-6


_BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
SETUPS = {
    "ddp, accumulated": Setup("ddp", accumulate=3, wrapper={"gradient_as_bucket_view": True}),
    "ddp, uneven": Setup("ddp", "llama-untied", sizes=(1, 4)),
    "ddp, clipped": Setup("ddp", clip=0.05),
    "ddp, looking for unused parameters": Setup("ddp", wrapper={"find_unused_parameters": True}, accumulate=2),
    "ddp, static graph": Setup("ddp", "llama-untied", wrapper={"static_graph": True}),
    "ddp, checkpointing": Setup("ddp", checkpointing=False, accumulate=2),
    "ddp, reentrant checkpointing": Setup("ddp", checkpointing=True, wrapper={"static_graph": True}),
    "ddp, the last rows": Setup("ddp", rows=END, vocabulary=WIDE, clip=0.3),
    "ddp, spread rows": Setup("ddp", "llama-untied", rows=SPREAD, vocabulary=WIDE, accumulate=2),
    "fsdp, accumulated": Setup("fsdp-layers", accumulate=3),
    "fsdp, accumulated and gathered": Setup("fsdp-root", "llama-untied", accumulate=3, keeps=True),
    "fsdp, uneven": Setup("fsdp-own", sizes=(1, 4)),
    "fsdp, clipped": Setup("fsdp-layers", "llama-untied", clip=0.05),
    "fsdp, kept gathered": Setup("fsdp-layers", wrapper={"reshard_after_forward": False}, accumulate=2),
    "fsdp, sharded again": Setup("fsdp-own", wrapper={"reshard_after_forward": True}, clip=0.1),
    "fsdp, offloaded": Setup("fsdp-layers", wrapper={"offload_policy": CPUOffloadPolicy(pin_memory=False)}),
    "fsdp, bf16": Setup("fsdp-own", "llama-untied", wrapper={"mp_policy": _BF16}, tolerance=1e-2),
    "fsdp, checkpointing": Setup("fsdp-layers", checkpointing=False, accumulate=2),
    "fsdp, reentrant checkpointing": Setup("fsdp-layers", "llama-untied", checkpointing=True),
    "fsdp, the last rows": Setup("fsdp-root", "llama-untied", rows=END, vocabulary=WIDE, accumulate=2),
    "fsdp, spread rows": Setup("fsdp-layers", rows=SPREAD, vocabulary=WIDE, clip=0.3),
}


def dense(setup: Setup) -> dict[str, Any]:
    """Train whole tables in one process, with the gradients of all other rows set to 0."""
    model = _model(setup)
    tables = [model.get_input_embeddings().weight]
    if setup.kind == "llama-untied":
        tables.append(model.get_output_embeddings().weight)
    model.requires_grad_(False)
    rows, others = list(setup.rows), torch.ones(setup.vocabulary, dtype=torch.bool)
    others[rows] = False
    for table in tables:
        with torch.no_grad():
            table[rows] += _start(setup)
        table.requires_grad_(True)
    optimizer = torch.optim.SGD(tables, lr=0.5, momentum=0.9)
    losses = []
    for step in range(STEPS):
        total = 0.0
        for micro in range(setup.accumulate):
            for rank in range(PROCESSES):
                loss = loss_of(model, _batch(setup, step, micro, rank)) / PROCESSES / setup.accumulate
                loss.backward()
                total += loss.item()
        for table in tables:
            assert table.grad is not None
            table.grad[others] = 0
        if setup.clip:
            nn.utils.clip_grad_norm_(tables, setup.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return {"losses": losses, "rows": [table.detach()[rows] for table in tables]}


def trained(setup: Setup, rank: int, mean: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """Train on each process with its share of the batches."""
    model = _model(setup)
    attachment = es.attach(model, es.TrainableTokensConfig(setup.rows, **targets(setup.kind)))
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.add_(_start(setup))
    if setup.checkpointing is not None:
        model.train()
        model.config.use_cache = False
        model.gradient_checkpointing_enable({"use_reentrant": setup.checkpointing})
    wrapped: Any = (
        nn.parallel.DistributedDataParallel(model, **setup.wrapper)
        if setup.how == "ddp"
        else wrap(model, setup.how, **setup.wrapper)
    )
    optimizer = torch.optim.SGD(attachment.parameters(), lr=0.5, momentum=0.9)
    losses = []
    for step in range(STEPS):
        total = 0.0
        for micro in range(setup.accumulate):
            with _synchronised(wrapped, setup, micro == setup.accumulate - 1):
                loss = loss_of(wrapped, _batch(setup, step, micro, rank)) / setup.accumulate
                loss.backward()
            total += mean(loss.detach().clone()).item()
        if setup.clip:
            nn.utils.clip_grad_norm_(wrapped.parameters(), setup.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return {"losses": losses, "rows": list(attachment.adapter().tensors.values())}


def _synchronised(wrapped: Any, setup: Setup, last: bool) -> AbstractContextManager[None]:
    if setup.how == "ddp":
        return nullcontext() if last else wrapped.no_sync()
    wrapped.set_requires_gradient_sync(last)
    wrapped.set_reshard_after_backward(last or not setup.keeps)
    return nullcontext()


def _model(setup: Setup) -> Any:
    model = tiny(setup.kind)
    if setup.vocabulary != 40:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.resize_token_embeddings(setup.vocabulary, mean_resizing=False)
        for table in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            with torch.no_grad():
                table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(4)) * 0.3)
    return model


def _start(setup: Setup) -> torch.Tensor:
    return torch.randn(len(setup.rows), 16, generator=torch.Generator().manual_seed(3)) * 0.2


def _batch(setup: Setup, step: int, micro: int, rank: int) -> torch.Tensor:
    """Return the ids of one process, some of them trained rows."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    ids = torch.randint(3, setup.vocabulary, (setup.sizes[rank], 7), generator=generator)
    ids[0, 1:4] = torch.tensor(setup.rows)[torch.randint(0, len(setup.rows), (3,), generator=generator)]
    return ids

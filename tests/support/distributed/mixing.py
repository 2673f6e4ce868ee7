"""Trains several adapters on one model over several processes: switched, or mixed in batches that differ by process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import embedsurgery as es
from tests.support.distributed.cases import batch, loss_of, wrap
from tests.support.models import tiny

SWITCHED = [["a"] * 4, ["b"] * 4, ["a"] * 4]
MIXED = [["a", "b", "a", "b"], ["a", "b", "a", "a"], ["a", "a", "b", "b"], ["b", None, "a", "a"]]
"""From the second step the processes have different adapters in their batches."""
ALONE = [["a", "a", None, None]]
"""One process has samples of the base only, so it has nothing to train."""


@dataclass(frozen=True)
class Mix:
    """One way to train two adapters.

    Attributes:
        how: See `cases.wrap`; None for one process.
        names: In each step, the adapter of each sample of both processes.
        prompts: Whether the adapters are soft prompts of different lengths; otherwise they share some rows.
        switch: Whether adapters are activated per step, instead of mixed per sample.
    """

    how: str | None
    names: list[list[str | None]]
    prompts: bool = False
    switch: bool = False


MIXES = {
    f"{how}, {name}": mix
    for how in ("ddp", "fsdp-layers", "fsdp-own")
    for name, mix in {
        "switched": Mix(how, SWITCHED, switch=True),
        "mixed": Mix(how, MIXED),
        "mixed prompts": Mix(how, MIXED, prompts=True),
        "one of them on one process": Mix(how, ALONE),
    }.items()
    if (how, name) != ("ddp", "one of them on one process")  # there torch raises: no loss has a gradient
}


def train_mix(mix: Mix, share: slice, mean: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """Train; returns the losses over all processes, and every adapter's tensors."""
    model = tiny("llama-tied")
    configs: dict[str, Any] = {"a": es.TrainableTokensConfig([5, 31, 7]), "b": es.TrainableTokensConfig([5, 9])}
    if mix.prompts:
        configs = {"a": es.SoftPromptConfig(num_virtual_tokens=3), "b": es.SoftPromptConfig(num_virtual_tokens=2)}
    torch.manual_seed(0)
    for name, config in configs.items():
        attachment = es.get_attachment(model)
        if attachment is not None:
            attachment.activate()
        attachment = es.attach(model, config, name=name)
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) * 0.1)
    wrapped: nn.Module = model
    if mix.how == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    elif mix.how is not None:
        wrapped = wrap(model, mix.how)
    optimizer = torch.optim.SGD(attachment.parameters(), lr=0.5, momentum=0.9)
    losses = []
    for step, names in enumerate(mix.names):
        ids = batch(step)[share]
        if mix.switch:
            attachment.activate(*dict.fromkeys(names))
            loss = loss_of(wrapped, ids)
            loss.backward()
        else:
            with attachment.per_sample(names[share]):
                loss = loss_of(wrapped, ids)
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean(loss.detach().clone()).item())
    tensors = {name: attachment.adapter(name).tensors for name in attachment.names}
    return {"losses": losses, "rows": {f"{name} {key}": t for name in tensors for key, t in tensors[name].items()}}

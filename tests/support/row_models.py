"""A model with attached rows, and a dense model: the same with the rows written to its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import embedsurgery as es

V, D = 60, 8


SPREAD = [31, 4, 17, 2, 58, 40, 9, 33, 21, 25, 12, 47]


RUN = list(range(40, 52))


IDS = torch.tensor([[4, 9, 31], [47, 44, 44]])  # some of both lists, and 44 twice


class Model(nn.Module):
    """A language model with a trainable body."""

    def __init__(self, *, tie: bool = True, bias: bool = False, sparse: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D, padding_idx=9, sparse=sparse)
        self.body = nn.Linear(D, D)
        self.head = nn.Linear(D, V, bias=bias)
        if tie:
            self.head.weight = self.embed.weight

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.body(self.embed(ids)))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(ids))


def pair(indices: list[int], dtype: torch.dtype = torch.float64, **kind: bool) -> tuple[Any, Any, list[Any]]:
    """Return an attached model with random rows, the dense model, and the rows."""
    torch.manual_seed(0)
    model = Model(**kind).to(dtype)
    dense = copy.deepcopy(model)
    dense.embed.padding_idx = None
    model.requires_grad_(False)
    model.body.requires_grad_(True)
    targets = ["embed"] if kind.get("tie", True) else ["embed", "head"]
    attachment = es.attach(model, es.TrainableTokensConfig(indices, target_modules=targets), freeze=False)
    rows = list(attachment.parameters())
    with torch.no_grad():
        for part, module in zip(rows, (dense.embed, dense.head), strict=False):
            part.normal_()
            module.weight[indices] = part.to(dtype)
    return model, dense, rows


def dense_gradients(dense: Any, indices: list[int]) -> list[torch.Tensor]:
    """Return the gradients of the rows in each weight of the dense model."""
    weights = {id(w): w for w in (dense.embed.weight, dense.head.weight)}.values()
    return [w.grad.to_dense()[indices] for w in weights if w.grad is not None]


def step(one: Any, loss: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    """Run a forward and a backward of a model, and return the loss."""
    one.zero_grad()
    found = loss(one)
    found.backward()
    return found.detach()

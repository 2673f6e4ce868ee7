"""Small modules with plain, tied and transposed tables."""

from __future__ import annotations

import torch
from torch import nn

V, D = 11, 4


class Conv1D(nn.Module):
    """GPT-2's projection: a weight stored (D, V)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, V))
        self.bias = nn.Parameter(torch.randn(V))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


class Plain(nn.Module):
    def __init__(self, head: nn.Module | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D, padding_idx=2)
        self.position = nn.Embedding(5, D)
        self.head = head or nn.Linear(D, V)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids) + self.position.weight[: ids.shape[-1]])


def tied() -> Plain:
    model = Plain()
    model.head.weight = model.embed.weight
    return model


def transposed_linear() -> Plain:
    model = Plain()
    model.head = Conv1D()
    model.head.weight = nn.Parameter(model.embed.weight.detach().t())
    return model

"""Models that read a weight in other ways than by calling its module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import embedsurgery as es
from tests.support.modules import D, V

IDS = torch.tensor([[1, 4, 2, 7], [4, 4, 9, 0]])


INDICES = [4, 2]  # 2 is the padding row


class Reader(nn.Module):
    """A language model whose logits, or loss, are computed by a function of the model."""

    def __init__(self, read: Callable[[Any, torch.Tensor], torch.Tensor], head: nn.Module | None = None) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"embed": nn.Embedding(V, D, padding_idx=2)})
        self.head = head or nn.Linear(D, V, bias=False)
        self.read = read

    @property
    def embed(self) -> nn.Embedding:
        found = self.body["embed"]
        assert isinstance(found, nn.Embedding)
        return found

    def forward(self, ids: torch.Tensor, past_key_values: Any = None) -> torch.Tensor:
        return self.read(self, ids)


class FusedLoss(torch.autograd.Function):
    """A fused loss as in Liger: the forward computes the loss and its gradients, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        to_hidden, loss = torch.empty_like(hidden), hidden.new_zeros(())
        to_weight = torch.zeros_like(weight) if weight.requires_grad else None
        for number in range(len(hidden)):
            logits = hidden[number] @ weight.t()
            gradient = logits.softmax(-1)
            loss += logits.logsumexp(-1) - logits[labels[number]]
            gradient[labels[number]] -= 1
            to_hidden[number] = gradient @ weight
            if to_weight is not None:
                to_weight += torch.outer(gradient, hidden[number])
        ctx.save_for_backward(to_hidden, to_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        to_hidden, to_weight = ctx.saved_tensors
        return gradient * to_hidden, None if to_weight is None else gradient * to_weight, None


class SavesWeight(torch.autograd.Function):
    """A product whose backward reads the weight, too."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        return hidden @ weight.t()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        hidden, weight = ctx.saved_tensors
        return gradient @ weight, gradient.flatten(0, -2).t() @ hidden.flatten(0, -2)


def lm_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def soft_embedding(m: Any, ids: torch.Tensor) -> torch.Tensor:
    probabilities = m.head(m.embed(ids)).softmax(-1)
    return m.head(probabilities @ m.embed.weight)


READS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "functional head": lambda m, ids: F.linear(m.embed(ids), m.head.weight),
    "loss of a functional head": lambda m, ids: lm_loss(F.linear(m.embed(ids), m.head.weight), ids),
    "fused loss": lambda m, ids: FusedLoss.apply(m.embed(ids).flatten(0, 1), m.head.weight, ids.flatten()),
    "function that saves the weight": lambda m, ids: SavesWeight.apply(m.embed(ids), m.head.weight),
    "soft embedding": soft_embedding,
    "forward of the lookup": lambda m, ids: m.head(m.embed.forward(ids)),
    "forward of the head": lambda m, ids: m.head.forward(m.embed(ids)),
    "functional lookup": lambda m, ids: m.head(F.embedding(ids, m.embed.weight)),
    "functional lookup with padding": lambda m, ids: m.head(F.embedding(ids, m.embed.weight, padding_idx=2)),
    "padding counted from the end": lambda m, ids: m.head(F.embedding(ids, m.embed.weight, padding_idx=2 - V)),
    "indexed": lambda m, ids: m.head(m.embed.weight[ids]),
    "transposed and joined": lambda m, ids: m.embed(ids) @ torch.cat([m.head.weight.t(), m.head.weight.t()], dim=1),
    "attribute": lambda m, ids: m.embed(ids) @ m.head.weight.T,
    "einsum": lambda m, ids: torch.einsum("btd,vd->btv", m.embed(ids), m.head.weight),
    "first without a gradient": lambda m, ids: soft_embedding(m, ids) / m.embed.weight.detach().norm(),
    "penalty": lambda m, ids: lm_loss(m.head(m.embed(ids)), ids) + m.embed.weight.square().sum(),
    "one row": lambda m, ids: m.head(m.embed(ids) + m.embed.weight[4, :] - m.embed.weight[-9]),
    "two rows": lambda m, ids: m.head(m.embed(ids) + m.embed.weight[torch.tensor([[-7], [5]]).int(), :]),
    "sliced": lambda m, ids: m.embed(ids) @ torch.cat([m.head.weight[:5], m.head.weight[5:]]).t(),
    "counted": lambda m, ids: m.head(F.embedding(ids, m.embed.weight, scale_grad_by_freq=True)),
    "both ends": lambda m, ids: F.linear(m.embed.weight[ids], m.head.weight),
}


def attached(model: Any, **options: Any) -> tuple[Any, Any, list[torch.Tensor]]:
    """Return a model in fp64 with random rows attached, a copy with the rows in its weights, and the rows."""
    model.double()
    edited = copy.deepcopy(model)
    tied = model.head.weight is model.embed.weight
    targets = ["body.embed"] if tied else ["body.embed", "head"]
    attachment = es.attach(model, es.TrainableTokensConfig(INDICES, target_modules=targets), **options)
    rows = list(attachment.parameters())
    generator = torch.Generator().manual_seed(3)
    edited.embed.padding_idx = None
    weights = [edited.embed.weight, edited.head.weight][: len(rows)]
    with torch.no_grad():
        for part, weight in zip(rows, weights, strict=True):
            part.copy_(torch.randn(part.shape, generator=generator))
            weight[INDICES] = part
    return model, edited, rows


def reader(name: str, *, tie: bool = True, head: nn.Module | None = None) -> Reader:
    """Return a model that reads its weight as `READS` has it under this name; by default as a soft embedding."""
    torch.manual_seed(0)
    model = Reader(READS.get(name, soft_embedding), head)
    if tie:
        model.head.weight = model.embed.weight
    return model

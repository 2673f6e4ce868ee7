"""Inputs and reading functions for tests of several threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from tests.support.prompted import prompted

READS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "calls the head": lambda m, ids: m.head(m.embed(ids)),
    "reads the weight": lambda m, ids: F.linear(m.embed(ids), m.head.weight),
    "both": lambda m, ids: F.linear(m.embed(ids), m.embed.weight) + m.head(m.embed(ids)),
}


def two_inputs(kind: str) -> tuple[Any, Callable[[int], None]]:
    """Return a model with a soft prompt, and a check that its logits for one of two inputs equal those computed alone.

    Args:
        kind: The kind of model, as of `prompted`.
    """
    model, _ = prompted(kind)
    given = [torch.randint(4, 20, (2, length)) for length in (5, 7)]

    def run(ids: torch.Tensor) -> torch.Tensor:
        more = {"decoder_input_ids": ids} if kind == "bart" else {}
        with torch.no_grad():
            return model(input_ids=ids, labels=ids, **more).logits

    alone = [run(ids) for ids in given]
    return model, lambda number: torch.testing.assert_close(run(given[number]), alone[number], rtol=0, atol=1e-5)

"""The graph of a model in memory or of a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from embedsurgery.graph import EmbeddingGraph
from embedsurgery.loading import open_store
from embedsurgery.models.targets import store_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    Target = nn.Module | Mapping[str, torch.Tensor]


def walk(target: Target | str | os.PathLike[str]) -> EmbeddingGraph:
    """Every embedding table of a model or a checkpoint, with aliases, sites and vocabularies.

    Args:
        target: An ``nn.Module``; a state dict; or a checkpoint directory or Hub id, of which only headers, index and
            config are read, without torch. Where the config claims a tie whose two ends are both stored, it is
            believed here; merging compares their bytes.

    Raises:
        OverlapError: In a module, a parameter that shares memory with a part of a table.
        CheckpointError: The directory's files are missing or broken.
        ConfigError: ``target`` is none of the three.
    """
    if isinstance(target, (str, os.PathLike)):
        with open_store(target) as store:
            return store.claimed_graph
    return store_of(target).graph

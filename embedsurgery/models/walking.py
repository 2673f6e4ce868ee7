"""Finds the tables of a model in memory or of a checkpoint."""

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
    """Find every embedding table of a model or a checkpoint, with aliases, sites and vocabularies.

    Args:
        target: An ``nn.Module``, a state dict, a checkpoint directory or a Hub id. Of a checkpoint only headers, index
            and config are read, without torch. If its config claims a tie and both ends are stored, the config is
            trusted here; merging compares the bytes.

    Returns:
        The graph.

    Raises:
        OverlapError: A parameter of the module shares only a part of a table's memory.
        CheckpointError: The checkpoint's files are missing or broken.
        HubError: The Hub does not give the model.
        ConfigError: ``target`` is none of these.
    """
    if isinstance(target, (str, os.PathLike)):
        with open_store(target) as store:
            return store.claimed_graph
    return store_of(target).graph

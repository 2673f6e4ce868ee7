"""Finds the embedding tables of a model or a checkpoint, with their aliases, sites and vocabularies.

``tables.py`` has the graph's data, ``from_modules.py`` walks an ``nn.Module``, and ``from_names.py`` reads the tensor
names of a checkpoint. A new architecture is a line in ``architectures.py``; a new config key belongs in ``config.py``.
"""

from __future__ import annotations

from embedsurgery.graph.tables import EmbeddingGraph, Kind, Role, Site, Table, Vocabulary

__all__ = ["EmbeddingGraph", "Kind", "Role", "Site", "Table", "Vocabulary"]

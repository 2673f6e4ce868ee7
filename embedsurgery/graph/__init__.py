"""The walker: finds the embedding tables of a model or a checkpoint, their aliases, sites and vocabularies.

``tables.py`` has the graph's data, ``from_modules.py`` walks an ``nn.Module`` and ``from_names.py`` the tensor names of
a checkpoint. A new architecture is a line in ``architectures.py``; a new key of a config belongs in ``config.py``.
"""

from __future__ import annotations

from embedsurgery.graph.tables import EmbeddingGraph, Kind, Role, Site, Table, Vocabulary

__all__ = ["EmbeddingGraph", "Kind", "Role", "Site", "Table", "Vocabulary"]

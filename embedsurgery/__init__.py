"""Surgery on the embeddings of language models: train a few rows, ship kilobytes, bake them in, take them out again.

Importing this loads neither torch nor any plugin; each public name loads what it needs when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from embedsurgery._version import __version__

_PUBLIC = {
    "walk": "api",
    "attach": "api",
    "attached": "api",
    "load": "api",
    "merge": "api",
    "unmerge": "api",
    "merge_checkpoint": "offline",
    "unmerge_checkpoint": "offline",
    "verify_checkpoint": "verify",
    "Adapter": "adapter",
    "Manifest": "adapter",
    "TrainableTokensConfig": "surgeries.trainable_tokens",
    "EmbeddingGraph": "graph",
    "Table": "graph",
    "Site": "graph",
    "Vocabulary": "graph",
    "hookimpl": "hookspecs",
    "errors": "errors",
}
"""Public name -> the module of this package that has it."""

if TYPE_CHECKING:
    from embedsurgery import errors
    from embedsurgery.adapter import Adapter, Manifest
    from embedsurgery.api import attach, attached, load, merge, unmerge, walk
    from embedsurgery.graph import EmbeddingGraph, Site, Table, Vocabulary
    from embedsurgery.hookspecs import hookimpl
    from embedsurgery.offline import merge_checkpoint, unmerge_checkpoint
    from embedsurgery.surgeries.trainable_tokens import TrainableTokensConfig
    from embedsurgery.verify import verify_checkpoint

__all__ = [
    "Adapter",
    "EmbeddingGraph",
    "Manifest",
    "Site",
    "Table",
    "TrainableTokensConfig",
    "Vocabulary",
    "__version__",
    "attach",
    "attached",
    "errors",
    "hookimpl",
    "load",
    "merge",
    "merge_checkpoint",
    "unmerge",
    "unmerge_checkpoint",
    "verify_checkpoint",
    "walk",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'embedsurgery' has no attribute {name!r}")
    module = import_module(f"embedsurgery.{_PUBLIC[name]}")
    value = module if _PUBLIC[name] == name else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

"""Surgery on the embeddings of language models: train a few rows, ship kilobytes, bake them in, take them out again.

Importing this loads neither torch nor any plugin; each public name loads what it needs when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from embedsurgery._version import __version__

_PUBLIC = {
    "add_tokens": "models.adding",
    "add_tokens_checkpoint": "checkpoints.adding",
    "extract": "checkpoints.extracting",
    "walk": "models.walking",
    "attach": "models.attaching",
    "attached": "models.attaching",
    "load": "loading",
    "merge": "models.merging",
    "unmerge": "models.merging",
    "merge_checkpoint": "checkpoints.merging",
    "recover_checkpoint": "checkpoints.recovery",
    "unmerge_checkpoint": "checkpoints.unmerging",
    "verify_checkpoint": "checkpoints.verifying",
    "log_checkpoint": "checkpoints.log",
    "Adapter": "adapters.adapter",
    "BakeConfig": "surgeries.soft_prompt.bake_config",
    "Manifest": "adapters.manifest",
    "SoftPromptConfig": "surgeries.soft_prompt.config",
    "TrainableTokensConfig": "surgeries.trainable_tokens.config",
    "EmbeddingGraph": "graph.tables",
    "Table": "graph.tables",
    "Site": "graph.tables",
    "Vocabulary": "graph.tables",
    "hookimpl": "plugins.hookspecs",
    "push": "hub",
    "pull": "hub",
    "errors": "errors",
}
"""Public name -> the module of this package that has it."""

if TYPE_CHECKING:
    from embedsurgery import errors
    from embedsurgery.adapters.adapter import Adapter
    from embedsurgery.adapters.manifest import Manifest
    from embedsurgery.checkpoints.adding import add_tokens_checkpoint
    from embedsurgery.checkpoints.extracting import extract
    from embedsurgery.checkpoints.log import log_checkpoint
    from embedsurgery.checkpoints.merging import merge_checkpoint
    from embedsurgery.checkpoints.recovery import recover_checkpoint
    from embedsurgery.checkpoints.unmerging import unmerge_checkpoint
    from embedsurgery.checkpoints.verifying import verify_checkpoint
    from embedsurgery.graph import EmbeddingGraph, Site, Table, Vocabulary
    from embedsurgery.hub import pull, push
    from embedsurgery.loading import load
    from embedsurgery.models.adding import add_tokens
    from embedsurgery.models.attaching import attach, attached
    from embedsurgery.models.merging import merge, unmerge
    from embedsurgery.models.walking import walk
    from embedsurgery.plugins.hookspecs import hookimpl
    from embedsurgery.surgeries.soft_prompt.bake_config import BakeConfig
    from embedsurgery.surgeries.soft_prompt.config import SoftPromptConfig
    from embedsurgery.surgeries.trainable_tokens.config import TrainableTokensConfig

__all__ = [
    "Adapter",
    "BakeConfig",
    "EmbeddingGraph",
    "Manifest",
    "Site",
    "SoftPromptConfig",
    "Table",
    "TrainableTokensConfig",
    "Vocabulary",
    "__version__",
    "add_tokens",
    "add_tokens_checkpoint",
    "attach",
    "attached",
    "errors",
    "extract",
    "hookimpl",
    "load",
    "log_checkpoint",
    "merge",
    "merge_checkpoint",
    "pull",
    "push",
    "recover_checkpoint",
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

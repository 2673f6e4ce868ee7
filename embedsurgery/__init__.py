"""Surgery on the embeddings of language models: train a few rows, ship kilobytes, bake them in, take them out again.

Importing this loads neither torch nor any plugin; each public name loads what it needs when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from embedsurgery._version import __version__

_PUBLIC = {
    "add_tokens": "live",
    "add_tokens_checkpoint": "offline.adding",
    "extract": "extraction",
    "walk": "api",
    "attach": "live",
    "attached": "live",
    "load": "reading",
    "merge": "api",
    "unmerge": "api",
    "merge_checkpoint": "offline.merging",
    "recover_checkpoint": "offline.recovery",
    "unmerge_checkpoint": "offline.unmerging",
    "verify_checkpoint": "verify",
    "log_checkpoint": "log",
    "Adapter": "adapter",
    "BakeConfig": "surgeries.soft_prompt_bake_config",
    "Manifest": "adapter",
    "SoftPromptConfig": "surgeries.soft_prompt_config",
    "TrainableTokensConfig": "surgeries.trainable_tokens_config",
    "EmbeddingGraph": "graph",
    "Table": "graph",
    "Site": "graph",
    "Vocabulary": "graph",
    "hookimpl": "hookspecs",
    "push": "hub",
    "pull": "hub",
    "errors": "errors",
}
"""Public name -> the module of this package that has it."""

if TYPE_CHECKING:
    from embedsurgery import errors
    from embedsurgery.adapter import Adapter, Manifest
    from embedsurgery.api import merge, unmerge, walk
    from embedsurgery.extraction import extract
    from embedsurgery.graph import EmbeddingGraph, Site, Table, Vocabulary
    from embedsurgery.hookspecs import hookimpl
    from embedsurgery.hub import pull, push
    from embedsurgery.live import add_tokens, attach, attached
    from embedsurgery.log import log_checkpoint
    from embedsurgery.offline.adding import add_tokens_checkpoint
    from embedsurgery.offline.merging import merge_checkpoint
    from embedsurgery.offline.recovery import recover_checkpoint
    from embedsurgery.offline.unmerging import unmerge_checkpoint
    from embedsurgery.reading import load
    from embedsurgery.surgeries.soft_prompt_bake_config import BakeConfig
    from embedsurgery.surgeries.soft_prompt_config import SoftPromptConfig
    from embedsurgery.surgeries.trainable_tokens_config import TrainableTokensConfig
    from embedsurgery.verify import verify_checkpoint

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

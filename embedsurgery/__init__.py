"""Surgery on the embeddings of language models: train a few rows, ship kilobytes, merge and unmerge them.

Importing this package loads neither torch nor a plugin; each public name imports its module on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from embedsurgery._version import __version__

_PUBLIC = {
    "add_tokens": "models.adding",
    "add_tokens_checkpoint": "checkpoints.adding",
    "extract_checkpoint": "checkpoints.extracting",
    "walk": "models.walking",
    "attach": "models.attaching",
    "get_attachment": "models.attaching",
    "load": "loading",
    "open_store": "loading",
    "merge": "models.merging",
    "unmerge": "models.merging",
    "merge_checkpoint": "checkpoints.merging",
    "recover_checkpoint": "checkpoints.recovery",
    "unmerge_checkpoint": "checkpoints.unmerging",
    "verify_checkpoint": "checkpoints.verifying",
    "list_merges": "checkpoints.log",
    "push": "hub",
    "pull": "hub",
    "Adapter": "adapters.adapter",
    "AddedTokens": "adapters.new_tokens",
    "Attachment": "runtime.attachment",
    "BakeConfig": "surgeries.soft_prompt.bake_config",
    "Check": "checkpoints.verifying",
    "EmbeddingGraph": "graph.tables",
    "Extraction": "checkpoints.extracting",
    "Manifest": "adapters.manifest",
    "MergeRecord": "checkpoints.records",
    "MergeReport": "checkpoints.report",
    "PushReport": "hub",
    "Site": "graph.tables",
    "SoftPromptConfig": "surgeries.soft_prompt.config",
    "Store": "stores.store",
    "Table": "graph.tables",
    "TrainableTokensConfig": "surgeries.trainable_tokens.config",
    "Undo": "plan.plan",
    "Vocabulary": "graph.tables",
    "hookimpl": "plugins.hookspecs",
    "errors": "errors",
}
"""Public name -> the module of this package that defines it."""

if TYPE_CHECKING:
    from embedsurgery import errors
    from embedsurgery.adapters.adapter import Adapter
    from embedsurgery.adapters.manifest import Manifest
    from embedsurgery.adapters.new_tokens import AddedTokens
    from embedsurgery.checkpoints.adding import add_tokens_checkpoint
    from embedsurgery.checkpoints.extracting import Extraction, extract_checkpoint
    from embedsurgery.checkpoints.log import list_merges
    from embedsurgery.checkpoints.merging import merge_checkpoint
    from embedsurgery.checkpoints.records import MergeRecord
    from embedsurgery.checkpoints.recovery import recover_checkpoint
    from embedsurgery.checkpoints.report import MergeReport
    from embedsurgery.checkpoints.unmerging import unmerge_checkpoint
    from embedsurgery.checkpoints.verifying import Check, verify_checkpoint
    from embedsurgery.graph.tables import EmbeddingGraph, Site, Table, Vocabulary
    from embedsurgery.hub import PushReport, pull, push
    from embedsurgery.loading import load, open_store
    from embedsurgery.models.adding import add_tokens
    from embedsurgery.models.attaching import attach, get_attachment
    from embedsurgery.models.merging import merge, unmerge
    from embedsurgery.models.walking import walk
    from embedsurgery.plan.plan import Undo
    from embedsurgery.plugins.hookspecs import hookimpl
    from embedsurgery.runtime.attachment import Attachment
    from embedsurgery.stores.store import Store
    from embedsurgery.surgeries.soft_prompt.bake_config import BakeConfig
    from embedsurgery.surgeries.soft_prompt.config import SoftPromptConfig
    from embedsurgery.surgeries.trainable_tokens.config import TrainableTokensConfig

__all__ = [
    "Adapter",
    "AddedTokens",
    "Attachment",
    "BakeConfig",
    "Check",
    "EmbeddingGraph",
    "Extraction",
    "Manifest",
    "MergeRecord",
    "MergeReport",
    "PushReport",
    "Site",
    "SoftPromptConfig",
    "Store",
    "Table",
    "TrainableTokensConfig",
    "Undo",
    "Vocabulary",
    "__version__",
    "add_tokens",
    "add_tokens_checkpoint",
    "attach",
    "errors",
    "extract_checkpoint",
    "get_attachment",
    "hookimpl",
    "list_merges",
    "load",
    "merge",
    "merge_checkpoint",
    "open_store",
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
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return __all__

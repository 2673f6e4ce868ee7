"""One attachment per model: finds its parent module, and refuses a second one on a part of the model or around it."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from embedsurgery.errors import AttachmentError
from embedsurgery.graph import EmbeddingGraph
from embedsurgery.graph.classify import Classify
from embedsurgery.graph.from_modules import walk_module
from embedsurgery.graph.wrappers import submodule

_attachments: weakref.WeakSet[Any] = weakref.WeakSet()
"""All attachments of this process. A part of a model does not know the model, so `refuse_part` searches them."""


def register(attachment: nn.Module) -> None:
    """Register an attachment, for as long as it exists."""
    _attachments.add(attachment)


def unregister(attachment: nn.Module) -> None:
    """Unregister an attachment."""
    _attachments.discard(attachment)


def find_parent_and_writer(model: nn.Module, graph: EmbeddingGraph) -> tuple[nn.Module, nn.Module]:
    """Return the module to register an attachment on, and the module that writes checkpoints.

    Both are the model, with two exceptions. A container (a SentenceTransformer is an ``nn.Sequential``) would take the
    attachment for one more of its parts, so its first module that is not one is the parent. And if a module of
    transformers lies inside the model, it is the writer.
    """
    path = [model]
    for name in graph.tables[0].names[0].split(".")[:-1] if graph.tables else ():
        child = path[-1]._modules.get(name)
        if child is None:  # table names leave wrappers out
            break
        path.append(child)
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    parent = next((module for module in path if not isinstance(module, containers)), model)
    writer = next((m for m in path if hasattr(m, "save_pretrained") and hasattr(m, "base_model_prefix")), model)
    return parent, writer


def refuse_part(model: nn.Module) -> None:
    """Refuse a part of a model that has an attachment: the hooks of both could be on the same modules.

    Raises:
        AttachmentError: The model is such a part.
    """
    for attachment in list(_attachments):
        whole = attachment.model
        path = next((path for path, module in whole.named_modules() if module is model), "")
        if path:
            raise AttachmentError(
                "the model is a part of a model that has an attachment",
                where=f"{path} ({type(model).__name__}) of {type(whole).__name__}",
                found=f"adapters {', '.join(attachment.names)}",
                hint="attach to the whole model, under another name=, or detach() its attachment first",
            )


def refuse_tables_outside(given: nn.Module, model: nn.Module, classify: Classify | None = None) -> None:
    """Refuse a module around an attached model that uses tables outside of it, which the attachment does not override.

    Args:
        given: The module that the caller attaches to. A wrapper without tables of its own is accepted.
        model: The attached model.
        classify: Classifies modules of unknown classes.

    Raises:
        AttachmentError: Sites lie outside of the model.
    """
    if given is model:
        return
    inside = {id(module) for module in model.modules()}
    sites = [site.module for table in walk_module(given, classify).tables for site in table.sites]
    outside = [path for path in sites if id(submodule(given, path)) not in inside]
    if outside:
        raise AttachmentError(
            "a part of the model already has an attachment",
            where=f"{type(model).__name__} in {type(given).__name__}",
            expected="tables in that part only",
            found=f"{', '.join(outside)} outside of it",
            hint="detach() it, and attach to the whole model",
        )

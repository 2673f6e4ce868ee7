"""One attachment to a model: where it lies there; refuses a second one on a part, or on what holds more than it."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from embedsurgery.errors import AttachmentError
from embedsurgery.graph import EmbeddingGraph
from embedsurgery.graph.classify import Classify
from embedsurgery.graph.from_modules import walk_module
from embedsurgery.graph.wrappers import submodule

_living: weakref.WeakSet[Any] = weakref.WeakSet()


def remember(attachment: nn.Module) -> None:
    """Know an attachment, as long as it lives."""
    _living.add(attachment)


def forget(attachment: nn.Module) -> None:
    """Know it no more."""
    _living.discard(attachment)


def places(model: nn.Module, graph: EmbeddingGraph) -> tuple[nn.Module, nn.Module]:
    """The module to put an attachment in, and the one that writes checkpoints.

    They are the model, unless that is a container, of whose parts an attachment would be one more (a
    SentenceTransformer is an ``nn.Sequential``), or something around the model of transformers that is saved.
    """
    steps = [model]
    for part in graph.tables[0].names[0].split(".")[:-1] if graph.tables else ():
        below = steps[-1]._modules.get(part)
        if below is None:  # a name goes around wrappers
            break
        steps.append(below)
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    held = next((step for step in steps if not isinstance(step, containers)), model)
    saves = next(
        (step for step in steps if hasattr(step, "save_pretrained") and hasattr(step, "base_model_prefix")), model
    )
    return held, saves


def refuse_part(model: nn.Module) -> None:
    """Refuse a model that is a part of one with an attachment, whose hooks may be on the same modules.

    Raises:
        AttachmentError: It names both.
    """
    for attachment in list(_living):
        whole = attachment.model
        path = next((path for path, module in whole.named_modules() if module is model), "")
        if path:
            raise AttachmentError(
                "the model is a part of one that has an attachment",
                where=f"{path} ({type(model).__name__}) of {type(whole).__name__}",
                found=f"adapters {', '.join(attachment.names)}",
                hint="attach to the whole model, one more adapter with a name= of its own; or detach() that first",
            )


def refuse_more(given: nn.Module, model: nn.Module, classify: Classify | None = None) -> None:
    """Refuse a module around an attached model that uses tables in modules of its own, which the attachment misses.

    A wrapper that only holds the model is the model. ``classify`` says what modules of unknown classes are.

    Raises:
        AttachmentError: It names both.
    """
    if given is model:
        return
    inside = {id(module) for module in model.modules()}
    sites = [site.module for table in walk_module(given, classify).tables for site in table.sites]
    beyond = [path for path in sites if id(submodule(given, path)) not in inside]
    if beyond:
        raise AttachmentError(
            "a part of the model has an attachment",
            where=f"{type(model).__name__} in {type(given).__name__}",
            expected="the tables of that part alone",
            found=f"{', '.join(beyond)} beside it",
            hint="detach() it, and attach to the whole model",
        )

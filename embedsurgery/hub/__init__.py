"""Adapters and models on the Hugging Face Hub.

``ids.py`` parses ids and ``auth.py`` holds the current token. ``client.py`` sends requests and ``faults.py`` turns what
fails into a `HubError`. ``headers.py`` reads a model's headers by range requests, ``range_store.py`` its rows, and
``as_directory.py`` makes it a temporary directory. ``pulling.py``, ``pushing.py``, ``commits.py`` and ``card.py`` move
adapters. Merged models are pushed by ``checkpoints/hub_merging.py``.

huggingface_hub is imported when one of these functions first needs it, so that work on local directories never loads
it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from embedsurgery.errors import HubError
from embedsurgery.hub.auth import Token, using_token
from embedsurgery.hub.ids import HubId, find_id, read_source

_LAZY = {
    "push": "pushing",
    "PushReport": "commits",
    "pull": "pulling",
    "open_remote": "range_store",
    "download_model": "as_directory",
    "pin_revision": "as_directory",
}
"""Name -> the module of this package that has it."""

if TYPE_CHECKING:
    from embedsurgery.hub.as_directory import download_model, pin_revision
    from embedsurgery.hub.commits import PushReport
    from embedsurgery.hub.pulling import pull
    from embedsurgery.hub.pushing import push
    from embedsurgery.hub.range_store import open_remote

__all__ = [
    "HubId",
    "PushReport",
    "Token",
    "check_installed",
    "directory",
    "download_model",
    "find_id",
    "open_remote",
    "pin_revision",
    "pull",
    "push",
    "read_source",
    "using_token",
]


@contextmanager
def directory(model: str | os.PathLike[str], *, adapters: bool = False) -> Iterator[Path]:
    """Yield a model as a directory: a local one as it is, a Hub id as a temporary download.

    Args:
        model: A directory, or a Hub id.
        adapters: Accept the id of a PEFT adapter too.

    Raises:
        HubError: The Hub does not give the model.
        CheckpointError: The repository has no safetensors weights.
    """
    hub_id = find_id(model)
    if hub_id is None:
        yield Path(model)
        return
    with _import("as_directory").download_model(hub_id, adapters=adapters) as (folder, _):
        yield folder


def check_installed() -> None:
    """Import the module that sends requests.

    Raises:
        HubError: huggingface_hub is missing or too old.
    """
    _import("client")


def _import(module: str) -> ModuleType:
    try:
        return import_module(f"embedsurgery.hub.{module}")
    except ImportError as error:
        if not (error.name or "").startswith(("huggingface_hub", "httpx2", "yaml")):
            raise
        raise HubError(
            "huggingface_hub is missing or too old", found=error.name, hint="pip install 'huggingface_hub>=2.4'"
        ) from error


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'embedsurgery.hub' has no attribute {name!r}")
    return getattr(_import(_LAZY[name]), name)

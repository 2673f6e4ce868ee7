"""Adapters and models on the Hugging Face Hub.

``ids.py`` says what an id is and ``auth.py`` which token applies; ``client.py`` talks to the Hub and ``faults.py``
explains its errors. ``headers.py`` reads a model's headers by range requests, ``range_store.py`` its rows, and
``as_directory.py`` downloads it for a while. ``pulling.py``, ``pushing.py`` and ``commits.py`` move adapters. Merges
are not known here: see ``checkpoints/hub_merging.py``.

huggingface_hub is loaded when one of these functions is first used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from embedsurgery.hub.auth import Token, using_token
from embedsurgery.hub.ids import HubId, find_id, read_source

_LAZY = {
    "push": "pushing",
    "PushReport": "commits",
    "pull": "pulling",
    "open_remote": "range_store",
    "downloaded": "as_directory",
    "pinned": "as_directory",
}

if TYPE_CHECKING:
    from embedsurgery.hub.as_directory import downloaded, pinned
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
    "downloaded",
    "find_id",
    "open_remote",
    "pinned",
    "pull",
    "push",
    "read_source",
    "using_token",
]


@contextmanager
def directory(model: str | os.PathLike[str], *, adapters: bool = False) -> Iterator[Path]:
    """Inside, a model as a directory: the one that is there, else what a merge needs of the model of that id.

    Args:
        model: A directory, or an id.
        adapters: Let the id be that of a PEFT adapter, too.
    """
    remote = find_id(model)
    if remote is None:
        yield Path(model)
        return
    from embedsurgery.hub import downloaded

    with downloaded(remote, adapters=adapters) as (folder, _):
        yield folder


def check_installed() -> None:
    """Import what talks to the Hub.

    Raises:
        HubError: huggingface_hub is missing or too old.
    """
    _import("client")


def _import(module: str) -> ModuleType:
    from embedsurgery.errors import HubError

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

"""Adapters and models on the Hugging Face Hub.

``ids.py`` says what is an id and ``tokens.py`` who asks; ``client.py`` talks to the Hub and ``faults.py`` explains what
goes wrong there; ``headers.py`` reads a model's headers by range requests and ``range_store.py`` its rows;
``scratch.py`` makes a model a directory for a while; ``pulling.py``, ``commits.py``, ``pushing.py`` and ``merging.py``
do what their names say. With ``card.py`` the only code that needs huggingface_hub, which is loaded when one of the
functions is first used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedsurgery.hub.auth import Token, using_token
from embedsurgery.hub.ids import HubId, find_id, read_source

_LAZY = {
    "push": "pushing",
    "PushReport": "commits",
    "pull": "pulling",
    "open_remote": "scratch",
    "downloaded": "scratch",
    "pinned": "scratch",
    "row_store": "scratch",
    "remote_records": "headers",
    "push_merged": "merging",
}

if TYPE_CHECKING:
    from embedsurgery.checkpoints.hub_merging import push_merged
    from embedsurgery.hub.as_directory import downloaded, open_remote, pinned, row_store
    from embedsurgery.hub.commits import PushReport
    from embedsurgery.hub.headers import remote_records
    from embedsurgery.hub.pulling import pull
    from embedsurgery.hub.pushing import push
    from embedsurgery.stores.store import Store

__all__ = [
    "HubId",
    "PushReport",
    "Token",
    "directory",
    "downloaded",
    "find_id",
    "open_remote",
    "pinned",
    "pull",
    "push",
    "push_merged",
    "read_source",
    "remote_records",
    "row_store",
    "store",
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


@contextmanager
def store(model: str | os.PathLike[str]) -> Iterator[Store]:
    """Inside, a model to read rows of: a directory's, or that of an id, of which only what is read comes."""
    remote = find_id(model)
    if remote is None:
        from embedsurgery.plugins.current import registry

        yield registry().open_store(Path(model))
        return
    from embedsurgery.hub import row_store

    with row_store(remote) as found:
        yield found


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'embedsurgery.hub' has no attribute {name!r}")
    from embedsurgery.errors import HubError

    try:
        return getattr(import_module(f"embedsurgery.hub.{_LAZY[name]}"), name)
    except ImportError as error:
        if not (error.name or "").startswith(("huggingface_hub", "httpx2", "yaml")):
            raise
        raise HubError("huggingface_hub is missing or too old", found=error.name,
                       hint="pip install 'huggingface_hub>=2.4'") from error  # fmt: skip

"""Opens checkpoints and loads adapters, by path or Hub id. Nothing is changed here."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from embedsurgery import hub
from embedsurgery.plugins.current import registry

if TYPE_CHECKING:
    from embedsurgery.adapters.adapter import Adapter
    from embedsurgery.stores.store import Store


def open_store(model: str | os.PathLike[str]) -> Store:
    """Open a checkpoint of any installed format, a directory or a Hub id, for reading.

    For a Hub id only headers are downloaded at first, then the rows that are read. In a ``with`` block the downloaded
    files are deleted at its end, otherwise together with the store.

    Args:
        model: A directory; or ``org/name`` or ``org/name@revision``.

    Raises:
        CheckpointError: The files are missing or broken, or several formats recognise them.
        UnfinishedError: A change in place was interrupted, or is under way.
        HubError: The Hub does not give the model.
    """
    hub_id = hub.find_id(model)
    return registry().open_store(Path(model)) if hub_id is None else hub.open_remote(hub_id)


def load(directory: str | os.PathLike[str]) -> Adapter:
    """Load an adapter, embedsurgery's or PEFT's, from a directory or the Hub.

    Args:
        directory: A directory; or ``org/name`` or ``org/name@revision``, which is pulled.

    Raises:
        AdapterError: The files are missing, broken, or contradict each other.
        HubError: The Hub does not give the adapter.
        UnknownSurgeryError: No installed plugin reads it. A file's content never decides what is imported.
    """
    hub_id = hub.find_id(directory)
    if hub_id is not None:
        return hub.pull(str(hub_id))
    return replace(registry().read_adapter(directory), source=hub.read_source(Path(directory)))

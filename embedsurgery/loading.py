"""Checkpoints and adapters opened by path or Hub id; nothing is changed here."""

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
    """Open a checkpoint of any installed format, a directory or a Hub id, to read from it.

    Of a Hub id only headers come at first, then the rows that are read. Use the store in a ``with`` block to remove
    what was downloaded when it ends; otherwise it goes with the store.

    Args:
        model: A directory; or ``org/name`` or ``org/name@revision``.

    Raises:
        CheckpointError: The files are missing or broken, or several formats recognise them.
        UnfinishedError: A change of it in place was interrupted, or is under way.
        HubError: It cannot be had from the Hub.
    """
    remote = hub.find_id(model)
    return registry().open_store(Path(model)) if remote is None else hub.open_remote(remote)


def load(directory: str | os.PathLike[str]) -> Adapter:
    """Read an adapter's directory, ours or PEFT's; or pull it, for ``org/name`` or ``org/name@revision``.

    Raises:
        AdapterError: The files are missing, broken, or contradict each other.
        HubError: It cannot be had from the Hub.
        UnknownSurgeryError: No installed plugin understands it. Nothing is imported on the word of a file.
    """
    remote = hub.find_id(directory)
    if remote is not None:
        return hub.pull(str(remote))
    return replace(registry().read_adapter(directory), source=hub.read_source(Path(directory)))

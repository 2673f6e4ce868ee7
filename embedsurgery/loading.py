"""Checkpoints and adapters read with what the registry holds, from a directory or the Hub; nothing is changed here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedsurgery import hub
from embedsurgery.errors import AdapterError
from embedsurgery.graph.from_names import walk_names
from embedsurgery.plugins.current import registry
from embedsurgery.stores.checkpoint import open_checkpoint

if TYPE_CHECKING:
    from embedsurgery.adapters.adapter import Adapter
    from embedsurgery.graph import EmbeddingGraph


def opened(model: str | os.PathLike[str]) -> tuple[EmbeddingGraph, Mapping[str, Any] | None]:
    """The graph of a checkpoint directory or a Hub id, by headers alone, and its config.

    Raises:
        CheckpointError: The directory's files are missing or broken.
    """
    remote = hub.find_id(model)
    known = registry()
    if remote is None and not (form := known.format_of(Path(model))).fallback:
        store = known.opened(form, Path(model))
        return store.graph, store.config
    checkpoint = open_checkpoint(Path(model)) if remote is None else hub.open_remote(remote)
    graph = walk_names(checkpoint.stored(), config=checkpoint.config, source=str(model),
                       architectures=known.architectures)  # fmt: skip
    return graph, checkpoint.config


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
    return replace(_read(directory), source=hub.read_source(Path(directory)))


def _read(directory: str | os.PathLike[str]) -> Adapter:
    from embedsurgery.adapters.adapter import read_adapter_files
    from embedsurgery.surgeries.checked import read

    files, manifest = read_adapter_files(directory)
    if manifest is None:
        return read(registry().for_peft_type(files.config.get("peft_type")).surgery, files, None)
    surgery = registry().named(manifest.surgery).surgery
    if manifest.surgery_version > surgery.version:
        raise AdapterError("an adapter of a newer version of its surgery", where=directory, expected=surgery.version,
                           found=manifest.surgery_version, hint="upgrade what brings the surgery")  # fmt: skip
    return read(surgery, files, manifest)

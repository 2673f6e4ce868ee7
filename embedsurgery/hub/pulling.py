"""Pulls adapters from the Hub: two files of one commit, whose header is checked before the weights are downloaded.

Adapters that PEFT pushed are read too. Nothing that a repository names is imported or run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from embedsurgery.adapters.adapter import CONFIG_NAME, METADATA_KEY, WEIGHTS_NAME, Adapter
from embedsurgery.errors import AdapterError, UnknownSurgeryError
from embedsurgery.files.atomic import refuse_existing, staged_directory, sync_path
from embedsurgery.files.json_reading import read_json
from embedsurgery.files.safetensors import Header
from embedsurgery.hub.auth import Token
from embedsurgery.hub.client import Client, RemoteFile, Snapshot
from embedsurgery.hub.headers import fetch_header, fetch_small_file
from embedsurgery.hub.ids import SOURCE, HubId
from embedsurgery.plugins.current import registry
from embedsurgery.tensors.raw import EDITABLE

_PICKLE = "adapter_model.bin"
_ROWS = ".trainable_tokens_delta"
"""Suffix of the tensors that hold rows of `token_indices`, in embedsurgery's files and PEFT's."""


def pull(
    repo: str,
    *,
    revision: str | None = None,
    output: str | os.PathLike[str] | None = None,
    token: Token = None,
) -> Adapter:
    """Pull an adapter from the Hub, embedsurgery's or PEFT's.

    The revision is resolved once, and every file is taken from that commit. Shapes and dtypes are checked by a range
    request for the header before the weights are downloaded. The files are kept in the Hub cache; offline, they are
    read from there.

    Args:
        repo: ``org/name`` or ``org/name@revision``.
        revision: A branch, a tag, a commit or ``refs/pr/N``; the default branch by default.
        output: Copy the files into this new directory.
        token: A token, False for none; by default HF_TOKEN or the stored login.

    Returns:
        The adapter; its ``source`` is ``org/name@sha``.

    Raises:
        HubError: The Hub does not give the repository, the revision or a file.
        AdapterError: The files are not an adapter.
        UnknownSurgeryError: No installed plugin reads it. A file's content never decides what is imported.
        OutputExistsError: ``output`` exists.
    """
    hub_id = HubId.parse(repo, revision)
    if output is not None:
        refuse_existing(Path(output))
    client = Client(token)
    snapshot = client.resolve(hub_id)
    folder = _fetch_adapter(client, snapshot)
    try:
        adapter = replace(registry().read_adapter(folder), source=f"{snapshot.repo}@{snapshot.sha}")
    except UnknownSurgeryError as error:
        raise _add_repository(error, snapshot) from error
    if output is not None:
        _copy_adapter(folder, Path(output), snapshot, hub_id)
    return adapter


def _fetch_adapter(client: Client, snapshot: Snapshot) -> Path:
    """Check and download the two files; returns their directory in the Hub cache."""
    # If both are cached they were checked before, and a pinned revision is pulled without any request.
    config, weights = client.find_cached(snapshot, CONFIG_NAME), client.find_cached(snapshot, WEIGHTS_NAME)
    if config is None or weights is None:
        files = client.find_files(snapshot, (CONFIG_NAME, WEIGHTS_NAME, _PICKLE, "config.json"))
        _check_files(files, snapshot)
        config = fetch_small_file(client, snapshot, files, CONFIG_NAME)
        body = read_json(config)
        header, _, total = fetch_header(client, snapshot, WEIGHTS_NAME)
        if total != files[WEIGHTS_NAME].size:
            raise AdapterError(
                "file size mismatch",
                where=f"{snapshot}/{WEIGHTS_NAME}",
                expected=f"{files[WEIGHTS_NAME].size} bytes, as listed",
                found=f"{total} bytes",
            )
        try:
            check_header(header, body, f"{snapshot}/{WEIGHTS_NAME}")
        except UnknownSurgeryError as error:
            raise _add_repository(error, snapshot) from error
    client.fetch(snapshot, CONFIG_NAME)
    return client.fetch(snapshot, WEIGHTS_NAME).parent


def _check_files(files: Mapping[str, RemoteFile], snapshot: Snapshot) -> None:
    if WEIGHTS_NAME in files and CONFIG_NAME in files:
        return
    missing = CONFIG_NAME if WEIGHTS_NAME in files else WEIGHTS_NAME
    hint = "an adapter's repository has adapter_config.json and adapter_model.safetensors"
    if _PICKLE in files:
        hint = f"{_PICKLE} is a pickle, which can run code: load it with PEFT and push it as safetensors"
    elif "config.json" in files:
        hint = "this is a model: name the adapter's repository"
    found = ", ".join(sorted(files)) or "none of an adapter's files"
    raise AdapterError("a file of the adapter is missing", where=snapshot, expected=missing, found=found, hint=hint)


def check_header(header: Header, config: Mapping[str, Any], where: str) -> None:
    """Check what an adapter's header shows: that its surgery is installed, and that its rows have the right shape.

    Args:
        header: The header of its weights.
        config: Its ``adapter_config.json``.
        where: The file, for errors.

    Raises:
        AdapterError: A tensor has the wrong dtype or shape, or there is none.
        UnknownSurgeryError: No installed plugin reads it.
    """
    manifest = _parse_manifest(header, where)
    if manifest is None:
        registry().for_peft_type(config.get("peft_type"))
    else:
        registry().find_surgery(str(manifest.get("surgery")))
    if not header.entries:
        raise AdapterError("the adapter has no tensors", where=where, expected="at least one", found=0)
    indices = config.get("token_indices")
    rows = len(indices) if isinstance(indices, list) else None
    for entry in header.entries.values():
        if not entry.name.endswith(_ROWS):
            continue
        if entry.dtype not in EDITABLE:
            raise AdapterError(
                "wrong dtype of rows",
                where=f"{where}: {entry.name}",
                expected=", ".join(EDITABLE),
                found=entry.dtype,
            )
        if len(entry.shape) != 2 or entry.shape[0] != rows:
            raise AdapterError(
                "the rows do not match the config's token_indices",
                where=f"{where}: {entry.name}",
                expected=f"({rows}, D)",
                found=list(entry.shape),
            )


def _parse_manifest(header: Header, where: str) -> dict[str, Any] | None:
    text = header.metadata.get(METADATA_KEY)
    if text is None:
        return None
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(
            "the manifest is not JSON", where=where, expected=METADATA_KEY, found=str(error)[:120]
        ) from error
    if not isinstance(body, dict):
        raise AdapterError(
            "the manifest is not an object", where=where, expected=METADATA_KEY, found=type(body).__name__
        )
    return body


def _add_repository(error: UnknownSurgeryError, snapshot: Snapshot) -> UnknownSurgeryError:
    """Return the error with the repository as its place, and with what to install."""
    return UnknownSurgeryError(
        error.what,
        where=snapshot,
        expected=f"a plugin for {error.where}",
        found=error.found,
        hint=f"install the embedsurgery plugin that brings {str(error.where)!r}",
    )


def _copy_adapter(folder: Path, output: Path, snapshot: Snapshot, hub_id: HubId) -> None:
    with staged_directory(output) as staging:
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            shutil.copyfile(folder / name, staging / name)
            sync_path(staging / name)
        note = staging / SOURCE
        note.parent.mkdir()
        body = {"repo": snapshot.repo, "revision": hub_id.revision, "sha": snapshot.sha}
        note.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
        sync_path(note)

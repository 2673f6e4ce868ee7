"""Adapters from the Hub: only our two files by name, looked at before the weights come, from one commit.

An adapter that PEFT pushed is read as well. Nothing that a repository says is imported or run.
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
from embedsurgery.hub.headers import read_remote, small
from embedsurgery.hub.ids import SOURCE, HubId
from embedsurgery.plugins.current import registry
from embedsurgery.tensors.raw import EDITABLE

_PICKLE = "adapter_model.bin"
_ROWS = ".trainable_tokens_delta"


def pull(
    repo: str,
    *,
    revision: str | None = None,
    output: str | os.PathLike[str] | None = None,
    token: Token = None,
) -> Adapter:
    """Get an adapter from the Hub, ours or PEFT's.

    The revision is resolved once, and every file is taken from that commit. Shapes and dtypes are checked from the
    header, by a range request, before the weights come. Files lie in the Hub cache, from which it works offline.

    Args:
        repo: ``org/name`` or ``org/name@revision``.
        revision: A branch, a tag, a commit or ``refs/pr/N``; the default branch by default.
        output: Copy the files into this directory, which does not exist yet.
        token: A token, False for none; by default HF_TOKEN or the stored login.

    Returns:
        The adapter; its ``source`` is ``org/name@sha``.

    Raises:
        HubError: The repository, the revision or a file cannot be had.
        AdapterError: The files are no adapter.
        UnknownSurgeryError: No installed plugin understands it. Nothing is imported on the word of a file.
        OutputExistsError: ``output`` exists.
    """
    of = HubId.parse(repo, revision)
    if output is not None:
        refuse_existing(Path(output))
    client = Client(token)
    at = client.resolve(of)
    folder = _folder(client, at)
    try:
        adapter = replace(registry().read_adapter(folder), source=f"{at.repo}@{at.sha}")
    except UnknownSurgeryError as error:
        raise _named(error, at) from error
    if output is not None:
        _copy(folder, Path(output), at, of)
    return adapter


def _folder(client: Client, at: Snapshot) -> Path:
    """The directory of the Hub cache that holds the two files, checked."""
    config, weights = client.cached(at, CONFIG_NAME), client.cached(at, WEIGHTS_NAME)
    if config is None or weights is None:
        files = client.named(at, (CONFIG_NAME, WEIGHTS_NAME, _PICKLE, "config.json"))
        _refuse_others(files, at)
        config = small(client, at, files, CONFIG_NAME)
        body = read_json(config)
        header, _, total = read_remote(client, at, WEIGHTS_NAME)
        if total != files[WEIGHTS_NAME].size:
            raise AdapterError(
                "two sizes of one file",
                where=f"{at}/{WEIGHTS_NAME}",
                found=f"{total} bytes",
                expected=f"{files[WEIGHTS_NAME].size} bytes, as it is listed",
            )
        try:
            check_header(header, body, f"{at}/{WEIGHTS_NAME}")
        except UnknownSurgeryError as error:
            raise _named(error, at) from error
    client.fetch(at, CONFIG_NAME)
    return client.fetch(at, WEIGHTS_NAME).parent


def _refuse_others(files: Mapping[str, RemoteFile], at: Snapshot) -> None:
    if WEIGHTS_NAME in files and CONFIG_NAME in files:
        return
    missing = CONFIG_NAME if WEIGHTS_NAME in files else WEIGHTS_NAME
    hint = "an adapter's repository has adapter_config.json and adapter_model.safetensors"
    if _PICKLE in files:
        hint = f"{_PICKLE} is a pickle, which can run code: load it with PEFT and push it as safetensors"
    elif "config.json" in files:
        hint = "this is a model: name the adapter's repository"
    raise AdapterError(f"no {missing}", where=at, found=", ".join(sorted(files)) or "none of our files", hint=hint)


def check_header(header: Header, config: Mapping[str, Any], where: str) -> None:
    """What can be known of an adapter before its weights come: that we know its kind, and that they have its shape.

    Raises:
        AdapterError: A tensor that cannot be the adapter's.
        UnknownSurgeryError: No installed plugin understands it.
    """
    manifest = _manifest(header, where)
    if manifest is None:
        registry().for_peft_type(config.get("peft_type"))
    else:
        registry().named(str(manifest.get("surgery")))
    if not header.entries:
        raise AdapterError("no tensor", where=where)
    indices = config.get("token_indices")
    rows = len(indices) if isinstance(indices, list) else None
    for entry in header.entries.values():
        if not entry.name.endswith(_ROWS):
            continue
        if entry.dtype not in EDITABLE:
            raise AdapterError(
                "rows of a dtype that no adapter has",
                where=f"{where}: {entry.name}",
                expected=", ".join(EDITABLE),
                found=entry.dtype,
            )
        if len(entry.shape) != 2 or entry.shape[0] != rows:
            raise AdapterError(
                "rows that are not the config's token_indices",
                where=f"{where}: {entry.name}",
                expected=f"({rows}, D)",
                found=list(entry.shape),
            )


def _manifest(header: Header, where: str) -> dict[str, Any] | None:
    text = header.metadata.get(METADATA_KEY)
    if text is None:
        return None
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError("the manifest is broken", where=where, found=str(error)[:120]) from error
    if not isinstance(body, dict):
        raise AdapterError("the manifest is broken", where=where, found=type(body).__name__)
    return body


def _named(error: UnknownSurgeryError, at: Snapshot) -> UnknownSurgeryError:
    """The same error with the repository, and with what to look for."""
    return UnknownSurgeryError(
        error.what,
        where=at,
        expected=f"a plugin for {error.where}",
        found=error.found,
        hint=f"look for an embedsurgery plugin that brings {str(error.where)!r}",
    )


def _copy(folder: Path, output: Path, at: Snapshot, of: HubId) -> None:
    with staged_directory(output) as staging:
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            shutil.copyfile(folder / name, staging / name)
            sync_path(staging / name)
        note = staging / SOURCE
        note.parent.mkdir()
        body = {"repo": at.repo, "revision": of.revision, "sha": at.sha}
        note.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
        sync_path(note)

"""Reads the headers, index and config of a checkpoint directory, and no weights.

``graph/from_names.py`` interprets the names of tensors; ``shards.py`` reads and writes rows.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedsurgery.errors import CheckpointError
from embedsurgery.files.json_reading import CONFIG as BOUNDS_OF_CONFIG
from embedsurgery.files.json_reading import INDEX as BOUNDS_OF_INDEX
from embedsurgery.files.json_reading import read_json
from embedsurgery.files.safetensors import Entry, Header, read_header
from embedsurgery.graph.from_names import Stored

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"


@dataclass(frozen=True)
class Checkpoint:
    """The headers of a checkpoint directory.

    Attributes:
        directory: The directory.
        headers: File name -> header, for every weight file.
        location: Tensor name -> file name, as a loader resolves it.
        config: Content of ``config.json``; None if there is none.
        indexed: Whether an index names the weight files.
    """

    directory: Path
    headers: Mapping[str, Header]
    location: Mapping[str, str]
    config: Mapping[str, Any] | None
    indexed: bool

    def entry(self, name: str) -> Entry:
        """Return a tensor's entry in its file."""
        return self.headers[self.location[name]].entries[name]

    def path(self, name: str) -> Path:
        """Return the path of the file that holds a tensor."""
        return self.directory / self.location[name]

    def stored_tensors(self) -> list[Stored]:
        """Return every tensor, for `walk_names`."""
        return [
            Stored(name, self.entry(name).dtype, self.entry(name).shape, group=name, file=self.location[name])
            for name in self.location
        ]


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read a directory's headers, index and config.

    Raises:
        CheckpointError: It is not a directory, has no safetensors weights, or its files contradict each other.
    """
    if not os.path.isdir(directory):
        raise CheckpointError(
            "not a checkpoint directory" if os.path.exists(directory) else "no such checkpoint directory",
            where=directory,
            expected="a directory",
            found="a file" if os.path.exists(directory) else None,
            hint="pass the directory that the model was downloaded or saved to",
        )
    single, index = directory / SINGLE, directory / INDEX
    config = read_config(directory / CONFIG) if (directory / CONFIG).exists() else None
    if single.exists() and index.exists():
        raise CheckpointError(
            "two sets of weights",
            where=directory,
            found=f"{SINGLE} and {INDEX}",
            hint="loaders read the single file and ignore the shards: remove the outdated one",
        )
    if index.exists():
        location = read_weight_map(index, index)
        headers = {name: read_header(directory / name) for name in dict.fromkeys(location.values())}
        return checkpoint_from_index(directory, headers, location, config)
    file = SINGLE if single.exists() else _find_single_file(directory)
    header = read_header(directory / file)
    return Checkpoint(directory, {file: header}, dict.fromkeys(header.entries, file), config, indexed=False)


def read_config(path: Path) -> dict[str, Any]:
    """Read a ``config.json``.

    Raises:
        CheckpointError: It is not a JSON object, or too large to be a config.
    """
    return read_json(path, BOUNDS_OF_CONFIG)


def read_weight_map(index: Path, where: Path) -> dict[str, str]:
    """Read an index: tensor -> name of a safetensors file in the same directory.

    Args:
        index: The file.
        where: Its name for messages: a downloaded file lies elsewhere.

    Raises:
        CheckpointError: The file is not an index, or names a file outside its directory or of another format.
    """
    body = read_json(index, BOUNDS_OF_INDEX).get("weight_map")
    if not isinstance(body, dict) or not body or not all(isinstance(v, str) for v in body.values()):
        raise CheckpointError("invalid index", where=where, expected="weight_map, an object of file names")
    for file in dict.fromkeys(body.values()):
        if not is_plain_name(file) or not file.endswith(".safetensors"):
            raise CheckpointError(
                "the index names an invalid file",
                where=where,
                expected="a safetensors file in the same directory",
                found=repr(file)[:120],
            )
    return body


def checkpoint_from_index(
    directory: Path, headers: Mapping[str, Header], location: Mapping[str, str], config: Mapping[str, Any] | None
) -> Checkpoint:
    """Build a checkpoint from its index and the headers of the files that the index names.

    Args:
        directory: The checkpoint.
        headers: File name -> header.
        location: Tensor name -> file name, from the index.
        config: Content of ``config.json``; None if there is none.

    Raises:
        CheckpointError: A file lacks a tensor that the index assigns to it, or two files have the same tensor.
    """
    index = directory / INDEX
    for name, file in location.items():
        if name not in headers[file].entries:
            raise CheckpointError(
                "the index names a tensor that its shard does not have",
                where=index,
                expected=f"{name} in {file}",
                hint="download the checkpoint again",
            )
    _refuse_duplicates(headers, location, index)
    return Checkpoint(directory, headers, location, config, indexed=True)


def _refuse_duplicates(headers: Mapping[str, Header], location: Mapping[str, str], index: Path) -> None:
    """Refuse a tensor that is in two shards. Loaders differ in which one they read, so a merge may be ignored."""
    holders: dict[str, str] = {}
    for file, header in headers.items():
        for name in header.entries:
            other = holders.setdefault(name, file)
            if other != file:
                raise CheckpointError(
                    "a tensor is in two shards",
                    where=index,
                    expected=f"{name} only in {location.get(name, 'one of them')}",
                    found=f"{other} and {file}",
                    hint="download the checkpoint again",
                )


def is_plain_name(name: str) -> bool:
    """Whether an untrusted name is a plain file name, without directories, ``..``, backslashes or NUL."""
    return bool(name) and name == Path(name).name and name not in (".", "..") and "\\" not in name and "\0" not in name


def _find_single_file(directory: Path) -> str:
    """Return the only safetensors file of a directory without an index."""
    names = sorted(p.name for p in directory.glob("*.safetensors"))
    if "adapter_model.safetensors" in names:
        raise CheckpointError(
            "this is an adapter, not a model",
            where=directory,
            expected=SINGLE,
            found="adapter_model.safetensors",
            hint="pass the base model's directory",
        )
    if len(names) == 1:
        return names[0]
    hint = "save the model with save_pretrained"
    if any(directory.glob("*.bin")):
        hint = "the .bin files are pickles, which can run code when they are loaded: convert them to safetensors first"
    raise CheckpointError(
        "no safetensors weights",
        where=directory,
        expected=f"{SINGLE} or {INDEX}",
        found=", ".join(names) or "none",
        hint=hint,
    )

"""A checkpoint directory: which files hold its tensors, its index and its config, all read without a weight.

What the names mean is ``names.py``'s; rows are read and written by ``stores/shards.py``.
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
from embedsurgery.files.locking import STATE_DIRECTORY as STATE_DIRECTORY
from embedsurgery.files.safetensors import Entry, Header, read_header
from embedsurgery.graph.from_names import Stored

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A directory's weights by header.

    Attributes:
        directory: Where it is.
        headers: File name -> header, for every file that holds weights.
        location: Tensor name -> file name, as a loader resolves it.
        config: ``config.json``, None where there is none.
        indexed: Whether an index names the files.
    """

    directory: Path
    headers: Mapping[str, Header]
    location: Mapping[str, str]
    config: Mapping[str, Any] | None
    indexed: bool

    def entry(self, name: str) -> Entry:
        """Where a tensor lies in its file."""
        return self.headers[self.location[name]].entries[name]

    def path(self, name: str) -> Path:
        """The file that a tensor lies in."""
        return self.directory / self.location[name]

    def stored(self) -> list[Stored]:
        """Every tensor, as `names.walk_names` takes them."""
        return [
            Stored(name, self.entry(name).dtype, self.entry(name).shape, group=name, file=self.location[name])
            for name in self.location
        ]


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read a directory's headers, index and config.

    Raises:
        CheckpointError: It is no directory, holds no safetensors weights, or its files contradict each other.
    """
    if not os.path.isdir(directory):
        what = (
            "a file, where a checkpoint directory was expected"
            if os.path.exists(directory)
            else "no such checkpoint directory"
        )
        raise CheckpointError(
            what, where=directory, hint="give the directory that the model was downloaded or saved to"
        )
    single, index = directory / SINGLE, directory / INDEX
    config = read_config(directory / CONFIG) if (directory / CONFIG).exists() else None
    if single.exists() and index.exists():
        raise CheckpointError(
            "two sets of weights",
            where=directory,
            found=f"{SINGLE} beside {INDEX}",
            hint="loaders take the single file and ignore the shards: remove the one that is stale",
        )
    if index.exists():
        location = weight_map(index, index)
        headers = {name: read_header(directory / name) for name in dict.fromkeys(location.values())}
        return indexed(directory, headers, location, config)
    file = SINGLE if single.exists() else _only_file(directory)
    header = read_header(directory / file)
    return Checkpoint(directory, {file: header}, dict.fromkeys(header.entries, file), config, indexed=False)


def read_config(path: Path) -> dict[str, Any]:
    """What a ``config.json`` says.

    Raises:
        CheckpointError: It is no JSON object, or too large to be a config.
    """
    return read_json(path, BOUNDS_OF_CONFIG)


def weight_map(index: Path, where: Path) -> dict[str, str]:
    """Tensor -> file of an index; all are plain names of safetensors files.

    Args:
        index: The file.
        where: What it is called, for messages.

    Raises:
        CheckpointError: The file is none, or names others.
    """
    body = read_json(index, BOUNDS_OF_INDEX).get("weight_map")
    if not isinstance(body, dict) or not body or not all(isinstance(v, str) for v in body.values()):
        raise CheckpointError("the index has no weight_map of file names", where=where)
    for file in dict.fromkeys(body.values()):
        if not is_plain_name(file) or not file.endswith(".safetensors"):
            raise CheckpointError(
                "the index names a file outside its directory, or no safetensors file",
                where=where,
                expected="a plain file name",
                found=repr(file)[:120],
            )
    return body


def indexed(
    directory: Path, headers: Mapping[str, Header], location: Mapping[str, str], config: Mapping[str, Any] | None
) -> Checkpoint:
    """The checkpoint of an index and the headers of the files that it names.

    Raises:
        CheckpointError: A file does not hold a tensor that the index has it hold, or two hold one.
    """
    index = directory / INDEX
    for name, file in location.items():
        if name not in headers[file].entries:
            raise CheckpointError(
                "the index names a tensor that its shard does not hold",
                where=index,
                expected=f"{name} in {file}",
                hint="download the checkpoint again",
            )
    _refuse_twice(headers, location, index)
    return Checkpoint(directory, headers, location, config, indexed=True)


def _refuse_twice(headers: Mapping[str, Header], location: Mapping[str, str], index: Path) -> None:
    """A tensor in two shards: loaders differ in which they take, so a merge into one would be seen by some alone."""
    holders: dict[str, str] = {}
    for file, header in headers.items():
        for name in header.entries:
            other = holders.setdefault(name, file)
            if other != file:
                raise CheckpointError(
                    "a tensor lies in two shards",
                    where=index,
                    expected=f"{name} in {location.get(name, 'one of them')} alone",
                    found=f"in {other} and {file}",
                    hint="download the checkpoint again",
                )


def is_plain_name(name: str) -> bool:
    """Whether a name from a file is a file name and nothing else: no path, no parent, nothing hidden in it."""
    return bool(name) and name == Path(name).name and name not in (".", "..") and "\\" not in name and "\0" not in name


def _only_file(directory: Path) -> str:
    names = sorted(p.name for p in directory.glob("*.safetensors"))
    if "adapter_model.safetensors" in names:
        raise CheckpointError(
            "an adapter, where a model was expected",
            where=directory,
            expected=SINGLE,
            found="adapter_model.safetensors",
            hint="name the base model's directory",
        )
    if len(names) == 1:
        return names[0]
    hint = "save the model with save_pretrained"
    if any(directory.glob("*.bin")):
        hint = "the .bin files are pickles, which can run code: convert them to safetensors first"
    raise CheckpointError(
        "no safetensors weights",
        where=directory,
        expected=f"{SINGLE} or {INDEX}",
        found=", ".join(names) or "none",
        hint=hint,
    )

"""A model of the Hub as a directory for as long as it is worked on: all that a merge needs, or as much as is read.

What has to be whole is downloaded into the Hub cache and linked from there. Where only headers and some rows are
looked at, weight files are headers and holes, and rows come by range requests: see ``range_store.py``.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants

from embedsurgery.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME
from embedsurgery.errors import EmbedSurgeryError, EmbedSurgeryWarning
from embedsurgery.files.copying import copy_file
from embedsurgery.hub.client import Client, RemoteFile, Snapshot
from embedsurgery.hub.faults import faults
from embedsurgery.hub.headers import read_remote, remote_checkpoint
from embedsurgery.hub.ids import HubId
from embedsurgery.stores.checkpoint import CONFIG, INDEX, STATE_DIRECTORY, Checkpoint

_OTHER_FORMATS = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".pickle",
    ".msgpack",
    ".h5",
    ".gguf",
    ".onnx",
    ".onnx_data",
    ".ot",
    ".tflite",
    ".nemo",
    ".mlmodel",
)
"""Ends of the names of weights in other formats: a merge would leave them stale, and some can run code."""

_TOKENIZER = (".json", ".model", ".txt", ".jinja")


@contextmanager
def downloaded(of: HubId, *, adapters: bool = False) -> Iterator[tuple[Path, Snapshot]]:
    """Inside, a model of the Hub as a directory, and the commit that it is: weights as links into the Hub cache.

    Only what a merge needs comes: safetensors weights and small files, no weights in other formats.

    Args:
        of: Its id.
        adapters: Take a PEFT adapter, too: its two files, and a tokenizer beside them.

    Raises:
        HubError: It cannot be had.
        CheckpointError: It has no safetensors weights.
    """
    client = Client()
    at = client.resolve(of)
    with scratch(at) as folder:
        link_whole(client, at, folder, adapters=adapters)
        yield folder, at


def link_whole(client: Client, at: Snapshot, folder: Path, *, adapters: bool = False) -> None:
    """Put what a merge needs of a model into a directory: weights as links into the Hub cache, small files as copies.

    Offline it is what the Hub cache has.
    """
    cached = _cached_names(client, at) if constants.is_offline_mode() else []
    if cached:
        names = cached
        warnings.warn(
            f"offline: {at} is taken as far as the Hub cache has it, {len(names)} files",
            EmbedSurgeryWarning,
            stacklevel=5,
        )
    else:
        files = client.files(at, everything=True)
        if adapters and WEIGHTS_NAME in files and CONFIG not in files:
            names = [name for name in files if name in (CONFIG_NAME, WEIGHTS_NAME) or _is_tokenizers(name)]
        else:
            names = wanted(files, remote_checkpoint(client, at, files).headers)
    for name in names:
        path = client.fetch(at, name)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            (folder / name).symlink_to(path.resolve())
        else:
            shutil.copyfile(path, folder / name)


def pinned(of: HubId) -> HubId:
    """The same with the commit that it means now in place of its revision."""
    at = Client().resolve(of)
    return HubId(at.repo, at.sha)


def _cached_names(client: Client, at: Snapshot) -> list[str]:
    """What the Hub cache holds of a commit, where the Hub cannot be asked what there is."""
    found = client.cached(at, CONFIG) or client.cached(at, CONFIG_NAME)
    if found is None:
        return []
    top = found.parent
    return sorted(path.relative_to(top).as_posix() for path in top.rglob("*") if path.is_file())


def wanted(files: Collection[str], weights: Collection[str]) -> list[str]:
    """The files that make a merged model: its safetensors weights, and all that are no weights."""
    return [
        name
        for name in files
        if name in weights
        or not (name.endswith(_OTHER_FORMATS) or name.endswith((".safetensors", ".safetensors.index.json")))
        or name == INDEX
        or name.startswith(f"{STATE_DIRECTORY}/")
    ]


def _is_tokenizers(name: str) -> bool:
    return "/" not in name and name.endswith(_TOKENIZER)


def comes_along(name: str) -> bool:
    """Whether it is read wherever a model is looked at: records of merges, config, index, tokenizer."""
    return name.startswith(f"{STATE_DIRECTORY}/") or _is_tokenizers(name)


class Scratch:
    """A temporary directory for a model of the Hub; removed by `remove`, or with this object.

    Attributes:
        at: The model.
        folder: The directory.
    """

    def __init__(self, at: Snapshot) -> None:
        self.at = at
        parent = tempfile.mkdtemp(prefix="embedsurgery-")
        self.remove = weakref.finalize(self, shutil.rmtree, parent, ignore_errors=True)
        self.folder = Path(parent, f"{at.repo.replace('/', '--')}@{at.sha[:12]}")
        self.folder.mkdir()

    def rename(self, error: BaseException | None) -> None:
        """Let an error name the model in place of the directory."""
        if isinstance(error, EmbedSurgeryError):
            for fact in ("where", "expected", "found"):
                said = getattr(error, fact)
                if said is not None:
                    setattr(error, fact, str(said).replace(str(self.folder), str(self.at)))


@contextmanager
def scratch(at: Snapshot) -> Iterator[Path]:
    """A directory for a model, gone in the end; errors that leave it name the model in its place."""
    made = Scratch(at)
    try:
        yield made.folder
    except EmbedSurgeryError as error:
        made.rename(error)
        raise
    finally:
        made.remove()


def fill(
    client: Client,
    at: Snapshot,
    files: Mapping[str, RemoteFile],
    checkpoint: Checkpoint,
    names: Sequence[str],
    folder: Path,
) -> None:
    """The small files, and in place of each weight file one of its size that is a header and a hole."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name in checkpoint.headers:
            _, head, total = read_remote(client, at, name)
            with open(folder / name, "xb") as file:
                file.write(head)
                file.truncate(total)
        elif files[name].sha256 is None or comes_along(name):
            put(client, at, name, folder / name)


def put(client: Client, at: Snapshot, name: str, path: Path) -> None:
    """A file of the Hub as one of our own, whole, or not there."""
    cached = client.fetch(at, name).resolve()
    path.unlink(missing_ok=True)
    with faults(f"{at}/{name}", "copy out of the Hub cache"):
        copy_file(cached, path)

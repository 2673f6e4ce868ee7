"""A model on the Hub as a temporary directory, whole or sparse.

Whole: what a merge needs, downloaded into the Hub cache, weights linked from there. Sparse: weight files of full size
that hold only their headers; ``range_store.py`` reads rows into them by range requests.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants

from embedsurgery.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME
from embedsurgery.errors import EmbedSurgeryError, warn
from embedsurgery.files.copying import copy_file
from embedsurgery.files.locking import STATE_DIRECTORY
from embedsurgery.hub.client import Client, RemoteFile, Snapshot
from embedsurgery.hub.faults import translate_errors
from embedsurgery.hub.headers import fetch_header, read_remote_checkpoint
from embedsurgery.hub.ids import HubId
from embedsurgery.stores.checkpoint import CONFIG, INDEX, Checkpoint

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
"""Suffixes of weights in other formats. A merge would leave them stale, and some can run code."""

_TOKENIZER = (".json", ".model", ".txt", ".jinja")


@contextmanager
def download_model(hub_id: HubId, *, adapters: bool = False) -> Iterator[tuple[Path, Snapshot]]:
    """Yield a model as a temporary directory, and the commit that it was taken from.

    Only what a merge needs is downloaded: safetensors weights and small files, no weights in other formats.

    Args:
        hub_id: The model.
        adapters: Accept a PEFT adapter too: its two files, and a tokenizer beside them.

    Raises:
        HubError: The Hub does not give the model.
        CheckpointError: The repository has no safetensors weights.
    """
    client = Client()
    snapshot = client.resolve(hub_id)
    with scratch_directory(snapshot) as folder:
        link_model(client, snapshot, folder, adapters=adapters)
        yield folder, snapshot


def link_model(client: Client, snapshot: Snapshot, folder: Path, *, adapters: bool = False) -> None:
    """Put a model's files into a directory: weights as links into the Hub cache, small files as copies.

    Offline, these are the files that the Hub cache has.
    """
    cached = _cached_names(client, snapshot) if constants.is_offline_mode() else []
    if cached:
        names = cached
        warn(f"offline: {snapshot} is taken from the Hub cache, {len(names)} files; others may be missing")
    else:
        files = client.list_files(snapshot, everything=True)
        if adapters and WEIGHTS_NAME in files and CONFIG not in files:
            names = [name for name in files if name in (CONFIG_NAME, WEIGHTS_NAME) or _is_tokenizer_file(name)]
        else:
            names = select_files(files, read_remote_checkpoint(client, snapshot, files).headers)
    for name in names:
        path = client.fetch(snapshot, name)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):  # gigabytes: linked, not copied
            (folder / name).symlink_to(path.resolve())
        else:
            shutil.copyfile(path, folder / name)


def pin_revision(hub_id: HubId) -> HubId:
    """Replace an id's revision by the commit that it currently means."""
    snapshot = Client().resolve(hub_id)
    return HubId(snapshot.repo, snapshot.sha)


def _cached_names(client: Client, snapshot: Snapshot) -> list[str]:
    """List the files of a commit that the Hub cache has, for work without a connection."""
    config = client.find_cached(snapshot, CONFIG) or client.find_cached(snapshot, CONFIG_NAME)
    if config is None:
        return []
    top = config.parent
    return sorted(path.relative_to(top).as_posix() for path in top.rglob("*") if path.is_file())


def select_files(files: Collection[str], weights: Collection[str]) -> list[str]:
    """Select the files of a merged model: the checkpoint's safetensors weights, and every file that is not weights."""
    return [
        name
        for name in files
        if name in weights
        or not (name.endswith(_OTHER_FORMATS) or name.endswith((".safetensors", ".safetensors.index.json")))
        or name == INDEX
        or name.startswith(f"{STATE_DIRECTORY}/")
    ]


def _is_tokenizer_file(name: str) -> bool:
    return "/" not in name and name.endswith(_TOKENIZER)


def is_companion_file(name: str) -> bool:
    """Whether reading a model needs this file beside the weights: merge records, config, index, tokenizer."""
    return name.startswith(f"{STATE_DIRECTORY}/") or _is_tokenizer_file(name)


class ScratchDirectory:
    """A temporary directory for a model on the Hub; deleted by `remove`, or with this object.

    Attributes:
        snapshot: The model.
        folder: The directory.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        parent = tempfile.mkdtemp(prefix="embedsurgery-")
        self.remove = weakref.finalize(self, shutil.rmtree, parent, ignore_errors=True)
        self.folder = Path(parent, f"{snapshot.repo.replace('/', '--')}@{snapshot.sha[:12]}")
        self.folder.mkdir()

    def relabel_error(self, error: BaseException | None) -> None:
        """Replace the directory's path in an error's fields by the model's id."""
        if isinstance(error, EmbedSurgeryError):
            for field in ("where", "expected", "found"):
                value = getattr(error, field)
                if value is not None:
                    setattr(error, field, str(value).replace(str(self.folder), str(self.snapshot)))


@contextmanager
def scratch_directory(snapshot: Snapshot) -> Iterator[Path]:
    """Yield a temporary directory for a model; errors raised inside name the model instead of the directory."""
    scratch = ScratchDirectory(snapshot)
    try:
        yield scratch.folder
    except EmbedSurgeryError as error:
        scratch.relabel_error(error)
        raise
    finally:
        scratch.remove()


def write_sparse_model(
    client: Client,
    snapshot: Snapshot,
    files: Mapping[str, RemoteFile],
    checkpoint: Checkpoint,
    names: Sequence[str],
    folder: Path,
) -> None:
    """Write a model's small files, and for each weight file a sparse file of its size that holds only its header.

    Args:
        client: Sends the requests.
        snapshot: The commit.
        files: Its files.
        checkpoint: Its headers.
        names: The files to write.
        folder: The directory to write into.
    """
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name in checkpoint.headers:
            _, head, total = fetch_header(client, snapshot, name)
            with open(folder / name, "xb") as file:
                file.write(head)
                file.truncate(total)
        elif files[name].sha256 is None or is_companion_file(name):
            download_to(client, snapshot, name, folder / name)


def download_to(client: Client, snapshot: Snapshot, name: str, path: Path) -> None:
    """Download a file of the Hub to a path, replacing what is there."""
    cached = client.fetch(snapshot, name).resolve()
    path.unlink(missing_ok=True)
    with translate_errors(f"{snapshot}/{name}", "copy out of the Hub cache"):
        copy_file(cached, path)

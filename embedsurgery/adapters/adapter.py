"""An adapter: manifest and tensors, how it is saved and loaded, and how it recognises its base.

The files are PEFT's: ``adapter_config.json`` and ``adapter_model.safetensors`` with PEFT's own tensor names; our
manifest lies in the safetensors metadata. What the tensors mean, and what PEFT calls them, is each surgery's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from embedsurgery.adapters.manifest import Manifest
from embedsurgery.errors import AdapterError, CheckpointError
from embedsurgery.files.json_reading import read_json
from embedsurgery.files.regular import open_regular
from embedsurgery.files.safetensors import TensorSource, read_header, read_tensor, write_file
from embedsurgery.graph.wrappers import plain_name
from embedsurgery.plugin_calls import call, check_json, wrong
from embedsurgery.tensors.raw import RawArray

if TYPE_CHECKING:
    import torch

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
METADATA_KEY = "embedsurgery"


@dataclass(frozen=True)
class PeftFiles:
    """An adapter directory's content in PEFT's terms: the config's JSON object, and tensors by PEFT's names."""

    config: Mapping[str, Any]
    tensors: Mapping[str, RawArray]


class Codec(Protocol):
    """The part of a surgery that an adapter needs to be saved: see `surgeries.base.Surgery`."""

    name: str

    def to_peft(self, adapter: Adapter) -> PeftFiles:
        """The files' content."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """What is saved, pushed, pulled, attached and merged. A snapshot: training does not change it.

    Attributes:
        manifest: What it is.
        raw: Name -> values; for tables of rows the name is the table record's.
        surgery: What understands it.
        source: Where it was pulled from, ``org/name@sha``; None for one that was not.
    """

    manifest: Manifest
    raw: Mapping[str, RawArray]
    surgery: Codec = field(repr=False)
    source: str | None = None

    def __repr__(self) -> str:
        tables = ", ".join(f"{len(t.indices)} rows of {t.name}" for t in self.manifest.tables if t.trained)
        return f"Adapter({self.manifest.surgery}: {tables})"

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Name -> a new CPU tensor; token rows are (K, D) in fp32, in the order of their indices."""
        from embedsurgery.tensors.convert import from_raw

        return {name: from_raw(raw) for name, raw in self.raw.items()}

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors``, which PEFT reads as well.

        Each file is written beside its place and renamed into it, so an adapter that was there is replaced whole.

        Returns:
            The directory.

        Raises:
            AdapterError: The directory cannot be written, or is a model's.
            PluginError: Its surgery does not say what the files hold.
        """
        folder = Path(directory)
        if (folder / "config.json").exists():
            raise AdapterError(
                "the directory is a model's, which would be loaded as an adapter from then on",
                where=folder,
                found="config.json",
                hint="save into a directory of its own",
            )
        files = _files_of(self)
        metadata = {"format": "pt", METADATA_KEY: json.dumps(self.manifest.to_json(), sort_keys=True)}
        sources = {name: TensorSource.of(raw) for name, raw in files.tensors.items()}
        text = json.dumps(files.config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _replace(folder / WEIGHTS_NAME, lambda path: write_file(path, sources, metadata))
            _replace(folder / CONFIG_NAME, lambda path: _write_text(path, text))
        except OSError as error:
            raise AdapterError("cannot write the adapter", where=folder, found=error.strerror) from error
        return folder


def _files_of(adapter: Adapter) -> PeftFiles:
    where = f"{adapter.surgery.name}.to_peft"
    files = call(where, PeftFiles, adapter.surgery.to_peft, adapter)
    for name, raw in files.tensors.items():
        if not isinstance(raw, RawArray):
            raise wrong(where, f"{name} as a RawArray", type(raw).__name__)
    check_json(f"{where}: config", files.config)
    return files


def plainly_named(adapter: Adapter) -> Adapter:
    """The adapter under the names that its tables have in the base without wrappers such as PEFT's layers."""
    tables = tuple(
        replace(table, name=plain_name(table.name), aliases=tuple(map(plain_name, table.aliases)))
        for table in adapter.manifest.tables
    )
    raw = {plain_name(name): values for name, values in adapter.raw.items()}
    return replace(adapter, manifest=replace(adapter.manifest, tables=tables), raw=raw)


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(staged)
        os.replace(staged, path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


def _write_text(path: Path, text: str) -> None:
    with open(path, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_adapter_files(directory: str | os.PathLike[str]) -> tuple[PeftFiles, Manifest | None]:
    """An adapter directory's content, and our manifest where there is one.

    Raises:
        AdapterError: A file is missing, broken, or a pickle.
    """
    folder = Path(directory)
    if not os.path.exists(folder / WEIGHTS_NAME):
        hint = "an adapter is a directory with adapter_config.json and adapter_model.safetensors"
        if os.path.exists(folder) and not os.path.isdir(folder):
            raise AdapterError("a file, where an adapter's directory was expected", where=folder, hint=hint)
        if not os.path.isdir(folder):
            raise AdapterError("no such adapter directory", where=folder, hint="give the directory it was saved to")
        if (folder / "config.json").exists():
            raise AdapterError(
                "a model, where an adapter was expected",
                where=folder,
                expected=WEIGHTS_NAME,
                found="config.json",
                hint="name the adapter's directory",
            )
        if (folder / "adapter_model.bin").exists():
            hint = "adapter_model.bin is a pickle, which can run code: load it with PEFT and save it as safetensors"
        raise AdapterError(f"no {WEIGHTS_NAME}", where=folder, hint=hint)
    try:
        config = read_json(folder / CONFIG_NAME)
        header = read_header(folder / WEIGHTS_NAME)
        with open_regular(folder / WEIGHTS_NAME) as descriptor:
            tensors = {name: read_tensor(descriptor, entry) for name, entry in header.entries.items()}
    except CheckpointError as error:
        raise AdapterError(
            error.what, where=error.where, expected=error.expected, found=error.found, hint=error.hint
        ) from error
    text = header.metadata.get(METADATA_KEY)
    if text is None:
        return PeftFiles(config, tensors), None
    try:
        manifest = Manifest.from_json(json.loads(text))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, IndexError, OverflowError) as error:
        raise AdapterError(
            "the manifest is broken", where=folder / WEIGHTS_NAME, found=f"{type(error).__name__}: {error}"
        ) from error
    return PeftFiles(config, tensors), manifest

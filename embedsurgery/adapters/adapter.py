"""`Adapter`: manifest and tensors, saved to a directory and read from it.

The files are PEFT's: ``adapter_config.json`` and ``adapter_model.safetensors`` with PEFT's tensor names. embedsurgery's
manifest (``manifest.py``) is in the safetensors metadata. Each surgery defines what the tensors mean and their names in
PEFT. ``locate.py`` finds the adapter's tables in a base.
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
from embedsurgery.plugin_calls import call_plugin, check_json, wrong_result
from embedsurgery.tensors.raw import RawArray

if TYPE_CHECKING:
    import torch

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
METADATA_KEY = "embedsurgery"


@dataclass(frozen=True)
class PeftFiles:
    """The content of an adapter directory: the JSON object of PEFT's config, and tensors by PEFT's names."""

    config: Mapping[str, Any]
    tensors: Mapping[str, RawArray]


class Codec(Protocol):
    """The part of a `surgeries.surgery.Surgery` that saving an adapter needs."""

    name: str

    def to_peft(self, adapter: Adapter) -> PeftFiles:
        """Return the content of the files."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """What is saved, pushed, pulled, attached and merged. A snapshot: training does not change it.

    Attributes:
        manifest: Description of the adapter.
        raw: Name -> values. The rows of a table have the name of the table's record.
        surgery: The surgery that interprets it.
        source: Where it was pulled from, ``org/name@sha``; None if it was not pulled.
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
        """Name -> a new CPU tensor. Token rows are fp32 (K, D), in the order of their indices."""
        from embedsurgery.tensors.convert import from_raw

        return {name: from_raw(raw) for name, raw in self.raw.items()}

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors``, which PEFT reads too.

        Each file is written under another name and then renamed, so an existing adapter is replaced as a whole.

        Returns:
            The directory.

        Raises:
            AdapterError: The directory cannot be written, or is a model's.
            PluginError: The surgery's ``to_peft`` fails or returns the wrong thing.
        """
        folder = Path(directory)
        if (folder / "config.json").exists():
            raise AdapterError(
                "an adapter cannot be saved into a model's directory, which would then load as an adapter",
                where=folder,
                found="config.json",
                hint="save it to another directory",
            )
        files = _peft_files_of(self)
        metadata = {"format": "pt", METADATA_KEY: json.dumps(self.manifest.to_json(), sort_keys=True)}
        sources = {name: TensorSource.of(raw) for name, raw in files.tensors.items()}
        text = json.dumps(files.config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _replace_file(folder / WEIGHTS_NAME, lambda path: write_file(path, sources, metadata))
            _replace_file(folder / CONFIG_NAME, lambda path: _write_text_file(path, text))
        except OSError as error:
            raise AdapterError("cannot write the adapter", where=folder, found=error.strerror) from error
        return folder


def _peft_files_of(adapter: Adapter) -> PeftFiles:
    where = f"{adapter.surgery.name}.to_peft"
    files = call_plugin(where, PeftFiles, adapter.surgery.to_peft, adapter)
    for name, raw in files.tensors.items():
        if not isinstance(raw, RawArray):
            raise wrong_result(where, f"{name} as a RawArray", type(raw).__name__)
    check_json(f"{where}: config", files.config)
    return files


def strip_wrapper_names(adapter: Adapter) -> Adapter:
    """Return the adapter with the names that its tables have without wrappers such as PEFT's layers."""
    tables = tuple(
        replace(table, name=plain_name(table.name), aliases=tuple(map(plain_name, table.aliases)))
        for table in adapter.manifest.tables
    )
    raw = {plain_name(name): values for name, values in adapter.raw.items()}
    return replace(adapter, manifest=replace(adapter.manifest, tables=tables), raw=raw)


def _replace_file(path: Path, write: Callable[[Path], None]) -> None:
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(staged)
        os.replace(staged, path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


def _write_text_file(path: Path, text: str) -> None:
    with open(path, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_adapter_files(directory: str | os.PathLike[str]) -> tuple[PeftFiles, Manifest | None]:
    """Read an adapter directory's content, and embedsurgery's manifest if there is one.

    Raises:
        AdapterError: A file is missing, broken or a pickle.
    """
    folder = Path(directory)
    if not os.path.exists(folder / WEIGHTS_NAME):
        raise _not_an_adapter(folder)
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
    # The manifest may be any JSON: a list for an object, deeply nested, with infinity for an integer.
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, IndexError, OverflowError) as error:
        raise AdapterError(
            "the manifest is broken", where=folder / WEIGHTS_NAME, found=f"{type(error).__name__}: {error}"
        ) from error
    return PeftFiles(config, tensors), manifest


def _not_an_adapter(folder: Path) -> AdapterError:
    """Return the error for a path without ``adapter_model.safetensors``, with what is there instead."""
    if os.path.exists(folder) and not os.path.isdir(folder):
        hint = f"an adapter is a directory with {CONFIG_NAME} and {WEIGHTS_NAME}"
        return AdapterError("this is a file, not an adapter", where=folder, expected="a directory", hint=hint)
    if not os.path.isdir(folder):
        hint = "pass the directory that the adapter was saved to"
        return AdapterError("no such adapter directory", where=folder, hint=hint)
    if (folder / "config.json").exists():
        return AdapterError(
            "this directory is a model, not an adapter",
            where=folder,
            expected=WEIGHTS_NAME,
            found="config.json",
            hint="pass the adapter's directory",
        )
    if (folder / "adapter_model.bin").exists():
        return AdapterError(
            "the adapter's weights are a pickle, which could run code",
            where=folder,
            expected=WEIGHTS_NAME,
            found="adapter_model.bin",
            hint="load the adapter with PEFT and save it as safetensors",
        )
    hint = f"an adapter is a directory with {CONFIG_NAME} and {WEIGHTS_NAME}"
    return AdapterError("the adapter's weights are missing", where=folder, expected=WEIGHTS_NAME, hint=hint)

"""An adapter: manifest and tensors, how it is saved and loaded, and how it recognises its base.

The files are PEFT's: ``adapter_config.json`` and ``adapter_model.safetensors`` with PEFT's own tensor names; our
manifest lies in the safetensors metadata. What the tensors mean, and what PEFT calls them, is each surgery's.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from embedsurgery.calling import call, check_json, wrong
from embedsurgery.errors import AdapterError, CheckpointError
from embedsurgery.jsonfile import read_json
from embedsurgery.raw import RawArray
from embedsurgery.safetensors_file import TensorSource, open_regular, read_header, read_tensor, write_file
from embedsurgery.vocabulary import NewTokens
from embedsurgery.wrappers import plain_name

if TYPE_CHECKING:
    import torch

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
METADATA_KEY = "embedsurgery"
FORMAT = 1
MAIN_INPUT = "<input embeddings>"
"""Name of a table record that means the table of the model's input ids: a file may not say what that is called."""

FINGERPRINT_DTYPES = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class Fingerprint:
    """What the K original rows were, so that a base is recognised by content.

    Attributes:
        dtype: The dtype they were read in.
        sha256: For each of F32, BF16 and F16: hex digest of the rows rounded to it, (K, D) in the order of the indices.
    """

    dtype: str
    sha256: Mapping[str, str]

    @classmethod
    def of(cls, rows: RawArray) -> Fingerprint:
        """The fingerprint of rows as they are in a base."""
        return cls(rows.dtype, {dtype: rows.to(dtype).sha256() for dtype in FINGERPRINT_DTYPES})

    def matches(self, rows: RawArray) -> bool:
        """Whether rows of another copy of the base are the same, in the narrowest dtype either side has seen.

        A bf16 checkpoint loaded as fp32 is the same base, and so is one loaded as fp16: what one side saw is what
        the other gives when it is rounded to that side's dtype.
        """
        dtypes = {d if d in FINGERPRINT_DTYPES else "F32" for d in (self.dtype, rows.dtype)}
        if len(dtypes) > 1:
            dtypes.discard("F32")
        return any(rows.to(dtype).sha256() == self.sha256.get(dtype) for dtype in dtypes)


@dataclass(frozen=True)
class TableRecord:
    """Which table of the base a tensor is for.

    Attributes:
        name: The table's parameter name where the adapter was made; also its key in `Adapter.tensors`.
        aliases: Its other names there.
        indices: Rows of the table that the tensor's rows stand for, (K,).
        shape: The table's (V, D), None where a PEFT file does not say V.
        dtype: The table's dtype there, None where not known.
        tied: Whether the table was projection as well as lookup; None where no projection was in sight.
        fingerprint: Of the original rows; None in a file that PEFT wrote.
        disk_names: Its names in a checkpoint, where known.
        sampled: The rows that the fingerprint is of, where they are not ``indices``: new rows tell nothing of a base.
        trained: Whether the rows train; else they are only carried, so that the vocabulary is extended whole.
    """

    name: str
    aliases: tuple[str, ...]
    indices: tuple[int, ...]
    shape: tuple[int, int] | None = None
    dtype: str | None = None
    tied: bool | None = None
    fingerprint: Fingerprint | None = None
    disk_names: tuple[str, ...] = ()
    sampled: tuple[int, ...] = ()
    trained: bool = True

    @property
    def evidence(self) -> tuple[int, ...]:
        """The rows that the fingerprint is of."""
        return self.sampled or self.indices

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that the table may be found under, the best first."""
        return tuple(dict.fromkeys((self.name, *self.aliases, *self.disk_names)))


@dataclass(frozen=True)
class Manifest:
    """What an adapter is.

    Attributes:
        surgery: The surgery's registered name.
        surgery_version: Of what the surgery writes into ``config`` and the tensors.
        config: What the user asked for, as JSON values.
        tables: The tables it is for.
        base_model: Name or path of the base, as the model gave it.
        revision: Its revision, where known.
        tokens: Row -> token text, where a tokenizer was given.
        library_version: The embedsurgery that made it, or None for a file of PEFT's.
        new_tokens: Tokens that the base does not have, and that come with the adapter.
    """

    surgery: str
    surgery_version: int
    config: Mapping[str, Any]
    tables: tuple[TableRecord, ...]
    base_model: str | None = None
    revision: str | None = None
    tokens: Mapping[int, str] = field(default_factory=dict)
    library_version: str | None = None
    new_tokens: NewTokens | None = None

    def __post_init__(self) -> None:
        plain = json.loads(json.dumps(dict(self.config)))  # as it will be when it is read again
        object.__setattr__(self, "config", plain)

    def to_json(self) -> dict[str, Any]:
        """The manifest as JSON values."""
        body = asdict(self)
        body["format"] = FORMAT
        body["tokens"] = {str(index): text for index, text in self.tokens.items()}
        return body

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Manifest:
        """The inverse of `to_json`; what is not as expected raises KeyError, TypeError or ValueError."""
        if body["format"] != FORMAT:
            raise ValueError(f"manifest format {body['format']}, this version reads {FORMAT}")
        tables = tuple(_table(t) for t in body["tables"])
        if not tables or len({t.name for t in tables}) != len(tables):
            raise ValueError("no table, or one twice")
        tokens = {int(index): str(text) for index, text in body["tokens"].items()}
        return cls(
            surgery=str(body["surgery"]),
            surgery_version=int(body["surgery_version"]),
            config=dict(body["config"]),
            tables=tables,
            base_model=body["base_model"],
            revision=body["revision"],
            tokens=tokens,
            library_version=body["library_version"],
            new_tokens=None if body.get("new_tokens") is None else NewTokens.from_json(body["new_tokens"]),
        )


def _table(body: Mapping[str, Any]) -> TableRecord:
    mark = body["fingerprint"]
    shape = body["shape"]
    if mark is not None and not all(isinstance(mark["sha256"].get(d), str) for d in FINGERPRINT_DTYPES):
        raise ValueError("a fingerprint without its digests")
    if shape is not None and not (isinstance(shape, list) and len(shape) == 2 and all(type(s) is int for s in shape)):
        raise ValueError(f"a shape of {shape!r}, which is no table's")
    rows = sys.maxsize if shape is None else shape[0]
    sampled = body.get("sampled", [])
    for indices in (body["indices"], sampled):
        if not all(type(i) is int and 0 <= i < rows for i in indices):
            raise ValueError("indices that are no row numbers of the table")
        if len(set(indices)) != len(indices):
            raise ValueError("indices that repeat")
    return TableRecord(
        name=str(body["name"]),
        aliases=tuple(map(str, body["aliases"])),
        indices=tuple(body["indices"]),
        shape=None if shape is None else (shape[0], shape[1]),
        dtype=body["dtype"],
        tied=body["tied"],
        fingerprint=None if mark is None else Fingerprint(str(mark["dtype"]), dict(mark["sha256"])),
        disk_names=tuple(map(str, body["disk_names"])),
        sampled=tuple(sampled),
        trained=bool(body.get("trained", True)),
    )


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
        from embedsurgery.tensors import from_raw

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
            raise AdapterError("the directory is a model's, which would be loaded as an adapter from then on",
                               where=folder, found="config.json", hint="save into a directory of its own")  # fmt: skip
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
            raise AdapterError("a model, where an adapter was expected", where=folder, expected=WEIGHTS_NAME,
                               found="config.json", hint="name the adapter's directory")  # fmt: skip
        if (folder / "adapter_model.bin").exists():
            hint = "adapter_model.bin is a pickle, which can run code: load it with PEFT and save it as safetensors"
        raise AdapterError(f"no {WEIGHTS_NAME}", where=folder, hint=hint)
    try:
        config = read_json(folder / CONFIG_NAME)
        header = read_header(folder / WEIGHTS_NAME)
        with open_regular(folder / WEIGHTS_NAME) as descriptor:
            tensors = {name: read_tensor(descriptor, entry) for name, entry in header.entries.items()}
    except CheckpointError as error:
        raise AdapterError(error.what, where=error.where, expected=error.expected, found=error.found,
                           hint=error.hint) from error  # fmt: skip
    text = header.metadata.get(METADATA_KEY)
    if text is None:
        return PeftFiles(config, tensors), None
    try:
        manifest = Manifest.from_json(json.loads(text))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, IndexError, OverflowError) as error:
        raise AdapterError("the manifest is broken", where=folder / WEIGHTS_NAME,
                           found=f"{type(error).__name__}: {error}") from error  # fmt: skip
    return PeftFiles(config, tensors), manifest

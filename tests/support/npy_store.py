"""A plugin with a checkpoint format: one ``.npy`` file per tensor, a ``config.json``, and a list of the tensors."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

import embedsurgery as es
from embedsurgery.graph import Table
from embedsurgery.graph.architectures import ARCHITECTURES, Layout
from embedsurgery.graph.from_names import Stored, walk_names
from embedsurgery.plugins.hookspecs import StoreRecord
from embedsurgery.stores.store import Store
from embedsurgery.tensors.raw import RawArray

LIST = "tensors.json"
_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "int8": "I8"}


class NpyStore(Store):
    """A directory of arrays."""

    def __init__(self, directory: Path, architectures: Mapping[str, Layout] = ARCHITECTURES) -> None:
        self.directory, self.name = directory, str(directory)
        self.config = json.loads((directory / "config.json").read_text())
        self.files = {name: f"{name}.npy" for name in json.loads((directory / LIST).read_text())}
        arrays = {name: self._map(name) for name in self.files}
        stored = [Stored(n, _DTYPES[str(a.dtype)], a.shape, n, self.files[n]) for n, a in arrays.items()]
        self.graph = walk_names(stored, config=self.config, source=self.name, architectures=architectures)

    def _map(self, name: str, mode: str = "r") -> np.ndarray:
        return np.load(self.directory / self.files[name], mmap_mode=mode)  # type: ignore[call-overload]

    def copies(self, table: Table) -> tuple[str, ...]:
        return tuple(name for name, _ in table.files)

    def read_rows(self, name: str, indices: tuple[int, ...]) -> RawArray:
        return RawArray.of(self._map(name)[np.asarray(indices, np.int64)])

    def write_rows(self, name: str, indices: tuple[int, ...], rows: RawArray) -> None:
        array = self._map(name, "r+")
        array[np.asarray(indices, np.int64)] = rows.bits
        array.flush()

    def read_block(self, name: str, start: int, stop: int) -> RawArray:
        return RawArray.of(np.array(self._map(name)[start:stop]))

    def write_block(self, name: str, start: int, rows: RawArray) -> None:
        array = self._map(name, "r+")
        array[start : start + rows.shape[0]] = rows.bits
        array.flush()

    def tensor_names(self) -> Collection[str]:
        return self.files.keys()


def recognises(directory: Path) -> bool:
    return (directory / LIST).exists()


@es.hookimpl
def embedsurgery_stores() -> Sequence[StoreRecord]:
    return [StoreRecord("npy", recognises, NpyStore)]

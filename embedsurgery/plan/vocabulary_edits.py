"""Edits of a whole vocabulary: resizing it, and untying its head from the input table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from embedsurgery.files.safetensors import TensorSource
from embedsurgery.plan.edit import Edit, Footprint, Rows, Sizes, StoreFiles, Touched, Values, format_row_count
from embedsurgery.plan.serial import bytes_source, integers_source
from embedsurgery.tensors.raw import RawArray

if TYPE_CHECKING:
    from embedsurgery.plan.serial import PlanFile


@dataclass(frozen=True)
class Grow(Edit):
    """Add rows at the end of a vocabulary or, with a negative count, remove its last rows: the undo of growing.

    All tables and per-token vectors of the vocabulary are resized together. So is every size that depends on them:
    attributes of modules and configs in memory, ``config.json`` and the index on disk.

    Attributes:
        vocabulary: The vocabulary's name in the store's graph.
        count: Number of rows to add; negative to remove.
        rows: Table -> its new rows, (count, D), in any editable dtype. Empty for a negative count.
        vectors: Vector -> its new entries, (count,). Empty for a negative count.
        saved: In an undo, the bytes that are needed to restore a store exactly. For files: path -> the header of a
            weight file, or all bytes of a small file. Otherwise empty.
    """

    vocabulary: str
    count: int
    rows: Mapping[str, RawArray]
    vectors: Mapping[str, RawArray]
    saved: Mapping[str, bytes] = field(default_factory=dict)

    def describe(self) -> str:
        verb = "grow" if self.count > 0 else "shrink"
        return f"{verb} the vocabulary of {self.vocabulary} by {format_row_count(abs(self.count))}"

    def touches(self, sizes: Sizes) -> Touched:
        names = sizes.members.get(self.vocabulary, (self.vocabulary,))
        return Touched(self._last_rows(sizes, names), frozenset(self.saved))

    def replaced_rows(self, sizes: Sizes) -> Rows:
        return self._last_rows(sizes, sizes.tables_of(self.vocabulary)) if self.count < 0 else {}

    def _last_rows(self, sizes: Sizes, names: tuple[str, ...]) -> dict[str, range]:
        """Return the last rows of tables and vectors, which a negative count removes."""
        ends = ((name, sizes.rows.get(name, 0)) for name in names)
        return {name: range(max(end + self.count, 0), end) for name, end in ends}

    def footprint(self, store: StoreFiles) -> Footprint:
        return Footprint(replaced=tuple(store.resized_files(self.vocabulary)))

    def resize(self, sizes: Sizes) -> None:
        sizes.resize(self.vocabulary, self.count)

    def arrays(self) -> Mapping[str, RawArray]:
        return {**self.rows, **self.vectors}

    def values(self, sizes: Sizes) -> list[Values]:
        start = sizes.vocabularies.get(self.vocabulary, 0)
        return [Values(name, range(start, start + self.count), raw) for name, raw in self.vectors.items()]

    def padding(self) -> Mapping[str, RawArray]:
        return self.rows

    def with_values(self, new: Mapping[str, RawArray]) -> Grow:
        return replace(self, vectors={**self.vectors, **new})

    def join_key(self) -> str:
        return self.vocabulary

    def join(self, later: Grow) -> Grow:
        return Grow(
            self.vocabulary,
            self.count + later.count,
            _append(self.rows, later.rows),
            _append(self.vectors, later.vectors),
        )

    def encode(self, prefix: str, tensors: dict[str, TensorSource]) -> dict[str, Any]:
        for kind, part in (("rows", self.rows), ("vectors", self.vectors)):
            tensors.update({f"{prefix}{kind}.{name}": TensorSource.of(raw) for name, raw in part.items()})
        tensors.update({f"{prefix}saved.{path}": bytes_source(data) for path, data in self.saved.items()})
        return {
            "vocabulary": self.vocabulary,
            "count": self.count,
            "rows": list(self.rows),
            "vectors": list(self.vectors),
            "saved": list(self.saved),
        }

    @classmethod
    def decode(cls, body: Mapping[str, Any], prefix: str, file: PlanFile) -> Grow:
        rows = {name: file.tensor(f"{prefix}rows.{name}") for name in body["rows"]}
        vectors = {name: file.tensor(f"{prefix}vectors.{name}") for name in body["vectors"]}
        saved = {path: file.data(f"{prefix}saved.{path}") for path in body["saved"]}
        return cls(str(body["vocabulary"]), int(body["count"]), rows, vectors, saved)


@dataclass(frozen=True)
class Untie(Edit):
    """Untie a head from the input table: it gets a copy of the table in which some rows differ.

    Attributes:
        table: The input table.
        head: Name of the head's weight, an alias of the table before the edit and a table afterwards.
        indices: Rows in which the two differ, (K,), each once.
        rows: The head's rows there, (K, D), in any editable dtype. In an undo, the input table's rows.
        undo: Whether to tie the head again and remove its table.
        saved: As in `Grow`.
    """

    table: str
    head: str
    indices: tuple[int, ...]
    rows: RawArray
    undo: bool = False
    saved: Mapping[str, bytes] = field(default_factory=dict)

    def describe(self) -> str:
        return f"tie {self.head} to {self.table} again" if self.undo else f"give {self.head} a table of its own"

    def touches(self, sizes: Sizes) -> Touched:
        return Touched({self.head: None}, frozenset(self.saved))

    def replaced_rows(self, sizes: Sizes) -> Rows:
        return {self.head: self.indices} if self.undo else {}

    def footprint(self, store: StoreFiles) -> Footprint:
        return store.untie_footprint(self)

    def tie_names(self) -> tuple[str, ...]:
        return self.table, self.head

    def arrays(self) -> Mapping[str, RawArray]:
        return {self.table: self.rows}

    def encode(self, prefix: str, tensors: dict[str, TensorSource]) -> dict[str, Any]:
        tensors[prefix + "indices"] = integers_source(self.indices)
        tensors[prefix + "rows"] = TensorSource.of(self.rows)
        tensors.update({f"{prefix}saved.{path}": bytes_source(data) for path, data in self.saved.items()})
        return {"table": self.table, "head": self.head, "undo": self.undo, "saved": list(self.saved)}

    @classmethod
    def decode(cls, body: Mapping[str, Any], prefix: str, file: PlanFile) -> Untie:
        saved = {path: file.data(f"{prefix}saved.{path}") for path in body["saved"]}
        return cls(
            str(body["table"]),
            str(body["head"]),
            file.integers(prefix + "indices"),
            file.tensor(prefix + "rows"),
            bool(body["undo"]),
            saved,
        )


def _append(first: Mapping[str, RawArray], second: Mapping[str, RawArray]) -> dict[str, RawArray]:
    """Concatenate arrays of equal names along the first axis, in the dtype of the first."""
    return {
        name: RawArray(
            raw.dtype,
            (raw.shape[0] + second[name].shape[0], *raw.shape[1:]),
            raw.data + second[name].to(raw.dtype).data,
        )
        for name, raw in first.items()
    }

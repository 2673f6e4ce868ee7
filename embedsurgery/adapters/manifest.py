"""What an adapter says of itself beside its tensors: manifest, records of tables, fingerprints."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from embedsurgery.adapters.carried_tokens import NewTokens
from embedsurgery.tensors.raw import RawArray

if TYPE_CHECKING:
    pass


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

"""The manifest of an adapter: which surgery, config, base and tables its tensors are for, and the base's fingerprints.

``adapter.py`` stores it in the adapter's files. ``locate.py`` uses table records and fingerprints to find the tables.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from embedsurgery.adapters.carried_tokens import NewTokens
from embedsurgery.tensors.raw import RawArray

FORMAT = 1

MAIN_INPUT = "<input embeddings>"
"""Name of a table record for the table of the model's input ids, in a file that does not have the table's name."""

FINGERPRINT_DTYPES = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class Fingerprint:
    """Hashes of K original rows, by which a base is recognised.

    Attributes:
        dtype: The dtype in which the rows were read.
        sha256: Dtype -> hex digest of the rows rounded to it, (K, D) in the order of the indices: F32, BF16 and F16.
    """

    dtype: str
    sha256: Mapping[str, str]

    @classmethod
    def of(cls, rows: RawArray) -> Fingerprint:
        """Compute the fingerprint of a base's rows."""
        return cls(rows.dtype, {dtype: rows.to(dtype).sha256() for dtype in FINGERPRINT_DTYPES})

    def matches(self, rows: RawArray) -> bool:
        """Whether rows of another copy of the base are the same, in the narrowest dtype that either side has seen.

        A bf16 checkpoint loaded as fp32 is the same base, and so is one loaded as fp16.
        """
        # fp32 holds every bf16 and fp16 number, so if one side is narrower, only its dtype can match. Of bf16 and fp16
        # neither holds the other: the base is the same if either side, rounded to the other's dtype, is equal.
        dtypes = {d if d in FINGERPRINT_DTYPES else "F32" for d in (self.dtype, rows.dtype)}
        if len(dtypes) > 1:
            dtypes.discard("F32")
        return any(rows.to(dtype).sha256() == self.sha256.get(dtype) for dtype in dtypes)


@dataclass(frozen=True)
class TableRecord:
    """A table of the base that the adapter has rows for.

    Attributes:
        name: The table's parameter name where the adapter was created; also its key in `Adapter.tensors`.
        aliases: Its other names there.
        indices: The rows of the table that the adapter has, (K,).
        shape: The table's (V, D), None in a PEFT file, which does not have V.
        dtype: The table's dtype, None if unknown.
        tied: Whether the table was lookup and projection; None if there was no projection.
        fingerprint: Fingerprint of the original rows; None in a file that PEFT wrote.
        disk_names: Its names in a checkpoint, if known.
        sampled: The rows in the fingerprint, if they are not ``indices``: a base does not have rows of new tokens.
        trained: Whether the rows were trained. If not, the adapter has them to extend every table of a vocabulary.
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
        """The rows in the fingerprint."""
        return self.sampled or self.indices

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that the table may have in a base, the likeliest first."""
        return tuple(dict.fromkeys((self.name, *self.aliases, *self.disk_names)))


@dataclass(frozen=True)
class Manifest:
    """Description of an adapter.

    Attributes:
        surgery: The surgery's registered name.
        surgery_version: Version of the format in which the surgery writes ``config`` and the tensors.
        config: The user's config, as JSON values.
        tables: The tables that the adapter is for.
        base_model: Name or path of the base, from the model's config.
        revision: Its revision, if known.
        tokens: Row -> text of its token, if a tokenizer was passed.
        library_version: Version of embedsurgery that created the adapter, None for a file from PEFT.
        new_tokens: Tokens that the adapter adds to its base.
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
        plain = json.loads(json.dumps(dict(self.config)))  # tuples become lists, as when it is read again
        object.__setattr__(self, "config", plain)

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as JSON values."""
        body = asdict(self)
        body["format"] = FORMAT
        body["tokens"] = {str(index): text for index, text in self.tokens.items()}
        return body

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Manifest:
        """Parse the result of `to_json`. Anything unexpected raises KeyError, TypeError or ValueError."""
        if body["format"] != FORMAT:
            raise ValueError(f"manifest format must be {FORMAT}, got {body['format']}")
        tables = tuple(_decode_table(t) for t in body["tables"])
        if not tables or len({t.name for t in tables}) != len(tables):
            raise ValueError("tables are missing or repeated")
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


def _decode_table(body: Mapping[str, Any]) -> TableRecord:
    fingerprint = body["fingerprint"]
    shape = body["shape"]
    if fingerprint is not None:
        if not all(isinstance(fingerprint["sha256"].get(d), str) for d in FINGERPRINT_DTYPES):
            raise ValueError("a fingerprint lacks digests")
        fingerprint = Fingerprint(str(fingerprint["dtype"]), dict(fingerprint["sha256"]))
    if shape is not None and not (isinstance(shape, list) and len(shape) == 2 and all(type(s) is int for s in shape)):
        raise ValueError(f"the shape of a table must be two integers, got {shape!r}")
    rows = sys.maxsize if shape is None else shape[0]
    sampled = body.get("sampled", [])
    for indices in (body["indices"], sampled):
        if not all(type(i) is int and 0 <= i < rows for i in indices):
            raise ValueError("indices must be row numbers of the table")
        if len(set(indices)) != len(indices):
            raise ValueError("indices are repeated")
    return TableRecord(
        name=str(body["name"]),
        aliases=tuple(map(str, body["aliases"])),
        indices=tuple(body["indices"]),
        shape=None if shape is None else (shape[0], shape[1]),
        dtype=body["dtype"],
        tied=body["tied"],
        fingerprint=fingerprint,
        disk_names=tuple(map(str, body["disk_names"])),
        sampled=tuple(sampled),
        trained=bool(body.get("trained", True)),
    )

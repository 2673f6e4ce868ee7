"""`Plan` and `Undo`, lists of edits, and their common file format.

An undo restores what a plan changed. The record of a merge is an undo with facts about the merge, and a journal is an
undo of files. Each is a safetensors file: arrays are its tensors, everything else is JSON in its metadata, and the last
tensor is the sha256 of all bytes before it. ``serial.py`` has the parts of this format, ``stores/apply.py`` applies
plans.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from embedsurgery.errors import PlanError
from embedsurgery.files.safetensors import TensorSource, check_seal, read_header, write_file
from embedsurgery.graph import EmbeddingGraph
from embedsurgery.plan.edit import Edit
from embedsurgery.plan.file_edits import PatchFile, PutFile, SetBytes
from embedsurgery.plan.row_edits import SetBlocks, SetEntries, SetRows
from embedsurgery.plan.serial import PlanFile
from embedsurgery.plan.token_edits import AddTokens, Suppress
from embedsurgery.plan.vocabulary_edits import Grow, Untie

FORMAT = 1
"""Version of the file format."""

SEAL = "sha256"
"""Name of the last tensor, the checksum."""

METADATA_KEY = "embedsurgery.plan"
"""Key of the JSON in the file's metadata."""

KINDS: Mapping[str, type[Edit]] = {
    kind.__name__: kind
    for kind in (SetRows, SetEntries, SetBlocks, Grow, AddTokens, Suppress, Untie, PatchFile, SetBytes, PutFile)
}
"""Name of an edit in a file -> its class. New edits are added here."""


@dataclass(frozen=True)
class Edits:
    """Edits in order, with facts about them: the common base of `Plan` and `Undo`.

    Attributes:
        edits: The edits.
        facts: JSON values. A merge's record has the adapter, the time and hashes of what was written.
    """

    edits: tuple[Edit, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> list[str]:
        """Describe each edit in one line."""
        return [edit.describe() for edit in self.edits]

    def kept_bytes(self, graph: EmbeddingGraph) -> int:
        """Return how many bytes of rows the undo of these edits keeps."""
        return sum(edit.kept_bytes(graph) for edit in self.edits)

    def save(self, path: Path) -> None:
        """Write to a new file, and fsync it.

        Raises:
            PlanError: It has blocks that are computed from the current rows, which cannot be saved.
            FileExistsError: The file exists.
        """
        tensors: dict[str, TensorSource] = {}
        described = [
            {"edit": type(edit).__name__, **edit.encode(f"{number}.", tensors)}
            for number, edit in enumerate(self.edits)
        ]
        body = {"format": FORMAT, "edits": described, "facts": dict(self.facts)}
        write_file(path, tensors, {METADATA_KEY: json.dumps(body, sort_keys=True)}, seal=SEAL)

    @classmethod
    def load(cls, path: Path, *, sealed: bool = False) -> Self:
        """Read from a file. Blocks of whole tables stay in the file and are read when they are applied.

        Args:
            path: The file.
            sealed: Read the whole file first and verify its checksum.

        Raises:
            PlanError: The file is not a plan, or has another format version.
            CheckpointError: It is not a safetensors file, or its checksum is wrong.
        """
        header = read_header(path)
        if sealed:
            check_seal(path, header, SEAL)
        try:
            body = json.loads(header.metadata[METADATA_KEY])
            if body["format"] != FORMAT:
                raise PlanError(
                    "unsupported format version of a plan",
                    where=path,
                    expected=FORMAT,
                    found=body["format"],
                    hint="use the embedsurgery version that wrote it, or a newer one",
                )
            file = PlanFile(path, header.entries)
            return cls(tuple(_decode(edit, f"{n}.", file) for n, edit in enumerate(body["edits"])), dict(body["facts"]))
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError, IndexError) as error:
            if isinstance(error, PlanError):
                raise
            found = f"{type(error).__name__}: {error}"
            raise PlanError("invalid plan file", where=path, found=found) from error


class Plan(Edits):
    """Edits to apply."""


class Undo(Edits):
    """Edits that restore a store bit for bit to its state before a plan."""


def _decode(body: Mapping[str, Any], prefix: str, file: PlanFile) -> Edit:
    kind = KINDS.get(body["edit"])
    if kind is None:
        raise PlanError(
            "unknown kind of edit",
            where=file.path,
            found=body["edit"],
            hint="use the embedsurgery version that wrote it, or a newer one",
        )
    return kind.decode(body, prefix, file)

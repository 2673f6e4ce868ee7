"""Plans and undos: edits in order, and their one serialised form.

A plan says what will change. An undo holds what was there before; the record of a merge is an undo with facts about the
merge, and a journal is an undo of files. All are one safetensors file: the numbers are its tensors, the rest is JSON in
its metadata, and its last tensor is the sha256 of everything before it. ``stores/apply.py`` does what a plan says.
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
"""Version of the serialised form."""

SEAL = "sha256"
"""The last tensor of the file."""

METADATA_KEY = "embedsurgery.plan"
"""Key of the file's metadata that holds the JSON."""

KINDS: Mapping[str, type[Edit]] = {
    kind.__name__: kind
    for kind in (SetRows, SetEntries, SetBlocks, Grow, AddTokens, Suppress, Untie, PatchFile, SetBytes, PutFile)
}
"""Name of an edit in a file -> its class. A new edit is added here."""


@dataclass(frozen=True)
class Edits:
    """Edits in order, with facts that go with them: what `Plan` and `Undo` share.

    Attributes:
        edits: What to do.
        facts: JSON values: in a merge's record the adapter, the time, hashes of what was written.
    """

    edits: tuple[Edit, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> list[str]:
        """A line for each edit."""
        return [edit.describe() for edit in self.edits]

    def kept_bytes(self, graph: EmbeddingGraph) -> int:
        """Bytes of the rows that the undo of these edits keeps: a few for rows, a table for a whole table."""
        return sum(edit.kept_bytes(graph) for edit in self.edits)

    def save(self, path: Path) -> None:
        """Write to a new file, fsynced.

        Raises:
            PlanError: It holds blocks that are computed from the table and so cannot be written down.
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
        """Read from a file; whole-table blocks stay in the file and are read when they are applied.

        Args:
            path: The file.
            sealed: Read all of it first, and check that it is what was written.

        Raises:
            PlanError: The file does not hold a plan, or one of a newer format.
            CheckpointError: The file is not a safetensors file.
        """
        header = read_header(path)
        if sealed:
            check_seal(path, header, SEAL)
        try:
            body = json.loads(header.metadata[METADATA_KEY])
            if body["format"] != FORMAT:
                raise PlanError(
                    "a plan of another format",
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
            raise PlanError("not a plan of embedsurgery", where=path, found=found) from error


class Plan(Edits):
    """What is going to change."""


class Undo(Edits):
    """Everything needed to put a store back bit for bit: edits that restore what was there before."""


def _decode(body: Mapping[str, Any], prefix: str, file: PlanFile) -> Edit:
    kind = KINDS.get(body["edit"])
    if kind is None:
        raise PlanError(
            "an edit that this version does not know",
            where=file.path,
            found=body["edit"],
            hint="use the embedsurgery version that wrote it, or a newer one",
        )
    return kind.decode(body, prefix, file)

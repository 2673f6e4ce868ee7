"""The report of a merge or unmerge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from embedsurgery.checkpoints.jobs import changed_weight_files
from embedsurgery.plan.plan import Edits
from embedsurgery.stores.store import Store

Progress = Callable[[int, int], None]
"""Called with the bytes copied so far and the bytes to copy."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge or unmerge did, or would do in a dry run.

    Attributes:
        output: The new directory, or the one changed in place; None for a dry run without an output.
        edits: One line for each edit.
        rows: Table -> number of rows set.
        files: The files that are changed.
        tokens: Text -> id of added tokens.
        copied: Bytes of the whole checkpoint; 0 in place.
        done: False for a dry run.
        in_place: Whether the checkpoint itself was changed.
        undo: Bytes of rows that the record keeps for the unmerge; large for an adapter of whole tables.
    """

    output: str | None
    edits: tuple[str, ...]
    rows: dict[str, int]
    files: tuple[str, ...]
    tokens: dict[str, int]
    copied: int
    done: bool
    in_place: bool = False
    undo: int = 0


def report_of(plan: Edits, store: Store, output: Path | None, copied: int) -> MergeReport:
    """The report of a plan before it is applied (``done`` is False)."""
    rows: dict[str, set[int]] = {}
    vectors = {name for v in store.graph.vocabularies for name in v.vectors}
    tokens: dict[str, int] = {}
    for edit in plan.edits:
        for name, indices in edit.sets().items():
            if name not in vectors:
                table = store.graph.find(name)  # None for a head that an earlier edit of the plan unties
                everything = range(table.shape[0] if table is not None else 0)
                rows.setdefault(name, set()).update(everything if indices is None else indices)
        tokens.update({token.content: token.id for token in edit.changed_tokens()})
    patched = [expected[0] for edit in plan.edits if (expected := edit.expected_file()) is not None]
    changed = (*changed_weight_files(plan, store), *dict.fromkeys(patched))
    return MergeReport(
        output=None if output is None else str(output),
        edits=tuple(plan.describe()),
        rows={table: len(indices) for table, indices in rows.items()},
        files=tuple(dict.fromkeys(changed)),
        tokens=tokens,
        copied=copied,
        done=False,
        undo=plan.kept_bytes(store.graph),
    )

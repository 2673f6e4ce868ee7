"""Checks a whole plan against a store before anything changes.

Each edit is checked against the state that the edits before it will leave: after a `Grow`, the new rows may be set.
``apply.py`` runs these checks and then applies the plan.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from embedsurgery.errors import PlanError, TableError
from embedsurgery.graph import Table
from embedsurgery.plan import AddTokens, Edit, Grow, PatchFile, SetBlocks, SetEntries, SetRows, Suppress, Untie
from embedsurgery.plan.file_edits import PutFile, SetBytes
from embedsurgery.plan.plan import Edits
from embedsurgery.stores.store import Store, check_indices, shorten
from embedsurgery.tensors.raw import EDITABLE, RawArray

_WEIGHTS_OR_CODE = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|pkl|pickle|gguf|h5|msgpack|onnx|npy|npz|py[cdow]?|so|dll|sh|exe|js)"
)
"""Names of files that contain weights or can be executed. No plan has a reason to patch them."""

_MAX_PATH = 200
"""Characters of the path of a file to patch. File systems allow 255 bytes for a name."""


def check_plan(plan: Edits, store: Store) -> None:
    """Check everything that `apply` checks before it changes anything.

    Raises:
        PlanError: The plan does not fit the store.
        UnsupportedError: The store cannot do one of the edits.
    """
    check_edits(expand(plan, store), store)


def expand(plan: Edits, store: Store) -> tuple[Edit, ...]:
    """Replace the edits that a store does by means of others, such as patches of tokenizer files.

    All edits that add tokens become one first, because a store of files patches each file once.
    """
    combined: dict[bool, AddTokens] = {}
    for edit in plan.edits:
        if isinstance(edit, AddTokens):
            before = combined.get(edit.remove, AddTokens((), edit.remove))
            tokens = tuple(dict.fromkeys((*before.tokens, *edit.tokens)))
            combined[edit.remove] = AddTokens(
                tokens, edit.remove, before.prefix or edit.prefix, before.restore_parts or edit.restore_parts
            )
    edits: list[Edit] = []
    for edit in plan.edits:
        if isinstance(edit, Suppress):
            edits.extend(store.expand_suppression(edit))
        elif not isinstance(edit, AddTokens):
            edits.append(edit)
        elif edit.remove in combined:
            edits.extend(store.expand_tokens(combined.pop(edit.remove)))
    return tuple(edits)


def check_edits(edits: tuple[Edit, ...], store: Store) -> None:
    """Check the edits that `expand` returned, as `check_plan`."""
    state = _PlannedState(store)
    for edit in edits:
        if isinstance(edit, SetRows):
            state.set_rows(edit)
        elif isinstance(edit, SetEntries):
            state.set_entries(edit)
        elif isinstance(edit, SetBlocks):
            state.set_blocks(edit)
        elif isinstance(edit, PatchFile):
            state.patch_file(edit)
        elif isinstance(edit, Grow):
            state.grow(edit)
        elif isinstance(edit, Untie):
            state.untie(edit)
        elif isinstance(edit, (SetBytes, PutFile)):
            raise PlanError(
                "this edit belongs in a journal, not in a plan",
                where=store.name,
                found=edit.describe(),
                hint="to undo an interrupted change, run: embedsurgery recover",
            )


class _PlannedState:
    """The state of a store after the edits so far. Each method checks an edit and records its effect."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.added_rows: dict[str, int] = {}  # by table or vocabulary; negative for removed rows
        self.rewritten: set[str] = set()
        self.patched: set[str] = set()
        self.set: dict[str, set[int]] = {}

    def table(self, name: str) -> Table:
        """Return a table with the shape that it will have; refuse one whose rows cannot be set."""
        try:
            table = self.store.graph.table(name)
        except TableError as error:
            raise PlanError(
                "the plan names a table that the store does not have",
                where=self.store.name,
                expected=name,
                found=error.found,
            ) from error
        self.store.check_editable(table)
        # A file that an earlier edit replaces is new, so links to the old one are safe.
        if not table.files or not {file for _, file in table.files} <= self.rewritten:
            self.store.check_writable(table)
        return replace(table, shape=(table.shape[0] + self.added_rows.get(table.name, 0), table.shape[1]))

    def set_rows(self, edit: SetRows) -> None:
        """Check and record a `SetRows`."""
        table = self.table(edit.table)
        check_indices(table, edit.indices)
        shape = (len(edit.indices), table.shape[1])
        _check_array(edit.rows, shape, "wrong shape or dtype of rows", f"{self.store.name}: {table.name}")
        self.claim(table.name, list(edit.indices))

    def set_blocks(self, edit: SetBlocks) -> None:
        """Check and record a `SetBlocks`."""
        table = self.table(edit.table)
        where = f"{self.store.name}: {table.name}"
        if 0 in table.shape:
            raise PlanError("the table is empty", where=where, found=list(table.shape))
        if edit.blocks.shape != table.shape:
            raise PlanError(
                "wrong shape of a whole table", where=where, expected=list(table.shape), found=list(edit.blocks.shape)
            )
        self.claim(table.name, list(range(table.shape[0])))

    def set_entries(self, edit: SetEntries) -> None:
        """Check and record a `SetEntries`."""
        where = f"{self.store.name}: {edit.vector}"
        vocabulary = next((v for v in self.store.graph.vocabularies if edit.vector in v.vectors), None)
        if vocabulary is None:
            found = ", ".join(name for v in self.store.graph.vocabularies for name in v.vectors) or "none"
            raise PlanError(
                "the plan names a per-token vector that the store does not have",
                where=self.store.name,
                expected=edit.vector,
                found=found,
            )
        files = set(self.store.entry_ranges(edit.vector, ()))
        if not files or not files <= self.rewritten:
            self.store.check_vector(edit.vector)
        size = vocabulary.size + self.added_rows.get(vocabulary.name, 0)
        outside = [i for i in edit.indices if not 0 <= i < size]
        if outside:
            raise PlanError("entries out of range", where=where, expected=f"0 to {size - 1}", found=shorten(outside))
        _check_array(edit.entries, (len(edit.indices),), "wrong shape or dtype of entries", where)
        self.claim(edit.vector, list(edit.indices))

    def claim(self, name: str, indices: list[int]) -> None:
        """Record rows or entries that are set; refuse those that are set twice."""
        taken = self.set.setdefault(name, set())
        twice = sorted(taken.intersection(indices))
        if twice or len(set(indices)) != len(indices):
            twice = twice or sorted(i for i, count in Counter(indices).items() if count > 1)
            raise PlanError("rows would be set twice", where=name, expected="each row once", found=shorten(twice))
        taken.update(indices)

    def patch_file(self, edit: PatchFile) -> None:
        """Check and record a `PatchFile`."""
        _check_path(edit.path, self.store)
        self.claim_file(edit.path)
        found = digest_of(self.store.read_file(edit.path))
        if found != edit.before:
            raise PlanError(
                "a file changed after the plan was made",
                where=f"{self.store.name}: {edit.path}",
                expected=_format_digest(edit.before),
                found=_format_digest(found),
            )

    def claim_file(self, path: str) -> None:
        """Record a file that changes; refuse one that changes twice."""
        if path in self.patched:
            raise PlanError("a file would be changed twice", where=f"{self.store.name}: {path}", expected="once")
        self.patched.add(path)

    def grow(self, edit: Grow) -> None:
        """Check and record a `Grow`."""
        where = f"{self.store.name}: {edit.vocabulary}"
        graph = self.store.graph
        vocabulary = next((v for v in graph.vocabularies if v.name == edit.vocabulary), None)
        if vocabulary is None:
            raise PlanError(
                "the plan names a vocabulary that the store does not have",
                where=self.store.name,
                expected=edit.vocabulary,
                found=", ".join(v.name for v in graph.vocabularies) or "none",
            )
        if vocabulary.name in self.added_rows:
            raise PlanError("a vocabulary would be resized twice", where=where, expected="one Grow for each vocabulary")
        tables = [graph.table(name) for name in vocabulary.tables]
        least = min(table.shape[0] for table in tables)
        if edit.count == 0 or least + edit.count < 1:
            raise PlanError(
                "cannot resize a vocabulary by this count",
                where=where,
                found=edit.count,
                expected=f"a positive count, or -1 to {1 - least}",
            )
        self.store.check_growth(vocabulary, edit.count)
        count = max(edit.count, 0)
        rows = {table.name: (count, table.shape[1]) for table in tables} if count else {}
        _check_new_rows(edit.rows, rows, where)
        _check_new_rows(edit.vectors, dict.fromkeys(vocabulary.vectors, (count,)) if count else {}, where)
        for path in self.store.resized_files(vocabulary.name):
            self.claim_file(path)
            self.rewritten.add(path)
        self.added_rows.update(dict.fromkeys((vocabulary.name, *vocabulary.tables), edit.count))

    def untie(self, edit: Untie) -> None:
        """Check and record an `Untie`."""
        if self.store.graph.find(edit.table) is not None:
            self.rewritten.update(self.store.untie_footprint(edit).replaced)
        table = self.table(edit.table)
        check_indices(table, edit.indices)
        shape = (len(edit.indices), table.shape[1])
        _check_array(edit.rows, shape, "wrong shape or dtype of rows", f"{self.store.name}: {edit.head}")
        head = self.store.graph.find(edit.head)
        if edit.undo and (head is None or head.name == edit.table or "output" not in head.roles):
            raise PlanError("the head to tie again has no table", where=self.store.name, expected=edit.head)
        self.store.check_untie(edit)


def _check_array(array: RawArray, shape: tuple[int, ...], what: str, where: str) -> None:
    """Refuse an array of another shape, or of a dtype that cannot be set."""
    if array.shape != shape or array.dtype not in EDITABLE:
        raise PlanError(
            what,
            where=where,
            expected=f"{shape} of {', '.join(EDITABLE)}",
            found=f"{array.shape} of {array.dtype}",
        )


def _check_new_rows(found: Mapping[str, RawArray], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuse a `Grow` unless it has rows for exactly the tables, or entries for the vectors, of the vocabulary."""
    if found.keys() != expected.keys():
        raise PlanError(
            "new rows for other tables or vectors than the vocabulary has",
            where=where,
            expected=", ".join(expected) or "none",
            found=", ".join(found) or "none",
        )
    for name, shape in expected.items():
        _check_array(found[name], shape, "wrong shape or dtype of new rows", f"{where}: {name}")


def _check_path(path: str, store: Store) -> None:
    """Refuse a `PatchFile` of anything but a small data file beside the weights.

    Records of merges come with checkpoints that others made. A forged one must not write code into the checkpoint,
    hide files in it, or reach out of it.
    """
    parts = path.split("/")
    plain = len(path) < _MAX_PATH and all(
        part and not part.startswith(".") and part.isprintable() and "\\" not in part for part in parts
    )
    if not plain or _WEIGHTS_OR_CODE.fullmatch(parts[-1].lower()):
        raise PlanError(
            "the plan would change more than a small data file in the checkpoint",
            where=store.name,
            expected="a path in the checkpoint, not of weights or code",
            found=repr(path)[:120],
            hint="do not trust the source of this plan or record",
        )


def digest_of(data: bytes | None) -> str | None:
    """Return the sha256 (hex) of a file's bytes; None for no file."""
    return None if data is None else hashlib.sha256(data).hexdigest()


def _format_digest(digest: str | None) -> str:
    return "no file" if digest is None else f"sha256 {digest[:12]}"

"""A plan checked against a store whole, before anything changes: each edit as those before it will have left things."""

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

_NO_DATA = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|pkl|pickle|gguf|h5|msgpack|onnx|npy|npz|py[cdow]?|so|dll|sh|exe|js)"
)
"""Names of files that hold weights or can run: no plan has a reason to change them as it does a small file."""


_LONGEST = 200
"""Characters of such a file's path; file systems take 255 bytes."""


def check(plan: Edits, store: Store) -> None:
    """All that `apply` checks beforehand; changes nothing."""
    check_edits(expanded(plan, store), store)


def expanded(plan: Edits, store: Store) -> tuple[Edit, ...]:
    """A plan's edits as the store does them: those that add tokens are made one, which it may do by patching files."""
    together: dict[bool, AddTokens] = {}
    for edit in plan.edits:
        if isinstance(edit, AddTokens):
            before = together.get(edit.remove, AddTokens((), edit.remove))
            tokens = tuple(dict.fromkeys((*before.tokens, *edit.tokens)))
            together[edit.remove] = AddTokens(
                tokens, edit.remove, before.prefix or edit.prefix, before.restore_parts or edit.restore_parts
            )
    edits: list[Edit] = []
    for edit in plan.edits:
        if isinstance(edit, Suppress):
            edits.extend(store.expand_suppression(edit))
        elif not isinstance(edit, AddTokens):
            edits.append(edit)
        elif edit.remove in together:
            edits.extend(store.expand_tokens(together.pop(edit.remove)))
    return tuple(edits)


def check_edits(edits: tuple[Edit, ...], store: Store) -> None:
    """As `check`, for edits that are `expanded` already."""
    state = _State(store)
    for edit in edits:
        if isinstance(edit, SetRows):
            table = state.table(edit.table)
            check_indices(table, edit.indices)
            if edit.rows.shape != (len(edit.indices), table.shape[1]) or edit.rows.dtype not in EDITABLE:
                raise PlanError(
                    "rows of the wrong shape or dtype",
                    where=f"{store.name}: {table.name}",
                    expected=f"({len(edit.indices)}, {table.shape[1]}) of {', '.join(EDITABLE)}",
                    found=f"{edit.rows.shape} of {edit.rows.dtype}",
                )
            state.claim(table.name, list(edit.indices))
        elif isinstance(edit, SetEntries):
            state.entries(edit)
        elif isinstance(edit, SetBlocks):
            table = state.table(edit.table)
            if 0 in table.shape:
                raise PlanError("the table is empty", where=f"{store.name}: {table.name}", found=list(table.shape))
            if edit.blocks.shape != table.shape:
                raise PlanError(
                    "a whole table of another shape",
                    where=f"{store.name}: {table.name}",
                    expected=list(table.shape),
                    found=list(edit.blocks.shape),
                )
            state.claim(table.name, list(range(table.shape[0])))
        elif isinstance(edit, PatchFile):
            _check_path(edit.path, store)
            state.patch(edit.path)
            found = store.read_file(edit.path)
            if digest(found) != edit.before:
                raise PlanError(
                    "a file is not what it was when the plan was made",
                    where=f"{store.name}: {edit.path}",
                    expected=_shown(edit.before),
                    found=_shown(digest(found)),
                )
        elif isinstance(edit, Grow):
            state.grow(edit)
        elif isinstance(edit, Untie):
            state.untie(edit)
        elif isinstance(edit, (SetBytes, PutFile)):
            raise PlanError(
                "an edit that belongs into a journal, not into a plan",
                where=store.name,
                found=edit.describe(),
                hint="a journal is for: embedsurgery recover",
            )


class _State:
    """A store as the edits before one will have left it."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.grown: dict[str, int] = {}  # table or vocabulary -> how many rows it will have got
        self.rewritten: set[str] = set()
        self.patched: set[str] = set()
        self.set: dict[str, set[int]] = {}

    def table(self, name: str) -> Table:
        """The table of a name with the rows that it will have; one that cannot be set is refused."""
        try:
            table = self.store.graph.table(name)
        except TableError as error:
            raise PlanError(
                "the plan names a table that is not in the store",
                where=self.store.name,
                expected=name,
                found=error.found,
            ) from error
        self.store.check_editable(table)
        if not table.files or not {file for _, file in table.files} <= self.rewritten:
            self.store.check_writable(table)
        return replace(table, shape=(table.shape[0] + self.grown.get(table.name, 0), table.shape[1]))

    def untie(self, edit: Untie) -> None:
        """Check an `Untie`."""
        if self.store.graph.find(edit.table) is not None:
            self.rewritten.update(self.store.untie_footprint(edit).replaced)
        table = self.table(edit.table)
        check_indices(table, edit.indices)
        if edit.rows.shape != (len(edit.indices), table.shape[1]) or edit.rows.dtype not in EDITABLE:
            raise PlanError(
                "rows of the wrong shape or dtype",
                where=f"{self.store.name}: {edit.head}",
                expected=f"({len(edit.indices)}, {table.shape[1]}) of {', '.join(EDITABLE)}",
                found=f"{edit.rows.shape} of {edit.rows.dtype}",
            )
        other = self.store.graph.find(edit.head)
        if edit.undo and (other is None or other.name == edit.table or "output" not in other.roles):
            raise PlanError(
                "the head to be tied again has no table of its own", where=self.store.name, expected=edit.head
            )
        self.store.check_untie(edit)

    def entries(self, edit: SetEntries) -> None:
        """Check entries of a vector, and note that they are set."""
        where = f"{self.store.name}: {edit.vector}"
        vocabulary = next((v for v in self.store.graph.vocabularies if edit.vector in v.vectors), None)
        if vocabulary is None:
            found = ", ".join(name for v in self.store.graph.vocabularies for name in v.vectors) or "none at all"
            raise PlanError(
                "the plan names a per-token vector that is not in the store",
                where=self.store.name,
                expected=edit.vector,
                found=found,
            )
        files = set(self.store.entry_ranges(edit.vector, ()))
        if not files or not files <= self.rewritten:
            self.store.check_vector(edit.vector)
        size = vocabulary.size + self.grown.get(vocabulary.name, 0)
        beyond = [i for i in edit.indices if not 0 <= i < size]
        if beyond:
            raise PlanError(
                "entries that the vector does not have", where=where, expected=f"0 to {size - 1}", found=shorten(beyond)
            )
        if edit.entries.shape != (len(edit.indices),) or edit.entries.dtype not in EDITABLE:
            raise PlanError(
                "entries of the wrong shape or dtype",
                where=where,
                expected=f"({len(edit.indices)},) of {', '.join(EDITABLE)}",
                found=f"{edit.entries.shape} of {edit.entries.dtype}",
            )
        self.claim(edit.vector, list(edit.indices))

    def claim(self, name: str, indices: list[int]) -> None:
        """Note rows or entries that are set; each can be once."""
        taken = self.set.setdefault(name, set())
        twice = sorted(taken.intersection(indices))
        if twice or len(set(indices)) != len(indices):
            twice = twice or sorted(i for i, count in Counter(indices).items() if count > 1)
            raise PlanError("rows would be set twice", where=name, expected="each row once", found=shorten(twice))
        taken.update(indices)

    def patch(self, path: str) -> None:
        """Note a file that changes; each can once."""
        if path in self.patched:
            raise PlanError("a file would be patched twice", where=f"{self.store.name}: {path}", expected="once")
        self.patched.add(path)

    def grow(self, edit: Grow) -> None:
        """Check a `Grow` against its vocabulary, and note what it does."""
        where = f"{self.store.name}: {edit.vocabulary}"
        graph = self.store.graph
        vocabulary = next((v for v in graph.vocabularies if v.name == edit.vocabulary), None)
        if vocabulary is None:
            found = ", ".join(v.name for v in graph.vocabularies) or "none at all"
            raise PlanError(
                "the plan names a vocabulary that is not in the store",
                where=self.store.name,
                expected=edit.vocabulary,
                found=found,
            )
        if vocabulary.name in self.grown:
            raise PlanError("a vocabulary would grow twice", where=where, expected="one Grow for each in a plan")
        tables = [graph.table(name) for name in vocabulary.tables]
        least = min(table.shape[0] for table in tables)
        if edit.count == 0 or least + edit.count < 1:
            raise PlanError(
                "a vocabulary cannot change by so many rows",
                where=where,
                found=edit.count,
                expected=f"at least one row more, or at most {least - 1} fewer",
            )
        self.store.check_growth(vocabulary, edit.count)
        count = max(edit.count, 0)
        rows = {table.name: (count, table.shape[1]) for table in tables} if count else {}
        _check_parts(edit.rows, rows, where)
        _check_parts(edit.vectors, dict.fromkeys(vocabulary.vectors, (count,)) if count else {}, where)
        for path in self.store.resized_files(vocabulary.name):
            self.patch(path)
            self.rewritten.add(path)
        self.grown.update(dict.fromkeys((vocabulary.name, *vocabulary.tables), edit.count))


def _check_parts(found: Mapping[str, RawArray], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuse a `Grow` whose rows or entries are not for exactly the tables or vectors there are."""
    if found.keys() != expected.keys():
        raise PlanError(
            "a growth for other tables or vectors than the vocabulary has",
            where=where,
            expected=", ".join(expected) or "none",
            found=", ".join(found) or "none",
        )
    for name, shape in expected.items():
        if found[name].shape != shape or found[name].dtype not in EDITABLE:
            raise PlanError(
                "new rows of the wrong shape or dtype",
                where=f"{where}: {name}",
                expected=f"{shape} of {', '.join(EDITABLE)}",
                found=f"{found[name].shape} of {found[name].dtype}",
            )


def _check_path(path: str, store: Store) -> None:
    """Refuse a `PatchFile` of anything but data beside the weights: plans come with checkpoints that others made."""
    parts = path.split("/")
    plain = len(path) < _LONGEST and all(
        part and not part.startswith(".") and part.isprintable() and "\\" not in part for part in parts
    )
    if not plain or _NO_DATA.fullmatch(parts[-1].lower()):
        raise PlanError(
            "a plan that would change more than a small data file in the checkpoint",
            where=store.name,
            expected="a path inside it, of no weights and nothing that runs",
            found=repr(path)[:120],
            hint="do not trust where this plan or record came from",
        )


def digest(data: bytes | None) -> str | None:
    """sha256 of a file's bytes, None for no file: what a `PatchFile` knows of what must be there."""
    return None if data is None else hashlib.sha256(data).hexdigest()


def _shown(digest: str | None) -> str:
    return "no file" if digest is None else f"sha256 {digest[:12]}"

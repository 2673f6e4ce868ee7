"""Several adapters in one pass: what a weight means, rows that more than one sets, and numbers that are none.

All of it is settled when the plans are made, from the base's rows: what comes out are plans with plain values, to be
applied one after another. How one adapter is planned is ``planning.py``'s.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from embedsurgery.adapter import Adapter
from embedsurgery.errors import ConfigError, EmbedSurgeryWarning, PlanError, UnsupportedError
from embedsurgery.graph import Table
from embedsurgery.plan import Edit, Grow, PatchFile, Plan, SetBlocks, SetEntries, SetRows
from embedsurgery.planning import plan_adapter
from embedsurgery.raw import RawArray
from embedsurgery.stores.base import Store, entries_of, rows_of
from embedsurgery.surgeries.base import Surgery
from embedsurgery.vocabulary import State

Conflict = Literal["last", "average"]
"""What is done with rows that several adapters set: the last one's stand, or the mean of what each would make them."""

_Floats = npt.NDArray[np.float32] | npt.NDArray[np.float64]
_SHOWN = 8


@dataclass(frozen=True)
class Part:
    """An adapter that is merged.

    Attributes:
        adapter: The adapter.
        name: What it is called, in messages and in the record of the merge.
        weight: Each row becomes ``base + weight * (row - base)``, computed in fp32 (fp64 for an fp64 table) and rounded
            once; at 1 it is the adapter's row, bit for bit. A row that the base does not have, because it is that of a
            token which the adapter brings, is the adapter's at any weight: there is nothing to interpolate from.
    """

    adapter: Adapter
    name: str
    weight: float = 1.0


def parts(adapters: Any, loaded: Callable[[Any], tuple[Adapter, str]]) -> list[Part]:
    """One adapter, several, or pairs (adapter, weight), as parts.

    Args:
        adapters: What was asked for.
        loaded: Gives an adapter and its name for what stands for one.

    Raises:
        ConfigError: There is none, or a weight is no finite number.
    """
    several = [adapters] if _is_one(adapters) else adapters
    items = list(several) if isinstance(several, Iterable) else []
    if not items:
        hint = "give attachment.adapter()" if hasattr(adapters, "adapter") else None
        found = type(adapters).__name__ if hint or not isinstance(adapters, Iterable) else "none"
        raise ConfigError("no adapter to merge", expected="one or several", found=found, hint=hint)
    found_parts = []
    for item in items:
        one, weight = item if _is_pair(item) else (item, 1.0)
        if isinstance(weight, bool) or not math.isfinite(weight):
            raise ConfigError("a weight that is no finite number", where=one, found=weight)
        adapter, name = loaded(one)
        found_parts.append(Part(adapter, name, float(weight)))
    return found_parts


def _is_pair(value: object) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and isinstance(value[1], Real)


def _is_one(value: object) -> bool:
    return isinstance(value, (Adapter, str, bytes)) or hasattr(value, "__fspath__") or _is_pair(value)


def plan_parts(
    asked: Sequence[Part],
    surgery_of: Callable[[str], Surgery],
    store: Store,
    texts: Mapping[int, str] | None,
    *,
    on_conflict: Conflict | None = None,
    allow_nan: bool = False,
) -> list[Plan]:
    """A plan for each part, to be applied one after another.

    Args:
        asked: What to bake in.
        surgery_of: Gives a surgery by its name.
        store: The base.
        texts: Id -> text of the base's tokens, None where no tokenizer is at hand.
        on_conflict: What to do with rows that several parts set. After each plan of an average such a row is the mean
            over the parts so far, so that taking the last out leaves what the others make.
        allow_nan: Merge rows with NaN or infinity.

    Raises:
        PlanError: Rows that several set and ``on_conflict`` does not settle, or numbers that are none.
        UnsupportedError: A weight for what cannot be interpolated.
        BaseMismatchError: The base is another.
        TableError: A table is not found.
    """
    if on_conflict is not None and on_conflict not in get_args(Conflict):
        raise ConfigError("no way to settle a conflict", where="on_conflict", found=repr(on_conflict),
                          expected=" or ".join(get_args(Conflict)))  # fmt: skip
    state = State.of(store.graph, texts)
    plans = []
    for part in asked:
        plan = plan_adapter(part.adapter, surgery_of(part.adapter.manifest.surgery), store, state)
        plans.append(plan if part.weight == 1 else _weighted(plan, part, store, texts))
    contested = _contested(plans, asked, store)
    if contested and on_conflict is None:
        found = "; ".join(_overlap(table, rows, asked) for table, rows in contested.items())
        raise PlanError("several adapters set the same rows", where=store.name, found=found,
                        hint="on_conflict (--on-conflict) 'last' or 'average' settles it")  # fmt: skip
    if contested and on_conflict == "average":
        plans = _averaged(plans, contested, store)
    if not allow_nan:
        plans = [_finite(plan, part, store) for plan, part in zip(plans, asked, strict=True)]
    return plans


def together(plans: Sequence[Plan]) -> Plan:
    """One plan that does what several do one after another: each row is set once, each vocabulary grows once."""
    edits = [edit for plan in plans for edit in plan.edits]
    growths: dict[str, Grow] = {}
    for edit in edits:
        if isinstance(edit, Grow):
            first = growths.get(edit.vocabulary)
            growths[edit.vocabulary] = edit if first is None else _longer(first, edit)
    covered: dict[str, set[int]] = {}
    kept: list[Edit] = []
    for edit in reversed(edits):  # what is set last stands
        if isinstance(edit, (SetRows, SetEntries)):
            taken = covered.setdefault(_name(edit), set())
            places = [n for n, index in enumerate(edit.indices) if index not in taken]
            taken.update(edit.indices)
            if places:
                kept.append(edit if len(places) == len(edit.indices) else _only(edit, places))
        elif not isinstance(edit, Grow):
            kept.append(edit)
    first_growths = list(growths.values())
    return Plan((*first_growths, *reversed(kept)))


def _name(edit: SetRows | SetEntries) -> str:
    return edit.table if isinstance(edit, SetRows) else edit.vector


def _only(edit: SetRows | SetEntries, places: list[int]) -> SetRows | SetEntries:
    indices = tuple(edit.indices[n] for n in places)
    if isinstance(edit, SetRows):
        return SetRows(edit.table, indices, edit.rows.take(places))
    return SetEntries(edit.vector, indices, edit.entries.take(places))


def _longer(first: Grow, second: Grow) -> Grow:
    def joined(a: Mapping[str, RawArray], b: Mapping[str, RawArray]) -> dict[str, RawArray]:
        return {name: RawArray(raw.dtype, (raw.shape[0] + b[name].shape[0], *raw.shape[1:]),
                               raw.data + b[name].to(raw.dtype).data) for name, raw in a.items()}  # fmt: skip

    return Grow(first.vocabulary, first.count + second.count, joined(first.rows, second.rows),
                joined(first.vectors, second.vectors))  # fmt: skip


# -- weights -----------------------------------------------------------------------------------------------------------


def _weighted(plan: Plan, part: Part, store: Store, texts: Mapping[int, str] | None) -> Plan:
    """The plan with every row part of the way from the base's."""
    new = part.adapter.manifest.new_tokens
    absent = {t.id: t.content for t in new.tokens if texts is None or texts.get(t.id) != t.content} if new else {}
    edits: list[Edit] = []
    for edit in plan.edits:
        if isinstance(edit, SetRows):
            edit = _rows_between(edit, store, part.weight, absent)
        elif isinstance(edit, SetEntries):
            edit = _entries_between(edit, store, part.weight, absent)
        elif isinstance(edit, SetBlocks):
            edit = _blocks_between(edit, part.weight)
        elif isinstance(edit, PatchFile):
            raise UnsupportedError("a weight for an adapter that rewrites a file", where=part.name, found=edit.path,
                                   hint="merge it at weight 1")  # fmt: skip
        edits.append(edit)
    if absent:
        named = ", ".join(map(repr, list(absent.values())[:4]))
        warnings.warn(f"weight {part.weight:g} of {part.name} leaves its new tokens ({named}) as they were trained: "
                      "the base has no rows of them to go from", EmbedSurgeryWarning, stacklevel=5)  # fmt: skip
    return Plan(tuple(edits), plan.facts)


def _rows_between(edit: SetRows, store: Store, weight: float, absent: Mapping[int, str]) -> SetRows:
    table = store.graph.table(edit.table)
    places = [n for n, i in enumerate(edit.indices) if i not in absent and 0 <= i < table.shape[0]]
    if not places or edit.rows.shape[1:] != table.shape[1:]:  # what does not fit is refused when the plan is checked
        return edit
    base = rows_of(store, table, tuple(edit.indices[n] for n in places))
    return SetRows(edit.table, edit.indices, _mixed(base, edit.rows, places, weight))


def _entries_between(edit: SetEntries, store: Store, weight: float, absent: Mapping[int, str]) -> SetEntries:
    size = store.read_vector(edit.vector).shape[0]
    places = [n for n, i in enumerate(edit.indices) if i not in absent and 0 <= i < size]
    if not places:
        return edit
    base = entries_of(store, edit.vector, tuple(edit.indices[n] for n in places))
    return SetEntries(edit.vector, edit.indices, _mixed(base, edit.entries, places, weight))


def _mixed(base: RawArray, new: RawArray, places: list[int], weight: float) -> RawArray:
    """``new``, of which some values are part of the way from ``base``, which has those alone."""
    double = _is_double(base.dtype, new.dtype)
    values = _wide(new, double).copy()
    values[places] = _between(_wide(base, double), values[places], weight)
    return RawArray.of(values)


def _blocks_between(edit: SetBlocks, weight: float) -> SetBlocks:
    blocks = edit.blocks

    def block(start: int, stop: int, current: RawArray) -> RawArray:
        new = blocks.block(start, stop, current)
        double = _is_double(current.dtype, new.dtype)
        return RawArray.of(_between(_wide(current, double), _wide(new, double), weight))

    return SetBlocks(edit.table, replace(blocks, block=block, stored=False))


def _between(base: _Floats, new: _Floats, weight: float) -> _Floats:
    """``base + weight * (new - base)``, from the nearer end, so that both ends are exact."""
    way = new.dtype.type(weight)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused by name later
        return base + way * (new - base) if weight < 0.5 else new - (1 - way) * (new - base)


def _is_double(table: str, rows: str) -> bool:
    return table == "F64" and rows == "F64"


def _wide(raw: RawArray, double: bool) -> _Floats:
    if raw.dtype == "F64" and double:
        return np.asarray(raw.bits, dtype=np.float64)
    return raw.float32().astype(np.float64) if double else raw.float32()


# -- rows that several set ---------------------------------------------------------------------------------------------

_Contested = dict[str, dict[int, list[int]]]
"""Table or vector -> row or entry -> the numbers of the parts that set it, where there are several."""

_Cells = tuple[str, Sequence[int], RawArray]
"""Name of a table or vector, indices, and the values that they become."""


def _cells(edit: Edit, sizes: dict[str, int]) -> list[_Cells]:
    """What an edit sets; ``sizes`` are those of the vocabularies before it, and are brought up to date.

    The rows of a growth are only filler, which the rows of its tokens are set over; its entries are the tokens' own.
    """
    if isinstance(edit, SetRows):
        return [(edit.table, edit.indices, edit.rows)]
    if isinstance(edit, SetEntries):
        return [(edit.vector, edit.indices, edit.entries)]
    if isinstance(edit, Grow):
        start = sizes.get(edit.vocabulary, 0)
        sizes[edit.vocabulary] = start + edit.count
        return [(name, range(start, start + edit.count), raw) for name, raw in edit.vectors.items()]
    return []


def _sizes(store: Store) -> dict[str, int]:
    return {v.name: v.size for v in store.graph.vocabularies}


def _contested(plans: Sequence[Plan], asked: Sequence[Part], store: Store) -> _Contested:
    """Rows and entries that several plans set.

    Raises:
        PlanError: One of them changes the whole table: what the others make of their rows is then no row of it.
    """
    owners: _Contested = {}
    whole: dict[str, int] = {}
    sizes = _sizes(store)
    for number, plan in enumerate(plans):
        for edit in plan.edits:
            for name, indices, _ in _cells(edit, sizes):
                rows = owners.setdefault(name, {})
                for index in indices:
                    holders = rows.setdefault(index, [])
                    if number not in holders:  # twice in one plan is refused when the plan is checked
                        holders.append(number)
            if isinstance(edit, SetBlocks):
                whole.setdefault(edit.table, number)
    for table, number in whole.items():
        setters = {n for holders in owners.get(table, {}).values() for n in holders}
        setters |= {
            n for n, plan in enumerate(plans) for e in plan.edits if isinstance(e, SetBlocks) and e.table == table
        }
        others = ", ".join(asked[n].name for n in sorted(setters - {number}))
        if others:
            raise PlanError("an adapter changes all rows of a table that others change too", where=f"{store.name}: "
                            f"{table}", found=f"all rows by {asked[number].name}, and rows of it by {others}",
                            hint="merge them one after another")  # fmt: skip
    found = {name: {i: n for i, n in rows.items() if len(n) > 1} for name, rows in owners.items()}
    return {name: rows for name, rows in found.items() if rows}


def _overlap(table: str, rows: Mapping[int, Sequence[int]], asked: Sequence[Part]) -> str:
    numbers = sorted({n for holders in rows.values() for n in holders})
    by = " and ".join(asked[n].name for n in numbers)
    return f"{_named(sorted(rows), [asked[n] for n in numbers])} of {table} by {by}"


def _averaged(plans: Sequence[Plan], contested: _Contested, store: Store) -> list[Plan]:
    """Contested rows become the mean over the plans so far: summed in fp64, and given as fp32 (fp64 for fp64)."""
    so_far: dict[tuple[str, int], list[npt.NDArray[np.float64]]] = {}
    sizes = _sizes(store)
    return [Plan(tuple(_mean(edit, contested, so_far, sizes) for edit in plan.edits), plan.facts) for plan in plans]


def _mean(
    edit: Edit,
    contested: _Contested,
    so_far: dict[tuple[str, int], list[npt.NDArray[np.float64]]],
    sizes: dict[str, int],
) -> Edit:
    changed: dict[str, RawArray] = {}
    for name, indices, raw in _cells(edit, sizes):
        places = [n for n, index in enumerate(indices) if index in contested.get(name, {})]
        if not places:
            continue
        values = _wide(raw, raw.dtype == "F64").copy()
        for n in places:
            earlier = so_far.setdefault((name, indices[n]), [])
            earlier.append(np.asarray(values[n], dtype=np.float64))
            with np.errstate(invalid="ignore"):
                values[n] = np.mean(np.stack(earlier), axis=0)
        changed[name] = RawArray.of(values)
    if isinstance(edit, SetRows) and changed:
        return replace(edit, rows=changed[edit.table])
    if isinstance(edit, SetEntries) and changed:
        return replace(edit, entries=changed[edit.vector])
    return replace(edit, vectors={**edit.vectors, **changed}) if isinstance(edit, Grow) and changed else edit


# -- numbers that are none ---------------------------------------------------------------------------------------------


def _finite(plan: Plan, part: Part, store: Store) -> Plan:
    """The plan, whose rows are all finite in their tables; those of whole tables are seen when they are made.

    Raises:
        PlanError: Rows that are not, named by their tokens.
    """
    edits: list[Edit] = []
    for edit in plan.edits:
        table = store.graph.find(edit.table) if isinstance(edit, (SetRows, SetBlocks)) else None
        if isinstance(edit, SetRows) and table is not None:
            bad = [edit.indices[n] for n in _broken(edit.rows, table)]
            if bad:
                raise _none(table, _named(bad, [part]), edit.rows, part.name)
        elif isinstance(edit, SetBlocks) and table is not None:
            edit = _checked_blocks(edit, table, part)
        elif isinstance(edit, Grow):
            for name, rows in edit.rows.items():
                if list(_broken(rows, store.graph.table(name))):
                    raise _none(store.graph.table(name), "the rows that pad it", rows, part.name)
        for name, indices, raw in _cells(edit, {}) if isinstance(edit, (SetEntries, Grow)) else ():
            if np.isnan(raw.float32()).any():  # infinity is what masks a token
                raise PlanError("entries that are NaN", where=f"{part.name}: {name}",
                                found=f"one of {len(indices)}", hint="train the adapter again; allow_nan (--allow-nan) "
                                "merges it all the same")  # fmt: skip
        edits.append(edit)
    return Plan(tuple(edits), plan.facts)


def _broken(rows: RawArray, table: Table) -> Iterator[int]:
    """Positions of rows that are not finite once they are rounded to the table's dtype."""
    rounded = rows.to(table.dtype).float32() if rows.dtype != "F64" or table.dtype != "F64" else rows.bits
    good = np.isfinite(np.asarray(rounded)).reshape(rows.shape[0], -1).all(axis=1)
    yield from (int(n) for n in np.flatnonzero(~good))


def _checked_blocks(edit: SetBlocks, table: Table, part: Part) -> SetBlocks:
    blocks = edit.blocks

    def block(start: int, stop: int, current: RawArray) -> RawArray:
        new = blocks.block(start, stop, current)
        if new.shape == current.shape:
            before = set(_broken(current, table))  # padding that was never a number stays as it is
            bad = [start + n for n in _broken(new, table) if n not in before]
            if bad:
                raise _none(table, _named(bad, [part]), new, part.name)
        return new

    return SetBlocks(edit.table, replace(blocks, block=block))


def _none(table: Table, rows: str, values: RawArray, name: str) -> PlanError:
    with np.errstate(invalid="ignore"):
        finite = bool(np.isfinite(np.asarray(values.float32() if values.dtype != "F64" else values.bits)).all())
    what = f"values that {table.dtype} cannot hold" if finite else "NaN or infinity"
    return PlanError(f"rows with {what}", where=f"{name}: {table.name}", found=rows,
                     hint="train the adapter again; allow_nan (--allow-nan) merges it all the same")  # fmt: skip


def _named(rows: Sequence[int], of: Sequence[Part]) -> str:
    """Rows for a message, with their tokens' texts where an adapter knows them."""
    texts = {index: text for part in reversed(of) for index, text in part.adapter.manifest.tokens.items()}
    shown = ", ".join(f"{i} ({texts[i]!r})" if i in texts else str(i) for i in rows[:_SHOWN])
    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return f"{'row' if len(rows) == 1 else 'rows'} {shown}{more}"

"""Several adapters in one pass: what a weight means, and plans for all of them that settle what each sets.

All of it is settled when the plans are made, from the base's rows: what comes out are plans with plain values, to be
applied one after another. How one adapter is planned is ``planning.py``'s.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from embedsurgery.adapters.carried_tokens import State
from embedsurgery.combining.conflicts import averaged, contested_rows, overlap
from embedsurgery.combining.non_finite import finite
from embedsurgery.combining.single import plan_adapter
from embedsurgery.combining.weighted_adapters import Floats, WeightedAdapter, is_double, wide
from embedsurgery.errors import ConfigError, EmbedSurgeryWarning, PlanError, UnsupportedError
from embedsurgery.plan import Edit, Plan
from embedsurgery.plan.blocks import BlockFunction
from embedsurgery.plan.edit import Sizes, Values
from embedsurgery.stores.store import Store, entries_of, rows_of
from embedsurgery.surgeries.surgery import BakeContext, Surgery
from embedsurgery.tensors.raw import RawArray

if TYPE_CHECKING:
    from embedsurgery.tokenizer.known import KnownTokens

Conflict = Literal["last", "average"]
"""What is done with rows that several adapters set: the last one's stand, or the mean of what each would make them."""


def plan_adapters(
    asked: Sequence[WeightedAdapter],
    surgery_of: Callable[[str], Surgery],
    store: Store,
    tokens: Callable[[], KnownTokens] | None,
    *,
    options: Any = None,
    on_conflict: Conflict | None = None,
    allow_nan: bool = False,
) -> list[tuple[WeightedAdapter, Plan]]:
    """Each part with its plan, in the order in which they are to be applied.

    It is that in which they were asked for, but what brings tokens at ids of its own comes before what takes the ids
    that follow.

    Args:
        asked: What to bake in.
        surgery_of: Gives a surgery by its name.
        store: The base.
        tokens: Gives what the base's tokenizer knows; None where no tokenizer is at hand.
        options: What is asked of the baking, of a class that the surgery names: of all, or of each in a sequence.
        on_conflict: What to do with rows that several parts set. After each plan of an average such a row is the mean
            over the parts so far, so that taking the last out leaves what the others make.
        allow_nan: Merge rows with NaN or infinity.

    Raises:
        ConfigError: Options for more or fewer adapters than there are.
        PlanError: Rows that several set and ``on_conflict`` does not settle, or numbers that are none.
        UnsupportedError: A weight for what cannot be interpolated.
        BaseMismatchError: The base is another.
        TableError: A table is not found.
    """
    if on_conflict is not None and on_conflict not in get_args(Conflict):
        raise ConfigError(
            "no way to settle a conflict",
            where="on_conflict",
            found=repr(on_conflict),
            expected=" or ".join(get_args(Conflict)),
        )
    each = list(options) if isinstance(options, (list, tuple)) else [options] * len(asked)
    if len(each) != len(asked):
        raise ConfigError("not as many bake options as adapters", expected=len(asked), found=len(each))
    surgeries = [surgery_of(part.adapter.manifest.surgery) for part in asked]
    order = _order(asked, surgeries)
    asked, surgeries, each = [asked[n] for n in order], [surgeries[n] for n in order], [each[n] for n in order]
    asking = any(p.adapter.manifest.new_tokens or s.makes_tokens for p, s in zip(asked, surgeries, strict=True))
    texts = dict(tokens().texts) if asking and tokens is not None else None
    kinds = Counter(part.adapter.manifest.surgery for part in asked)
    state = State.of(store.graph, texts)
    plans = []
    for part, surgery, option in zip(asked, surgeries, each, strict=True):
        if part.weight != 1 and surgery.makes_tokens:
            raise UnsupportedError(
                "a weight for an adapter that becomes tokens",
                where=part.name,
                found=part.weight,
                expected="1: the base has no rows to go from",
            )
        label = Path(part.name.partition("@")[0]).name
        alone = kinds[part.adapter.manifest.surgery] == 1
        parted = dict(state.parted)
        plan = plan_adapter(part.adapter, surgery, BakeContext(store, {}, state, tokens, label, alone, option))
        plan = plan if part.weight == 1 else _weighted(plan, part, store, texts)
        plans.append(plan if surgery.makes_tokens else _for_both(plan, parted))
    contested = contested_rows(plans, asked, store)
    if contested and on_conflict is None:
        found = "; ".join(overlap(table, rows, asked) for table, rows in contested.items())
        raise PlanError(
            "several adapters set the same rows",
            where=store.name,
            found=found,
            hint="on_conflict (--on-conflict) 'last' or 'average' settles it",
        )
    if contested and on_conflict == "average":
        plans = averaged(plans, contested, store)
    if not allow_nan:
        plans = [finite(plan, part, store) for plan, part in zip(plans, asked, strict=True)]
    return list(zip(asked, plans, strict=True))


def _order(asked: Sequence[WeightedAdapter], surgeries: Sequence[Surgery]) -> list[int]:
    """Numbers of the parts: those that become tokens at any ids go behind the last that has ids of its own."""
    last = max((n for n, part in enumerate(asked) if part.adapter.manifest.new_tokens is not None), default=-1)
    return sorted(range(len(asked)), key=lambda n: (n > last, n < last and surgeries[n].makes_tokens))


def _for_both(plan: Plan, parted: Mapping[str, str]) -> Plan:
    """A plan for tied tables, where an adapter before this one gives the projection a table of its own."""
    edits: list[Edit] = []
    for edit in plan.edits:
        edits.append(edit)
        other = edit.with_tables(parted)
        if other is not None:
            edits.append(other)
    return replace(plan, edits=tuple(edits))


def joined_plan(plans: Sequence[Plan]) -> Plan:
    """One plan that does what several do one after another: each row is set once, each vocabulary grows once."""
    edits = [edit for plan in plans for edit in plan.edits]
    first: dict[str, Edit] = {}  # what can be done once, joined, comes before everything else
    for edit in edits:
        key = edit.once()
        if key is not None:
            first[key] = first[key].joined(edit) if key in first else edit
    covered: dict[str, set[int]] = {}
    kept: list[Edit] = []
    for edit in reversed(edits):  # what is set last stands
        if edit.once() is not None:
            continue
        left = edit.restricted(lambda name, index: index not in covered.get(name, ()))
        for name, indices in edit.sets().items():
            covered.setdefault(name, set()).update(indices or ())
        if left is not None:
            kept.append(left)
    facts = {key: value for plan in plans for key, value in plan.facts.items()}
    return Plan((*first.values(), *reversed(kept)), facts)


def _weighted(plan: Plan, part: WeightedAdapter, store: Store, texts: Mapping[int, str] | None) -> Plan:
    """The plan with every row part of the way from the base's."""
    new = part.adapter.manifest.new_tokens
    absent = {t.id: t.content for t in new.tokens if texts is None or texts.get(t.id) != t.content} if new else {}
    sizes = Sizes(store.graph)
    edits: list[Edit] = []
    for edit in plan.edits:
        if not edit.interpolates:
            raise UnsupportedError(
                "a weight for an adapter that rewrites a file",
                where=part.name,
                found=edit.describe(),
                hint="merge it at weight 1",
            )
        if edit.sets():
            mixed = {v.name: _values_between(v, store, part.weight, absent) for v in edit.values(sizes)}
            edit = edit.with_values(mixed).with_blocks(partial(_blocks_between, weight=part.weight), stored=False)
        edits.append(edit)
    if absent:
        named = ", ".join(map(repr, list(absent.values())[:4]))
        warnings.warn(
            f"weight {part.weight:g} of {part.name} leaves its new tokens ({named}) as they were trained: "
            "the base has no rows of them to go from",
            EmbedSurgeryWarning,
            stacklevel=5,
        )
    return Plan(tuple(edits), plan.facts)


def _values_between(values: Values, store: Store, weight: float, absent: Mapping[int, str]) -> RawArray:
    """Rows or entries part of the way from the base's, other than those of tokens that the base does not have."""
    table = store.graph.find(values.name)
    size = table.shape[0] if table is not None else store.read_vector(values.name).shape[0]
    places = [n for n, i in enumerate(values.indices) if i not in absent and 0 <= i < size]
    if not places or (table is not None and values.values.shape[1:] != table.shape[1:]):
        return values.values  # what does not fit is refused when the plan is checked
    indices = tuple(values.indices[n] for n in places)
    base = entries_of(store, values.name, indices) if table is None else rows_of(store, table, indices)
    return _mixed(base, values.values, places, weight)


def _mixed(base: RawArray, new: RawArray, places: list[int], weight: float) -> RawArray:
    """``new``, of which some values are part of the way from ``base``, which has those alone."""
    double = is_double(base.dtype, new.dtype)
    values = wide(new, double).copy()
    values[places] = _between(wide(base, double), values[places], weight)
    return RawArray.of(values)


def _blocks_between(block: BlockFunction, weight: float) -> BlockFunction:
    """A block function whose rows are part of the way from the present ones."""

    def between(start: int, stop: int, current: RawArray) -> RawArray:
        new = block(start, stop, current)
        double = is_double(current.dtype, new.dtype)
        return RawArray.of(_between(wide(current, double), wide(new, double), weight))

    return between


def _between(base: Floats, new: Floats, weight: float) -> Floats:
    """``base + weight * (new - base)``, from the nearer end, so that both ends are exact."""
    way = new.dtype.type(weight)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused by name later
        return base + way * (new - base) if weight < 0.5 else new - (1 - way) * (new - base)

"""Plans all adapters of one merge: applies weights, resolves conflicts, checks for non-finite values.

Everything is decided when the plans are made, from the base's rows. The resulting plans hold plain values and are
applied one after another. ``single.py`` plans one adapter, ``conflicts.py`` finds and averages conflicts,
``non_finite.py`` checks values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from embedsurgery.adapters.carried_tokens import BaseState
from embedsurgery.combining.conflicts import average_conflicts, describe_conflict, find_conflicts
from embedsurgery.combining.non_finite import check_finite
from embedsurgery.combining.single import plan_adapter
from embedsurgery.combining.weighted_adapters import Floats, WeightedAdapter, to_floats, uses_float64
from embedsurgery.errors import ConfigError, PlanError, UnsupportedError, warn
from embedsurgery.plan import Edit, Plan
from embedsurgery.plan.blocks import BlockFunction
from embedsurgery.plan.edit import Sizes, Values
from embedsurgery.stores.store import Store, entries_of, rows_of
from embedsurgery.surgeries.surgery import BakeContext, Surgery
from embedsurgery.tensors.raw import RawArray

if TYPE_CHECKING:
    from embedsurgery.tokenizer.known import KnownTokens

Conflict = Literal["last", "average"]
"""How to resolve rows that several adapters set: keep the last adapter's, or average what each would give alone."""


def plan_adapters(
    adapters: Sequence[WeightedAdapter],
    surgery_of: Callable[[str], Surgery],
    store: Store,
    tokens: Callable[[], KnownTokens] | None,
    *,
    options: Any = None,
    on_conflict: Conflict | None = None,
    allow_nan: bool = False,
) -> list[tuple[WeightedAdapter, Plan]]:
    """Plan several adapters and return each with its plan, in the order in which to apply them.

    That is the given order, except that adapters with tokens at fixed ids come before those that take the next free
    ids.

    Args:
        adapters: The adapters to bake in.
        surgery_of: Returns a surgery by name.
        store: The base.
        tokens: Returns what the base's tokenizer knows; None if there is no tokenizer.
        options: Bake options, of a class that the surgery names: one for all adapters, or a sequence with one for each.
        on_conflict: How to resolve rows that several adapters set; by default they are refused. With "average", a row
            is the mean over the plans so far, so that unmerging the last adapter leaves what the others give.
        allow_nan: Merge rows with NaN or infinity.

    Raises:
        ConfigError: ``on_conflict`` is unknown, or the number of options differs from the number of adapters.
        PlanError: Several adapters set a row and ``on_conflict`` is None, or a row is not finite.
        UnsupportedError: A weight for an adapter that cannot be interpolated.
        BaseMismatchError: An adapter was made from another base.
        TableError: A table is not found.
    """
    if on_conflict is not None and on_conflict not in get_args(Conflict):
        raise ConfigError(
            "unknown conflict resolution",
            where="on_conflict",
            found=repr(on_conflict),
            expected=" or ".join(get_args(Conflict)),
        )
    each = list(options) if isinstance(options, (list, tuple)) else [options] * len(adapters)
    if len(each) != len(adapters):
        raise ConfigError("number of bake options and adapters differs", expected=len(adapters), found=len(each))
    surgeries = [surgery_of(item.adapter.manifest.surgery) for item in adapters]
    order = _order_adapters(adapters, surgeries)
    adapters, surgeries, each = [adapters[n] for n in order], [surgeries[n] for n in order], [each[n] for n in order]
    plans = _plan_each(adapters, surgeries, each, store, tokens)
    conflicts = find_conflicts(plans, adapters, store)
    if conflicts and on_conflict is None:
        raise PlanError(
            "several adapters set the same rows",
            where=store.name,
            found="; ".join(describe_conflict(table, rows, adapters) for table, rows in conflicts.items()),
            hint="pass on_conflict (--on-conflict) 'last' or 'average'",
        )
    if conflicts and on_conflict == "average":
        plans = average_conflicts(plans, conflicts, store)
    if not allow_nan:
        plans = [check_finite(plan, item, store) for plan, item in zip(plans, adapters, strict=True)]
    return list(zip(adapters, plans, strict=True))


def _plan_each(
    adapters: Sequence[WeightedAdapter],
    surgeries: Sequence[Surgery],
    options: Sequence[Any],
    store: Store,
    tokens: Callable[[], KnownTokens] | None,
) -> list[Plan]:
    """Plan each adapter with its weight. ``state`` carries new tokens, sizes and untied heads from one to the next."""
    needs_texts = any(
        item.adapter.manifest.new_tokens or surgery.makes_tokens
        for item, surgery in zip(adapters, surgeries, strict=True)
    )
    texts = dict(tokens().texts) if needs_texts and tokens is not None else None
    counts = Counter(item.adapter.manifest.surgery for item in adapters)
    state = BaseState.of(store.graph, texts)
    plans = []
    for item, surgery, option in zip(adapters, surgeries, options, strict=True):
        if item.weight != 1 and surgery.makes_tokens:
            raise UnsupportedError(
                "an adapter that becomes tokens cannot be weighted",
                where=item.name,
                found=item.weight,
                expected="weight 1: the base has no rows to interpolate from",
            )
        label = Path(item.name.partition("@")[0]).name
        alone = counts[item.adapter.manifest.surgery] == 1
        heads = dict(state.untied_heads)
        plan = plan_adapter(item.adapter, surgery, BakeContext(store, {}, state, tokens, label, alone, option))
        plan = plan if item.weight == 1 else _apply_weight(plan, item, store, texts)
        plans.append(plan if surgery.makes_tokens else _repeat_for_heads(plan, heads))
    return plans


def _order_adapters(adapters: Sequence[WeightedAdapter], surgeries: Sequence[Surgery]) -> list[int]:
    """Positions of the adapters in the order to apply them.

    An adapter with new tokens was trained at their ids and must get exactly those. One that becomes tokens (a soft
    prompt) takes the next free ids, so before the last adapter with fixed ids it could take one of them.
    """
    last = max((n for n, item in enumerate(adapters) if item.adapter.manifest.new_tokens is not None), default=-1)
    return sorted(range(len(adapters)), key=lambda n: (n > last, n < last and surgeries[n].makes_tokens))


def _repeat_for_heads(plan: Plan, heads: Mapping[str, str]) -> Plan:
    """Repeat edits of tied tables for their heads that an earlier adapter of the merge untied.

    The adapter was made from the tied base, where setting a row changes lookup and projection alike.
    """
    edits: list[Edit] = []
    for edit in plan.edits:
        edits.append(edit)
        other = edit.with_tables(heads)
        if other is not None:
            edits.append(other)
    return replace(plan, edits=tuple(edits))


def join_plans(plans: Sequence[Plan]) -> Plan:
    """Join plans into one with the same result: it sets each row once and grows each vocabulary once."""
    edits = [edit for plan in plans for edit in plan.edits]
    first: dict[str, Edit] = {}  # edits that a plan may hold once (growth, new tokens): joined, and before all others
    for edit in edits:
        key = edit.join_key()
        if key is not None:
            first[key] = first[key].join(edit) if key in first else edit
    covered: dict[str, set[int]] = {}
    kept: list[Edit] = []
    for edit in reversed(edits):  # the last edit of a row wins
        if edit.join_key() is not None:
            continue
        left = edit.restrict(lambda name, index: index not in covered.get(name, ()))
        for name, indices in edit.sets().items():
            covered.setdefault(name, set()).update(indices or ())
        if left is not None:
            kept.append(left)
    facts = {key: value for plan in plans for key, value in plan.facts.items()}
    return Plan((*first.values(), *reversed(kept)), facts)


def _apply_weight(plan: Plan, item: WeightedAdapter, store: Store, texts: Mapping[int, str] | None) -> Plan:
    """Interpolate every row of a plan between the base's and the adapter's; warn about tokens the base lacks."""
    new = item.adapter.manifest.new_tokens
    absent = {t.id: t.content for t in new.tokens if texts is None or texts.get(t.id) != t.content} if new else {}
    sizes = Sizes(store.graph)
    edits: list[Edit] = []
    for edit in plan.edits:
        if not edit.interpolates:
            raise UnsupportedError(
                "an adapter that rewrites a file cannot be weighted",
                where=item.name,
                found=edit.describe(),
                hint="merge it at weight 1",
            )
        if edit.sets():
            mixed = {v.name: _interpolate_values(v, store, item.weight, absent) for v in edit.values(sizes)}
            edit = edit.with_values(mixed).with_blocks(partial(_interpolate_blocks, weight=item.weight), stored=False)
        edits.append(edit)
    if absent:
        listed = ", ".join(map(repr, list(absent.values())[:4]))
        warn(
            f"weight {item.weight:g} of {item.name} does not apply to its new tokens ({listed}): "
            "the base has no rows of them to interpolate from"
        )
    return Plan(tuple(edits), plan.facts)


def _interpolate_values(values: Values, store: Store, weight: float, absent: Mapping[int, str]) -> RawArray:
    """Interpolate rows or entries from the base's, except those of tokens that the base does not have."""
    table = store.graph.find(values.name)
    size = table.shape[0] if table is not None else store.read_vector(values.name).shape[0]
    positions = [n for n, i in enumerate(values.indices) if i not in absent and 0 <= i < size]
    if not positions or (table is not None and values.values.shape[1:] != table.shape[1:]):
        return values.values  # a wrong index or shape is refused when the plan is checked
    indices = tuple(values.indices[n] for n in positions)
    base = entries_of(store, values.name, indices) if table is None else rows_of(store, table, indices)
    return _interpolate_positions(base, values.values, positions, weight)


def _interpolate_positions(base: RawArray, new: RawArray, positions: list[int], weight: float) -> RawArray:
    """``new`` with the values at ``positions`` interpolated from ``base``, which holds just those."""
    double = uses_float64(base.dtype, new.dtype)
    values = to_floats(new, double).copy()
    values[positions] = _interpolate(to_floats(base, double), values[positions], weight)
    return RawArray.of(values)


def _interpolate_blocks(block: BlockFunction, weight: float) -> BlockFunction:
    """Wrap a block function so that its rows are interpolated from the current ones."""

    def interpolated(start: int, stop: int, current: RawArray) -> RawArray:
        new = block(start, stop, current)
        double = uses_float64(current.dtype, new.dtype)
        return RawArray.of(_interpolate(to_floats(current, double), to_floats(new, double), weight))

    return interpolated


def _interpolate(base: Floats, new: Floats, weight: float) -> Floats:
    """``base + weight * (new - base)``, computed from the nearer end so that weights 0 and 1 are exact."""
    scale = new.dtype.type(weight)
    with np.errstate(over="ignore", invalid="ignore"):  # non_finite.py reports overflows with their rows
        return base + scale * (new - base) if weight < 0.5 else new - (1 - scale) * (new - base)

"""From adapters to plans: an adapter is located in a store, its vocabulary extended, and its surgery plans the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from embedsurgery.adapter import Adapter
from embedsurgery.errors import ConfigError
from embedsurgery.graph import Table
from embedsurgery.locate import locate
from embedsurgery.plan import Edit, Plan, SetBlocks, SetRows
from embedsurgery.stores.base import Store
from embedsurgery.surgeries.base import Ground, Surgery
from embedsurgery.vocabulary import State, extension

if TYPE_CHECKING:
    from embedsurgery.new_tokens import KnownTokens

Options = Any
"""What is asked of baking an adapter in; its surgery says of what class."""


def plan_adapter(adapter: Adapter, surgery: Surgery, ground: Ground) -> Plan:
    """All edits that bake an adapter in: new tokens first, where it brings any, and then what its surgery plans.

    Args:
        adapter: What to bake in.
        surgery: Its technique.
        ground: The base; where the adapter's tables are in it is found here.

    Raises:
        BaseMismatchError: The base is another, or ids of the adapter's tokens are taken there.
        TableError: A table is not found.
    """
    located = locate(adapter, ground.store)
    edits = extend(adapter, located, ground.store, ground.state)
    plan = surgery.bake(adapter, replace(ground, located=located))
    return Plan((*edits, *plan.edits), plan.facts)


def plan_adapters(
    adapters: Sequence[tuple[Adapter, str]],
    surgery_of: Callable[[str], Surgery],
    store: Store,
    tokens: Callable[[], KnownTokens] | None,
    options: Options = None,
) -> list[Plan]:
    """A plan for each adapter, to be applied one after another.

    Args:
        adapters: What to bake in, each with what it is called.
        surgery_of: Gives a surgery by its name.
        store: The base.
        tokens: Gives what the base's tokenizer knows; None where no tokenizer is at hand.
        options: What is asked of the baking: of all, or of each in a sequence.

    Raises:
        ConfigError: Options for more or fewer adapters than there are.
    """
    each = list(options) if isinstance(options, Sequence) else [options] * len(adapters)
    if len(each) != len(adapters):
        raise ConfigError("not as many bake options as adapters", expected=len(adapters), found=len(each))
    kinds = Counter(adapter.manifest.surgery for adapter, _ in adapters)
    asking = any(a.manifest.new_tokens or surgery_of(a.manifest.surgery).makes_tokens for a, _ in adapters)
    texts = dict(tokens().texts) if asking and tokens is not None else None
    state = State.of(store.graph, texts)
    plans = []
    for (adapter, label), asked in zip(adapters, each, strict=True):
        name = adapter.manifest.surgery
        ground = Ground(store, {}, state, tokens, label, kinds[name] == 1, asked)
        parted, surgery = dict(state.parted), surgery_of(name)
        plan = plan_adapter(adapter, surgery, ground)
        plans.append(plan if surgery.makes_tokens else _for_both(plan, parted))
    return plans


def _for_both(plan: Plan, parted: Mapping[str, str]) -> Plan:
    """A plan for tied tables, where an adapter before this one gives the projection a table of its own."""
    edits: list[Edit] = []
    for edit in plan.edits:
        edits.append(edit)
        if isinstance(edit, (SetRows, SetBlocks)) and edit.table in parted:
            edits.append(replace(edit, table=parted[edit.table]))
    return replace(plan, edits=tuple(edits))


def extend(adapter: Adapter, located: Mapping[str, Table], store: Store, state: State) -> list[Edit]:
    """The edits that give a base the tokens that an adapter brings; none where it brings none."""
    new = adapter.manifest.new_tokens
    if new is None:
        return []
    highest = max(i for record in adapter.manifest.tables for i in record.indices)
    return extension(new, highest, adapter.raw, located, store.graph, state, store.read_vector)

"""From adapters to plans: an adapter is located in a store, its vocabulary extended, and its surgery plans the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from embedsurgery.adapter import Adapter
from embedsurgery.graph import Table
from embedsurgery.locate import locate
from embedsurgery.plan import Edit, Plan
from embedsurgery.stores.base import Store
from embedsurgery.surgeries.base import Surgery
from embedsurgery.vocabulary import State, extension


def plan_adapter(adapter: Adapter, surgery: Surgery, store: Store, state: State) -> Plan:
    """All edits that bake an adapter in: new tokens first, where it brings any, and then what its surgery plans.

    Args:
        adapter: What to bake in.
        surgery: Its technique.
        store: The base.
        state: What the base has, and after this adapter will have.

    Raises:
        BaseMismatchError: The base is another, or ids of the adapter's tokens are taken there.
        TableError: A table is not found.
    """
    located = locate(adapter, store)
    return Plan((*extend(adapter, located, store, state), *surgery.plan(adapter, located).edits))


def plan_adapters(
    adapters: Sequence[Adapter],
    surgery_of: Callable[[str], Surgery],
    store: Store,
    texts: Mapping[int, str] | None,
) -> list[Plan]:
    """A plan for each adapter, to be applied one after another.

    Args:
        adapters: What to bake in.
        surgery_of: Gives a surgery by its name.
        store: The base.
        texts: Id -> text of the base's tokens, None where no tokenizer is at hand.
    """
    state = State.of(store.graph, texts)
    return [plan_adapter(adapter, surgery_of(adapter.manifest.surgery), store, state) for adapter in adapters]


def extend(adapter: Adapter, located: Mapping[str, Table], store: Store, state: State) -> list[Edit]:
    """The edits that give a base the tokens that an adapter brings; none where it brings none."""
    new = adapter.manifest.new_tokens
    if new is None:
        return []
    highest = max(i for record in adapter.manifest.tables for i in record.indices)
    return extension(new, highest, adapter.raw, located, store.graph, state, store.read_vector)

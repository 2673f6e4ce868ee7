"""From an adapter to a plan: it is located in a store, its vocabulary extended, and its surgery plans the rest.

Several adapters at once are ``combining.py``'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from embedsurgery.adapters.adapter import Adapter
from embedsurgery.adapters.carried_tokens import State, extension
from embedsurgery.adapters.locate import locate
from embedsurgery.graph import Table
from embedsurgery.plan import Edit, Plan
from embedsurgery.stores.store import Store
from embedsurgery.surgeries.checked import baked
from embedsurgery.surgeries.surgery import BakeContext, Surgery


def plan_adapter(adapter: Adapter, surgery: Surgery, context: BakeContext) -> Plan:
    """All edits that bake an adapter in: new tokens first, where it brings any, and then what its surgery plans.

    Args:
        adapter: What to bake in.
        surgery: Its technique.
        context: The base; where the adapter's tables are in it is found here.

    Raises:
        BaseMismatchError: The base is another, or ids of the adapter's tokens are taken there.
        TableError: A table is not found.
    """
    located = locate(adapter, context.store)
    edits = extend(adapter, located, context.store, context.state)
    plan = baked(surgery, adapter, replace(context, located=located))
    return Plan((*edits, *plan.edits), plan.facts)


def extend(adapter: Adapter, located: Mapping[str, Table], store: Store, state: State) -> list[Edit]:
    """The edits that give a base the tokens that an adapter brings; none where it brings none."""
    new = adapter.manifest.new_tokens
    if new is None:
        return []
    highest = max(i for record in adapter.manifest.tables for i in record.indices)
    return extension(new, highest, adapter.raw, located, store.graph, state, store.read_vector)

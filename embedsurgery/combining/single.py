"""Plans one adapter: finds its tables in the base, extends the vocabulary, and lets its surgery plan the rest.

``several.py`` plans all adapters of a merge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from embedsurgery.adapters.adapter import Adapter
from embedsurgery.adapters.carried_tokens import BaseState, plan_extension
from embedsurgery.adapters.locate import locate
from embedsurgery.graph import Table
from embedsurgery.plan import Edit, Plan
from embedsurgery.stores.store import Store
from embedsurgery.surgeries.checked import call_bake
from embedsurgery.surgeries.surgery import BakeContext, Surgery


def plan_adapter(adapter: Adapter, surgery: Surgery, context: BakeContext) -> Plan:
    """Plan all edits that bake an adapter in: first its new tokens, if any, then its surgery's edits.

    Args:
        adapter: The adapter.
        surgery: Its technique.
        context: The base. This function fills in ``located``.

    Raises:
        BaseMismatchError: The adapter was made from another base, or an id of its tokens is taken there.
        TableError: A table is not found.
    """
    located = locate(adapter, context.store)
    edits = plan_new_tokens(adapter, located, context.store, context.state)
    plan = call_bake(surgery, adapter, replace(context, located=located))
    return Plan((*edits, *plan.edits), plan.facts)


def plan_new_tokens(adapter: Adapter, located: Mapping[str, Table], store: Store, state: BaseState) -> list[Edit]:
    """Plan the edits that add an adapter's new tokens to a base; empty if the adapter has none."""
    new = adapter.manifest.new_tokens
    if new is None:
        return []
    highest = max(i for record in adapter.manifest.tables for i in record.indices)
    return plan_extension(new, highest, adapter.raw, located, store.graph, state, store.read_vector)

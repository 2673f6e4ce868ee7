"""Calls a surgery's methods and checks their results before they are used, so that errors name the method.

The rows in a plan are checked against the store in ``stores/checks.py``.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from embedsurgery.adapters.adapter import Adapter, PeftFiles
from embedsurgery.adapters.manifest import Manifest, TableRecord
from embedsurgery.graph import Table
from embedsurgery.plan import Edit, Plan
from embedsurgery.plugin_calls import call_plugin, check_json, wrong_result
from embedsurgery.stores.store import Store
from embedsurgery.surgeries.surgery import BakeContext, Base, RowOverride, Surgery
from embedsurgery.tensors.raw import RawArray


def call_start(surgery: Surgery, config: Any, store: Store, base: Base) -> Adapter:
    """Call `Surgery.start` and check the adapter.

    Raises:
        PluginError: It fails, or returns no adapter of this surgery.
        EmbedSurgeryError: The config does not fit the model.
    """
    return _call_for_adapter(surgery, "start", config, store, base)


def call_from_files(surgery: Surgery, files: PeftFiles, manifest: Manifest | None) -> Adapter:
    """Call `Surgery.from_files`, or `Surgery.from_peft` if there is no manifest, and check the adapter.

    Raises:
        PluginError: It fails, or returns no adapter of this surgery.
        AdapterError: The files contradict themselves.
    """
    if manifest is None:
        return _call_for_adapter(surgery, "from_peft", files)
    return _call_for_adapter(surgery, "from_files", files, Adapter(manifest, {}, surgery))


def call_live(surgery: Surgery, adapter: Adapter, located: Mapping[str, Table]) -> tuple[RowOverride, ...]:
    """Call `Surgery.live` and check the overrides.

    Raises:
        PluginError: It fails, or returns overrides that do not fit the adapter's tensors or the tables.
    """
    where = f"{surgery.name}.live"
    answer: Any = call_plugin(where, object, surgery.live, adapter, located)
    if not isinstance(answer, (list, tuple)):
        raise wrong_result(where, "a sequence of RowOverrides", type(answer).__name__)
    for override in answer:
        if not isinstance(override, RowOverride):
            raise wrong_result(where, "RowOverrides", type(override).__name__)
        raw = adapter.raw.get(override.tensor)
        if raw is None:
            raise wrong_result(where, f"a tensor of the adapter: {', '.join(adapter.raw)}", override.tensor)
        if type(override) is RowOverride and (len(raw.shape) != 2 or raw.shape[0] != len(override.indices)):
            expected = f"one index for each of the {raw.shape[0]} rows of {override.tensor}"
            raise wrong_result(where, expected, len(override.indices))
        _check_indices(where, override, located)
    return tuple(answer)


def call_plan(surgery: Surgery, adapter: Adapter, located: Mapping[str, Table]) -> Plan:
    """Call `Surgery.plan` and check the plan.

    Raises:
        PluginError: It fails, or does not return a plan of edits.
    """
    where = f"{surgery.name}.plan"
    return _check_plan(where, call_plugin(where, Plan, surgery.plan, adapter, located))


def call_bake(surgery: Surgery, adapter: Adapter, context: BakeContext) -> Plan:
    """Call `Surgery.bake` and check the plan.

    Raises:
        PluginError: It fails, or does not return a plan of edits.
    """
    method = "plan" if type(surgery).bake is Surgery.bake else "bake"  # the method that the surgery defines
    where = f"{surgery.name}.{method}"
    return _check_plan(where, call_plugin(where, Plan, surgery.bake, adapter, context))


def _call_for_adapter(surgery: Surgery, method: str, *arguments: Any) -> Adapter:
    where = f"{surgery.name}.{method}"
    adapter = call_plugin(where, Adapter, getattr(surgery, method), *arguments)
    manifest = adapter.manifest
    if not isinstance(manifest, Manifest):
        raise wrong_result(where, "an adapter with a Manifest", type(manifest).__name__)
    if manifest.surgery != surgery.name:
        raise wrong_result(where, f"an adapter of {surgery.name}", f"one of {manifest.surgery}")
    if not manifest.tables or not all(isinstance(record, TableRecord) for record in manifest.tables):
        raise wrong_result(where, "a manifest with a TableRecord for each table", f"{manifest.tables!r}"[:80])
    if not adapter.raw:
        raise wrong_result(where, "an adapter with tensors", "none")
    for name, raw in adapter.raw.items():
        if not isinstance(raw, RawArray):
            raise wrong_result(where, f"{name} as a RawArray", type(raw).__name__)
    check_json(f"{where}: the manifest's config", manifest.config)
    return adapter


def _check_indices(where: str, override: RowOverride, located: Mapping[str, Table]) -> None:
    table = next((table for table in located.values() if table.name == override.table), None)
    if table is None:
        names = ", ".join(table.name for table in located.values())
        raise wrong_result(where, f"a table of the manifest: {names}", override.table)
    indices = _to_integers(where, override.indices)
    bad = [i for i in indices if not 0 <= i < table.shape[0]]
    if bad or len(set(indices)) != len(indices):
        expected = f"rows of {table.name}, 0 to {table.shape[0] - 1}, each once"
        raise wrong_result(where, expected, f"{(bad or indices)[:8]}")


def _to_integers(where: str, indices: Any) -> tuple[int, ...]:
    try:
        return tuple(operator.index(index) for index in indices)
    except TypeError:
        raise wrong_result(where, "integers as indices", f"{indices!r}"[:80]) from None


def _check_plan(where: str, plan: Plan) -> Plan:
    """Return the plan, with tuples where a surgery used lists."""
    try:
        edits = tuple(plan.edits)
    except TypeError:
        raise wrong_result(where, "a Plan of a sequence of edits", f"a Plan of a {type(plan.edits).__name__}") from None
    return replace(plan, edits=tuple(_check_edit(where, edit) for edit in edits))


def _check_edit(where: str, edit: Any) -> Edit:
    if not isinstance(edit, Edit):
        raise wrong_result(where, "edits such as SetRows", type(edit).__name__)
    for name, raw in edit.arrays().items():
        if not isinstance(raw, RawArray):
            raise wrong_result(where, f"the values of {name} as a RawArray", type(raw).__name__)
    if any(field.name == "indices" for field in fields(edit)):
        edit = replace(edit, indices=_to_integers(where, vars(edit)["indices"]))  # type: ignore[call-arg]
    return edit  # type: ignore[no-any-return]

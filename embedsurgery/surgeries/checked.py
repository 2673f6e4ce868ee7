"""What a surgery answers, looked at before anything is done with it: a fault of its code is said as one.

What a plan says of rows is checked against the store by ``stores/checks.py``.
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
from embedsurgery.plugin_calls import call, check_json, wrong
from embedsurgery.stores.store import Store
from embedsurgery.surgeries.surgery import BakeContext, Base, RowOverride, Surgery
from embedsurgery.tensors.raw import RawArray


def started(surgery: Surgery, config: Any, store: Store, base: Base) -> Adapter:
    """What `Surgery.start` returns.

    Raises:
        PluginError: It fails, or returns no adapter of this surgery.
        EmbedSurgeryError: The config does not fit the model.
    """
    return _adapter(surgery, "start", config, store, base)


def read(surgery: Surgery, files: PeftFiles, manifest: Manifest | None) -> Adapter:
    """What `Surgery.from_files` returns, or, without our manifest, `Surgery.from_peft`.

    Raises:
        PluginError: It fails, or returns no adapter of this surgery.
        AdapterError: The files contradict themselves.
    """
    if manifest is None:
        return _adapter(surgery, "from_peft", files)
    return _adapter(surgery, "from_files", files, Adapter(manifest, {}, surgery))


def overrides_of(surgery: Surgery, adapter: Adapter, located: Mapping[str, Table]) -> tuple[RowOverride, ...]:
    """What `Surgery.live` returns.

    Raises:
        PluginError: It fails, or returns overrides that do not fit the adapter's tensors.
    """
    where = f"{surgery.name}.live"
    answer: Any = call(where, object, surgery.live, adapter, located)
    if not isinstance(answer, (list, tuple)):
        raise wrong(where, "a sequence of RowOverrides", type(answer).__name__)
    for override in answer:
        if not isinstance(override, RowOverride):
            raise wrong(where, "RowOverrides", type(override).__name__)
        raw = adapter.raw.get(override.tensor)
        if raw is None:
            raise wrong(where, f"a tensor of the adapter: {', '.join(adapter.raw)}", override.tensor)
        if type(override) is RowOverride and (len(raw.shape) != 2 or raw.shape[0] != len(override.indices)):
            raise wrong(where, f"as many indices as {override.tensor} has rows, {raw.shape[0]}", len(override.indices))
        _check_indices(where, override, located)
    return tuple(answer)


def planned(surgery: Surgery, adapter: Adapter, located: Mapping[str, Table]) -> Plan:
    """What `Surgery.plan` returns.

    Raises:
        PluginError: It fails, or returns what is no plan.
    """
    return _plan(f"{surgery.name}.plan", call(f"{surgery.name}.plan", Plan, surgery.plan, adapter, located))


def baked(surgery: Surgery, adapter: Adapter, context: BakeContext) -> Plan:
    """What `Surgery.bake` returns.

    Raises:
        PluginError: It fails, or returns what is no plan.
    """
    name = f"{surgery.name}.{'plan' if type(surgery).bake is Surgery.bake else 'bake'}"
    return _plan(name, call(name, Plan, surgery.bake, adapter, context))


def _adapter(surgery: Surgery, method: str, *arguments: Any) -> Adapter:
    where = f"{surgery.name}.{method}"
    adapter = call(where, Adapter, getattr(surgery, method), *arguments)
    manifest = adapter.manifest
    if not isinstance(manifest, Manifest):
        raise wrong(where, "an adapter with a Manifest", type(manifest).__name__)
    if manifest.surgery != surgery.name:
        raise wrong(where, f"an adapter of {surgery.name}", f"one of {manifest.surgery}")
    if not manifest.tables or not all(isinstance(record, TableRecord) for record in manifest.tables):
        raise wrong(where, "a manifest with a TableRecord of each table", f"{manifest.tables!r}"[:80])
    if not adapter.raw:
        raise wrong(where, "an adapter with tensors", "none")
    for name, raw in adapter.raw.items():
        if not isinstance(raw, RawArray):
            raise wrong(where, f"{name} as a RawArray", type(raw).__name__)
    check_json(f"{where}: the manifest's config", manifest.config)
    return adapter


def _check_indices(where: str, override: RowOverride, located: Mapping[str, Table]) -> None:
    table = next((table for table in located.values() if table.name == override.table), None)
    if table is None:
        raise wrong(where, f"a table of the manifest: {', '.join(t.name for t in located.values())}", override.table)
    numbers = _integers(where, override.indices)
    bad = [i for i in numbers if not 0 <= i < table.shape[0]]
    if bad or len(set(numbers)) != len(numbers):
        raise wrong(where, f"rows of {table.name}, 0 to {table.shape[0] - 1}, each once", f"{(bad or numbers)[:8]}")


def _integers(where: str, indices: Any) -> tuple[int, ...]:
    try:
        return tuple(operator.index(index) for index in indices)
    except TypeError:
        raise wrong(where, "integers as indices", f"{indices!r}"[:80]) from None


def _plan(where: str, plan: Plan) -> Plan:
    """The plan with tuples where a surgery has lists."""
    try:
        edits = tuple(plan.edits)
    except TypeError:
        raise wrong(where, "a Plan of a sequence of edits", f"a Plan of a {type(plan.edits).__name__}") from None
    return replace(plan, edits=tuple(_edit(where, edit) for edit in edits))


def _edit(where: str, edit: Any) -> Edit:
    if not isinstance(edit, Edit):
        raise wrong(where, "edits such as SetRows", type(edit).__name__)
    for name, raw in edit.arrays().items():
        if not isinstance(raw, RawArray):
            raise wrong(where, f"what {name} gets as a RawArray", type(raw).__name__)
    if any(field.name == "indices" for field in fields(edit)):
        edit = replace(edit, indices=_integers(where, vars(edit)["indices"]))  # type: ignore[call-arg]
    return edit  # type: ignore[no-any-return]

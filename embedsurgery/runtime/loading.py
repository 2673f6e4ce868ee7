"""What may be loaded into a model with an attachment: an adapter's rows in place, and a state dict of the same base."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from embedsurgery.adapters.adapter import Adapter
from embedsurgery.errors import AttachmentError, BaseMismatchError, EmbedSurgeryWarning
from embedsurgery.graph import EmbeddingGraph
from embedsurgery.runtime.rows.whole_tables import whole_replacements
from embedsurgery.stores.store import shorten
from embedsurgery.surgeries.soft_prompt.surgery import PromptOverride
from embedsurgery.surgeries.surgery import RowOverride
from embedsurgery.surgeries.whole_tables import TableOverride
from embedsurgery.tensors.convert import from_raw, to_raw


def replacements(
    name: str, ours: Sequence[RowOverride], theirs: Sequence[RowOverride], live: Adapter, adapter: Adapter
) -> list[torch.Tensor]:
    """For each override of an adapter that is live, the rows that another adapter has for it, in the live order.

    Args:
        name: The live adapter's, for messages.
        ours: What it overrides.
        theirs: What the other would override on the same model.
        live: It.
        adapter: The other.

    Raises:
        AttachmentError: They are not for the same rows of the same tables.
    """
    if any(isinstance(override, PromptOverride) for override in (*ours, *theirs)):
        return _prompt(name, ours, theirs, adapter)
    if any(isinstance(override, TableOverride) for override in (*ours, *theirs)):
        return whole_replacements(name, ours, theirs, live, adapter)
    found = {override.table: override for override in theirs}
    if found.keys() != {override.table for override in ours}:
        raise AttachmentError(
            "the adapter is for other tables",
            where=name,
            found=", ".join(sorted(found)),
            expected=", ".join(sorted(o.table for o in ours)),
        )
    values = []
    for override in ours:
        other = found[override.table]
        if set(other.indices) != set(override.indices):
            raise AttachmentError(
                "the adapter is for other rows",
                where=f"{name}: {override.table}",
                expected=shorten(list(override.indices)),
                found=shorten(list(other.indices)),
            )
        place = {index: position for position, index in enumerate(other.indices)}
        values.append(from_raw(adapter.raw[other.tensor].take([place[i] for i in override.indices])))
    return values


def check_order(name: str, ours: Sequence[RowOverride], theirs: Sequence[RowOverride]) -> None:
    """Refuse the same rows in another order than the live ones: an optimizer's state goes by position.

    Args:
        name: The live adapter's, for messages.
        ours: What it overrides.
        theirs: What a saved one does.

    Raises:
        AttachmentError: The order differs.
    """
    found = {override.table: override for override in theirs}
    for one in ours:
        other = found.get(one.table, one)
        if tuple(one.indices) != tuple(other.indices):
            places = [i for i, (a, b) in enumerate(zip(one.indices, other.indices, strict=True)) if a != b]
            raise AttachmentError(
                "the checkpoint's rows are in another order than those attached",
                where=f"{name}: {one.table}, positions {shorten(places)}",
                expected=", ".join(str(one.indices[i]) for i in places[:8]),
                found=", ".join(str(other.indices[i]) for i in places[:8]),
                hint="an optimizer's state goes by position: give token_indices in the checkpoint's "
                "order (a set of tokens has another one in each process)",
            )


def _prompt(
    name: str, ours: Sequence[RowOverride], theirs: Sequence[RowOverride], adapter: Adapter
) -> list[torch.Tensor]:
    """As `replacements`, of soft prompts."""
    sizes = [[getattr(o, "count", 0) * len(getattr(o, "submodules", ())) for o in part] for part in (ours, theirs)]
    if sizes[0] != sizes[1]:
        raise AttachmentError(
            "the adapter is no soft prompt of the same length",
            where=name,
            expected=f"{sizes[0]} virtual tokens",
            found=sizes[1],
        )
    return [from_raw(adapter.raw[override.tensor]) for override in theirs]


def check_loaded(
    graph: EmbeddingGraph,
    adapter: Adapter,
    overrides: Sequence[RowOverride],
    state_dict: Mapping[str, Any],
    prefix: str,
    model: nn.Module,
) -> None:
    """Refuse a state dict whose rows are not those that an attached adapter was made from, before it is loaded.

    A table that is trained itself is another base after each step, and is let pass; so is one in pieces.

    Raises:
        BaseMismatchError: Another base, or one with rows merged into it, as a checkpoint of a merged model has.
    """
    records = {record.name: record for record in adapter.manifest.tables}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for override in overrides:
        by_prompt = adapter.manifest.tables[0] if isinstance(override, PromptOverride) else None
        record, table = records.get(override.tensor, by_prompt), graph.table(override.table)
        name = next((n for n in table.names if prefix + n in state_dict), None)
        if record is None or record.fingerprint is None or name is None:
            continue
        held, given = parameters.get(name), state_dict[prefix + name]
        whole = type(given) in (torch.Tensor, nn.Parameter) and given.device.type != "meta"
        if held is None or held.requires_grad or not whole or given.shape != held.shape:
            continue
        view = given.detach().t() if name in table.transposed else given.detach()
        indices = list(record.sampled or override.indices or record.evidence)  # new rows tell nothing of a base
        rows = to_raw(view.index_select(0, torch.tensor(indices, device=view.device)))
        if not record.fingerprint.matches(rows):
            raise BaseMismatchError(
                "the state dict's rows are not those that the attached adapter was made from",
                where=f"{name}, rows {shorten(indices)}",
                expected=f"sha256 {record.fingerprint.sha256['F32'][:12]} as F32",
                found=rows.to("F32").sha256()[:12],
                hint="detach() first to load another base; where rows were merged into the file, unmerge it",
            )


def say_that_rows_stay() -> None:
    """Warn that a state dict was loaded, and that trained rows are as they were."""
    warnings.warn(
        "a state dict is the base's: loading one leaves the trained rows as they are; attachment.restore() sets them, "
        "and embedsurgery.integrations does it for the Trainer, Lightning and Accelerate",
        EmbedSurgeryWarning,
        stacklevel=3,
    )


def look_no_more(model: nn.Module, hook: Callable[..., Any], saving: Callable[..., Any]) -> None:
    """Take off the hooks that look at state dicts before they are loaded, or made, and copies of these hooks."""
    loading: dict[int, Any] = model._load_state_dict_pre_hooks
    for key in [key for key, wrapped in loading.items() if wrapped.hook == hook]:
        del loading[key]
    making: dict[int, Any] = model._state_dict_pre_hooks
    for key in [key for key, made in making.items() if made == saving]:
        del making[key]

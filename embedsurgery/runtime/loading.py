"""Checks what is loaded into a model with an attachment: an adapter's rows, and a state dict of the same base.

``resume.py`` notices a resumed training that did not restore the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from embedsurgery.adapters.adapter import Adapter
from embedsurgery.errors import AttachmentError, BaseMismatchError, warn
from embedsurgery.graph import EmbeddingGraph
from embedsurgery.runtime.rows.whole_tables import match_whole_tables
from embedsurgery.stores.store import shorten
from embedsurgery.surgeries.soft_prompt.surgery import PromptOverride
from embedsurgery.surgeries.surgery import RowOverride
from embedsurgery.surgeries.whole_tables import TableOverride
from embedsurgery.tensors.convert import from_raw, to_raw


def match_rows(
    name: str, live: Sequence[RowOverride], given: Sequence[RowOverride], live_adapter: Adapter, adapter: Adapter
) -> list[torch.Tensor]:
    """For each override of a live adapter, return the rows that another adapter has for it, in the live order.

    Args:
        name: The live adapter's name, for messages.
        live: The overrides of the live adapter.
        given: The overrides of the other adapter on the same model.
        live_adapter: The live adapter.
        adapter: The other adapter.

    Returns:
        Tensors of the adapter's dtype, each of the shape of the live one.

    Raises:
        AttachmentError: The other adapter has other rows or other tables.
    """
    if any(isinstance(override, PromptOverride) for override in (*live, *given)):
        return _match_prompts(name, live, given, adapter)
    if any(isinstance(override, TableOverride) for override in (*live, *given)):
        return match_whole_tables(name, live, given, live_adapter, adapter)
    by_table = {override.table: override for override in given}
    if by_table.keys() != {override.table for override in live}:
        raise AttachmentError(
            "the adapter is for other tables",
            where=name,
            found=", ".join(sorted(by_table)),
            expected=", ".join(sorted(override.table for override in live)),
        )
    values = []
    for override in live:
        other = by_table[override.table]
        if set(other.indices) != set(override.indices):
            raise AttachmentError(
                "the adapter is for other rows",
                where=f"{name}: {override.table}",
                expected=shorten(list(override.indices)),
                found=shorten(list(other.indices)),
            )
        position = {index: place for place, index in enumerate(other.indices)}
        values.append(from_raw(adapter.raw[other.tensor].take([position[i] for i in override.indices])))
    return values


def check_row_order(name: str, live: Sequence[RowOverride], given: Sequence[RowOverride]) -> None:
    """Refuse the same rows in another order than the live ones: an optimizer's state goes by position.

    Args:
        name: The live adapter's name, for messages.
        live: The overrides of the live adapter.
        given: The overrides of the saved adapter.

    Raises:
        AttachmentError: The order differs.
    """
    by_table = {override.table: override for override in given}
    for one in live:
        other = by_table.get(one.table, one)
        if tuple(one.indices) != tuple(other.indices):
            places = [i for i, (a, b) in enumerate(zip(one.indices, other.indices, strict=True)) if a != b]
            raise AttachmentError(
                "the checkpoint's rows have another order than the attached rows",
                where=f"{name}: {one.table}, positions {shorten(places)}",
                expected=", ".join(str(one.indices[i]) for i in places[:8]),
                found=", ".join(str(other.indices[i]) for i in places[:8]),
                hint="an optimizer's state goes by position: give token_indices in the checkpoint's order "
                "(the order of a Python set changes with each process)",
            )


def _match_prompts(
    name: str, live: Sequence[RowOverride], given: Sequence[RowOverride], adapter: Adapter
) -> list[torch.Tensor]:
    """Do what `match_rows` does, for soft prompts."""
    sizes = [[getattr(o, "count", 0) * len(getattr(o, "submodules", ())) for o in part] for part in (live, given)]
    if sizes[0] != sizes[1]:
        raise AttachmentError(
            "the adapter is not a soft prompt of the same length",
            where=name,
            expected=f"{sizes[0]} virtual tokens",
            found=sizes[1],
        )
    return [from_raw(adapter.raw[override.tensor]) for override in given]


def check_state_dict(
    graph: EmbeddingGraph,
    adapter: Adapter,
    overrides: Sequence[RowOverride],
    state_dict: Mapping[str, Any],
    prefix: str,
    model: nn.Module,
) -> None:
    """Refuse, before it is loaded, a state dict of another base than the one that an attached adapter was made from.

    Tables that train are not checked, because they change with each step. Sharded tables are not checked either.

    Args:
        graph: The model's graph.
        adapter: The attached adapter.
        overrides: The adapter's overrides.
        state_dict: The state dict to be loaded.
        prefix: The prefix of the model's names in the state dict.
        model: The attached model.

    Raises:
        BaseMismatchError: The rows are another base's, or have an adapter merged into them.
    """
    records = {record.name: record for record in adapter.manifest.tables}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for override in overrides:
        prompt_record = adapter.manifest.tables[0] if isinstance(override, PromptOverride) else None
        record, table = records.get(override.tensor, prompt_record), graph.table(override.table)
        name = next((n for n in table.names if prefix + n in state_dict), None)
        if record is None or record.fingerprint is None or name is None:
            continue
        current, given = parameters.get(name), state_dict[prefix + name]
        is_plain = type(given) in (torch.Tensor, nn.Parameter) and given.device.type != "meta"
        if current is None or current.requires_grad or not is_plain or given.shape != current.shape:
            continue
        view = given.detach().t() if name in table.transposed else given.detach()
        # With new tokens the fingerprint is of sampled rows: the base on disk does not have the new ones.
        indices = list(record.sampled or override.indices or record.evidence)
        rows = to_raw(view.index_select(0, torch.tensor(indices, device=view.device)))
        if not record.fingerprint.matches(rows):
            raise BaseMismatchError(
                "the state dict's rows differ from the base of the attached adapter",
                where=f"{name}, rows {shorten(indices)}",
                expected=f"sha256 {record.fingerprint.sha256['F32'][:12]} as F32",
                found=rows.to("F32").sha256()[:12],
                hint="to load another base, detach() first; if an adapter was merged into the file, unmerge it",
            )


def warn_rows_not_loaded() -> None:
    """Warn that a state dict was loaded, and that trained rows are unchanged."""
    warn(
        "a state dict holds the base only, so loading it leaves the trained rows unchanged; attachment.restore() sets "
        "them, and embedsurgery.integrations does so for the Trainer, Lightning and Accelerate"
    )


def remove_state_dict_hooks(model: nn.Module, load_hook: Callable[..., Any], save_hook: Callable[..., Any]) -> None:
    """Unregister an attachment's hooks on loading and making a state dict.

    They are found by equality, because a copied model has hooks but no handles of them.
    """
    load_hooks: dict[int, Any] = model._load_state_dict_pre_hooks
    for key in [key for key, wrapped in load_hooks.items() if wrapped.hook == load_hook]:
        del load_hooks[key]
    save_hooks: dict[int, Any] = model._state_dict_pre_hooks
    for key in [key for key, hook in save_hooks.items() if hook == save_hook]:
        del save_hooks[key]

"""Trainable tokens in PEFT's file format: names of tensors, one list of indices for all modules, tied copies.

https://huggingface.co/docs/peft/package_reference/trainable_tokens
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from embedsurgery.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter, PeftFiles
from embedsurgery.adapters.carried_tokens import entries_name, filler_name
from embedsurgery.adapters.manifest import Manifest, TableRecord
from embedsurgery.errors import AdapterError, ConfigError
from embedsurgery.stores.store import shorten
from embedsurgery.surgeries.surgery import Surgery
from embedsurgery.surgeries.trainable_tokens.config import TrainableTokensConfig
from embedsurgery.tensors.raw import EDITABLE, RawArray

PEFT_TYPE = "TRAINABLE_TOKENS"
OTHERS = ".untrained"
"""Suffix of an adapter's tensor with the rows that other tables train and this one does not: see `tokens_to_peft`."""

_PREFIX, _SUFFIX = "base_model.model.", ".trainable_tokens_delta"
_EXTENSION = "embedsurgery."


def tokens_to_peft(adapter: Adapter) -> PeftFiles:
    """Return PEFT's config and tensors. Every name of a tied table gets the same rows, as in PEFT's standalone method.

    PEFT has one list of indices for all modules. If tables have different ones, each gets the union, and the rows that
    it does not train are written with the base's values. The tensors that only an extended vocabulary has get names
    that PEFT ignores.
    """
    records = adapter.manifest.tables
    indices = _shared_indices(adapter.manifest)
    tensors = {
        f"{_PREFIX}{module}{_SUFFIX}": _union_rows(adapter, record, indices)
        for record in records
        for module in _modules_of(record)
    }
    tensors.update({_EXTENSION + name: adapter.raw[name] for name in _vocabulary_shapes(adapter.manifest)})
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": adapter.manifest.base_model,
        "inference_mode": True,
        "init_weights": bool(adapter.manifest.config.get("init_weights", True)),
        "peft_type": PEFT_TYPE,
        "revision": adapter.manifest.revision,
        "target_modules": "|".join(_modules_of(record)[0] for record in records),  # PEFT warns of ties for a list
        "task_type": None,
        "token_indices": list(indices),
    }
    return PeftFiles(config, tensors)


def tokens_from_files(files: PeftFiles, adapter: Adapter) -> Adapter:
    """Return the adapter with the rows of each table record, which the file may hold under any of its names.

    Raises:
        AdapterError: The files do not fit the manifest.
    """
    raw: dict[str, RawArray] = {}
    listed = files.config.get("token_indices")
    if not isinstance(listed, list) or not all(type(i) is int for i in listed):
        raise AdapterError(
            "token_indices must be a list of integers",
            where=CONFIG_NAME,
            found=repr(listed)[:80],
            hint=f"peft_type is {files.config.get('peft_type')!r}",
        )
    indices = _shared_indices(adapter.manifest)
    if tuple(listed) != indices:
        raise AdapterError(
            "token_indices differs from the manifest",
            where=CONFIG_NAME,
            expected=shorten(list(indices)),
            found=shorten(listed),
            hint="the config was edited: load the original",
        )
    for record in adapter.manifest.tables:
        copies = [files.tensors.get(f"{_PREFIX}{module}{_SUFFIX}") for module in _modules_of(record)]
        present = [copy for copy in copies if copy is not None]
        if not present:
            raise AdapterError(
                "the table's rows are missing", where=record.name, found=", ".join(files.tensors) or "no tensor"
            )
        if any(copy != present[0] for copy in present):
            raise AdapterError("tied copies of the rows disagree", where=record.name)
        _check_rows(present[0], tuple(listed), record.name, record.shape)
        place = {index: position for position, index in enumerate(listed)}
        missing = [i for i in record.indices if i not in place]
        if missing or not record.indices:
            raise AdapterError(
                "the manifest lists rows that the file does not have",
                where=record.name,
                expected="rows of token_indices",
                found=shorten(missing) or "none",
            )
        raw[record.name] = present[0].take([place[i] for i in record.indices])
        others = sorted(place.keys() - set(record.indices))
        if others:
            raw[record.name + OTHERS] = present[0].take([place[i] for i in others])
    for name, shape in _vocabulary_shapes(adapter.manifest).items():
        value = files.tensors.get(_EXTENSION + name)
        if value is None or value.shape != shape or value.dtype not in EDITABLE:
            raise AdapterError(
                "a tensor of the extended vocabulary is missing or has the wrong shape",
                where=name,
                expected=list(shape),
                found=None if value is None else f"{value!r}",
            )
        raw[name] = value
    return replace(adapter, raw=raw)


def tokens_from_peft(files: PeftFiles, surgery: Surgery) -> Adapter:
    """Return an adapter from files of PEFT's standalone method.

    Tensors that ``target_modules`` does not name are copies for tied modules.

    Raises:
        AdapterError: The files are not of trainable tokens, or contradict themselves.
    """
    config = files.config
    try:
        parsed = TrainableTokensConfig(config["token_indices"], _as_targets(config.get("target_modules")))
    except (KeyError, ConfigError) as error:
        raise AdapterError("not a config of trainable tokens", where=CONFIG_NAME, found=str(error)) from error
    rows = _rows_by_module(files)
    primary = [m for m in rows if _is_target(m, parsed.target_modules)] or [min(rows, key=len)]
    copies = [m for m in rows if m not in primary]
    if isinstance(parsed.token_indices, dict):
        raise AdapterError("token_indices must be a list", where=CONFIG_NAME, found=parsed.token_indices)
    records, raw = [], {}
    for module in primary:
        aliases = tuple(f"{m}.weight" for m in copies if rows[m] == rows[module])
        name = f"{module}.weight"
        _check_rows(rows[module], parsed.token_indices, name, None)
        records.append(TableRecord(name, aliases, parsed.token_indices, tied=True if aliases else None))
        raw[name] = rows[module].to("F32")
    different = [m for m in copies if all(rows[m] != rows[p] for p in primary)]
    if different:
        raise AdapterError(
            "tied copies of the rows disagree",
            where=", ".join(different),
            expected="the rows of " + " or ".join(primary),
            hint="remove the wrong copy from the file",
        )
    manifest = Manifest(
        surgery.name,
        surgery.version,
        parsed.to_json(),
        tuple(records),
        config.get("base_model_name_or_path"),
        config.get("revision"),
    )
    return Adapter(manifest, raw, surgery)


def _rows_by_module(files: PeftFiles) -> dict[str, RawArray]:
    others = [name for name in files.tensors if not name.endswith(_SUFFIX)]
    if others or not files.tensors:
        raise AdapterError(
            "the file must hold trainable tokens and no other tensors",
            where=WEIGHTS_NAME,
            expected=f"names that end in {_SUFFIX}",
            found=", ".join(others[:4]) or "no tensor",
        )
    return {name.removeprefix(_PREFIX).removesuffix(_SUFFIX): raw for name, raw in files.tensors.items()}


def _shared_indices(manifest: Manifest) -> tuple[int, ...]:
    """Return PEFT's one list of indices: the list of all tables, or the union of their lists and the new tokens."""
    new = () if manifest.new_tokens is None else manifest.new_tokens.ids
    first = manifest.tables[0].indices
    if all(record.indices == first for record in manifest.tables) and set(new) <= set(first):
        return first
    return tuple(sorted({i for record in manifest.tables for i in record.indices} | set(new)))


def _vocabulary_shapes(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors that only an extended vocabulary has."""
    if manifest.new_tokens is None:
        return {}
    widths = {record.name: record.shape[1] for record in manifest.tables if record.shape is not None}
    shapes: dict[str, tuple[int, ...]] = {filler_name(name): (1, width) for name, width in widths.items()}
    count = len(manifest.new_tokens.tokens) + 1
    return shapes | {entries_name(name): (count,) for name in manifest.new_tokens.vectors}


def carried_rows(adapter: Adapter, record: TableRecord) -> tuple[tuple[int, ...], RawArray]:
    """Return indices and rows of the new tokens that a table has but does not train."""
    new = adapter.manifest.new_tokens
    others = adapter.raw.get(record.name + OTHERS)
    if new is None or others is None:
        return (), adapter.raw[record.name].take([])
    untrained = sorted(set(_shared_indices(adapter.manifest)) - set(record.indices))
    place = {index: number for number, index in enumerate(untrained) if index in set(new.ids)}
    return tuple(place), others.take(list(place.values()))


def _union_rows(adapter: Adapter, record: TableRecord, indices: tuple[int, ...]) -> RawArray:
    """Return a table's trained rows and, at their indices among them, the rows that other tables train."""
    own = adapter.raw[record.name]
    if indices == record.indices:
        return own
    if len(indices) == len(record.indices):
        both, order = own, list(record.indices)
    else:
        others = adapter.raw.get(record.name + OTHERS)
        if others is None:
            raise AdapterError(
                "PEFT's format has one list of token indices for all modules",
                where=record.name,
                expected="rows that every table has",
                found=shorten(list(indices)),
                hint="save an adapter for each table",
            )
        both = RawArray(own.dtype, (len(indices), own.shape[1]), own.data + others.data)
        order = [*record.indices, *sorted(set(indices) - set(record.indices))]
    place = {index: number for number, index in enumerate(order)}
    return both.take([place[i] for i in indices])


def _modules_of(record: TableRecord) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.rpartition(".")[0] for name in (record.name, *record.aliases)))


def _as_targets(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _is_target(module: str, targets: str | Sequence[str] | None) -> bool:
    if targets is None:
        return module.rpartition(".")[2] == "embed_tokens"
    if isinstance(targets, str):
        try:
            return re.fullmatch(targets, module) is not None or module.endswith("." + targets)
        except re.error:
            return module == targets
    return any(module == t or module.endswith("." + t) for t in targets)


def _check_rows(raw: RawArray, indices: tuple[int, ...], where: str, shape: tuple[int, int] | None) -> None:
    width = shape[1] if shape is not None else raw.shape[-1] if raw.shape else 0
    if raw.shape != (len(indices), width) or raw.dtype not in ("F64", "F32", "F16", "BF16"):
        raise AdapterError(
            "the rows have the wrong shape or dtype",
            where=where,
            found=f"{raw.shape} of {raw.dtype}",
            expected=f"({len(indices)}, {width}) floats",
        )

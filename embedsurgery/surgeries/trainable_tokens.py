"""Trainable tokens: a few rows of an embedding table are trained, everything else stays frozen.

The rows are absolute values, as PEFT stores them, not differences: on a base whose rows were initialised otherwise a
difference would mean something else. https://huggingface.co/docs/peft/package_reference/trainable_tokens
"""

from __future__ import annotations

import operator
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from embedsurgery._version import __version__
from embedsurgery.adapter import CONFIG_NAME, Adapter, Fingerprint, Manifest, PeftFiles, TableRecord
from embedsurgery.errors import AdapterError, ConfigError, EmbedSurgeryWarning, TokenIndexError
from embedsurgery.graph import EmbeddingGraph, Table
from embedsurgery.plan import Plan, SetRows
from embedsurgery.raw import RawArray
from embedsurgery.stores.base import Store, rows_of, shorten
from embedsurgery.surgeries.base import Base, RowOverride, Surgery

PEFT_TYPE = "TRAINABLE_TOKENS"
_PREFIX, _SUFFIX = "base_model.model.", ".trainable_tokens_delta"
_OTHERS = ".untrained"
"""Suffix of a tensor with base rows that only PEFT's format wants: see `TrainableTokens.to_peft`."""

_SAMPLE_ROWS = 4096


@dataclass(frozen=True)
class TrainableTokensConfig:
    """Asks for trainable rows. PEFT's names and semantics.

    Attributes:
        token_indices: Row numbers: a list, range, tuple, numpy array or tensor of integers, each once; or a dict of
            module name -> such a list, for different rows of different tables.
        target_modules: A list of module names, or a regular expression, as in PEFT. None is the model's input
            embedding with everything that is tied to it, else the module called ``embed_tokens``.
        init_weights: True starts from the current rows, so that nothing changes until training; False from
            random rows at the table's own scale, which throws away what the model knows of these tokens.

    Raises:
        TokenIndexError: Indices that are negative, repeated, missing, or no integers.
        ConfigError: ``target_modules`` beside a dict that names its modules itself, or of the wrong type.
    """

    token_indices: Any
    target_modules: str | Sequence[str] | None = None
    init_weights: bool = True

    def __post_init__(self) -> None:
        indices: Any
        if isinstance(self.token_indices, Mapping):
            indices = {str(name): _indices(part) for name, part in self.token_indices.items()}
            if not indices:
                raise TokenIndexError("token_indices is empty", expected="at least one index")
            if self.target_modules is not None:
                raise ConfigError("token_indices names its modules itself", expected="target_modules=None",
                                  found=f"target_modules={self.target_modules!r}")  # fmt: skip
        else:
            indices = _indices(self.token_indices)
        object.__setattr__(self, "token_indices", indices)
        if self.target_modules is not None and not isinstance(self.target_modules, str):
            listed = isinstance(self.target_modules, (list, tuple, set, frozenset))
            names = tuple(self.target_modules) if listed else ()
            if not names or not all(isinstance(name, str) for name in names):
                raise ConfigError("target_modules has no module names", expected="names, a regular expression or None",
                                  found=repr(self.target_modules))  # fmt: skip
            object.__setattr__(self, "target_modules", names)
        if not isinstance(self.init_weights, bool):
            raise ConfigError("init_weights is no bool", expected="True or False", found=repr(self.init_weights))


def _indices(values: Any) -> tuple[int, ...]:
    """Checked row numbers from anything that holds integers."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TokenIndexError("token_indices is no list", expected="integers", found=repr(values))
    items = values.tolist() if hasattr(values, "tolist") else list(values)
    if not isinstance(items, list):
        raise TokenIndexError("token_indices has no axis", expected="one axis of integers", found=repr(values))
    items = [item.item() if hasattr(item, "item") else item for item in items]
    wrong = [item for item in items if isinstance(item, bool) or not hasattr(type(item), "__index__")]
    if wrong:
        hint = "tokenizer.convert_tokens_to_ids gives a token's index" if isinstance(wrong[0], str) else None
        raise TokenIndexError("token_indices holds what is no integer", expected="integers", hint=hint,
                              found=", ".join(f"{item!r}" for item in wrong[:8]))  # fmt: skip
    indices = [operator.index(item) for item in items]
    if not indices:
        raise TokenIndexError("token_indices is empty", expected="at least one index")
    negative = [i for i in indices if i < 0]
    if negative:
        raise TokenIndexError("token_indices holds negative numbers", expected="row numbers", found=shorten(negative))
    counts: dict[int, int] = {}
    for index in indices:
        counts[index] = counts.get(index, 0) + 1
    repeated = sorted(i for i, count in counts.items() if count > 1)
    if repeated:
        raise TokenIndexError("token_indices holds repeats", expected="each index once", found=shorten(repeated))
    return tuple(indices)


class TrainableTokens(Surgery):
    """Rows of tables, each table with its own (K, D) tensor; aliases of a table share it."""

    name = "trainable_tokens"

    def start(self, config: TrainableTokensConfig, store: Store, base: Base) -> Adapter:
        """The current rows (or random ones) of every targeted table.

        Raises:
            TableError: Nothing fits ``target_modules``.
            TokenIndexError: An index that a table does not have.
            UnsupportedError: A table whose rows are no plain numbers.
        """
        records, raw = [], {}
        targets = resolve(config, store.graph)
        union = tuple(sorted({i for _, indices in targets for i in indices}))
        for table, indices in targets:
            _check_range(indices, table)
            store.check_editable(table)
            original = rows_of(store, table, indices)
            rows = original if original.dtype == "F64" else original.to("F32")
            if not config.init_weights:
                rows = _random_rows(store, table, len(indices), rows.dtype)
            raw[table.name] = rows
            others = tuple(i for i in union if i not in set(indices))
            if others and others[-1] < table.shape[0]:
                raw[table.name + _OTHERS] = rows_of(store, table, others).to(rows.dtype)
            projections = [t for t in store.graph.tables if "output" in t.roles and t.shape[0] == table.shape[0]]
            records.append(
                TableRecord(
                    name=table.name,
                    aliases=table.aliases,
                    indices=indices,
                    shape=table.shape,
                    dtype=table.dtype,
                    tied="output" in table.roles if projections and "input" in table.roles else None,
                    fingerprint=Fingerprint.of(original),
                )
            )
        used = sorted({i for record in records for i in record.indices})
        texts = base.tokenizer.convert_ids_to_tokens(used) if base.tokenizer is not None else []
        tokens = {i: text for i, text in zip(used, texts, strict=False) if isinstance(text, str)}
        manifest = Manifest(self.name, self.version, asdict(config), tuple(records), base.name, base.revision, tokens,
                            __version__)  # fmt: skip
        return Adapter(manifest, raw, self)

    def live(self, adapter: Adapter, located: Mapping[str, Table]) -> tuple[RowOverride, ...]:
        """One override a table."""
        return tuple(
            RowOverride(located[record.name].name, record.name, record.indices) for record in adapter.manifest.tables
        )

    def plan(self, adapter: Adapter, located: Mapping[str, Table]) -> Plan:
        """The rows of each table become the adapter's."""
        edits = (
            SetRows(located[record.name].name, record.indices, adapter.raw[record.name])
            for record in adapter.manifest.tables
        )
        return Plan(tuple(edits))

    def to_peft(self, adapter: Adapter) -> PeftFiles:
        """PEFT's config and tensors: every name of a tied table gets the same rows, as PEFT's standalone method does.

        PEFT has one list of indices for all modules. Where tables have different ones, each gets the union, and
        the rows that are not its own are written as they are in the base.
        """
        records = adapter.manifest.tables
        differ = any(record.indices != records[0].indices for record in records)
        indices = sorted({i for record in records for i in record.indices}) if differ else list(records[0].indices)
        rows = {record.name: _union(adapter, record, indices) if differ else adapter.raw[record.name]
                for record in records}  # fmt: skip
        tensors = {
            f"{_PREFIX}{module}{_SUFFIX}": rows[record.name] for record in records for module in _modules(record)
        }
        config = {
            "auto_mapping": None,
            "base_model_name_or_path": adapter.manifest.base_model,
            "inference_mode": True,
            "init_weights": bool(adapter.manifest.config.get("init_weights", True)),
            "peft_type": PEFT_TYPE,
            "revision": adapter.manifest.revision,
            "target_modules": "|".join(_modules(record)[0] for record in records),  # for a list PEFT warns of ties
            "task_type": None,
            "token_indices": indices,
        }
        return PeftFiles(config, tensors)

    def from_files(self, files: PeftFiles, adapter: Adapter) -> Adapter:
        """The rows of each table record, under any of its names."""
        raw: dict[str, RawArray] = {}
        listed = files.config.get("token_indices")
        if not isinstance(listed, list) or not all(type(i) is int for i in listed):
            raise AdapterError("token_indices is no list of integers", where=CONFIG_NAME, found=repr(listed)[:80],
                               hint=f"peft_type is {files.config.get('peft_type')!r}")  # fmt: skip
        rows = [record.indices for record in adapter.manifest.tables]
        same = all(indices == rows[0] for indices in rows)
        if tuple(listed) != (rows[0] if same else tuple(sorted({i for indices in rows for i in indices}))):
            raise AdapterError("token_indices are not those of the manifest", where=CONFIG_NAME,
                               found=shorten(listed), hint="the config was edited: load the original")  # fmt: skip
        for record in adapter.manifest.tables:
            copies = [files.tensors.get(f"{_PREFIX}{module}{_SUFFIX}") for module in _modules(record)]
            present = [copy for copy in copies if copy is not None]
            if not present:
                raise AdapterError("the rows of a table are missing", where=record.name,
                                   found=", ".join(files.tensors) or "no tensor")  # fmt: skip
            if any(copy != present[0] for copy in present):
                raise AdapterError("tied copies of the rows disagree", where=record.name)
            _check_rows(present[0], tuple(listed), record.name, record.shape)
            place = {index: position for position, index in enumerate(listed)}
            missing = [i for i in record.indices if i not in place]
            if missing or not record.indices:
                raise AdapterError("the manifest lists rows that the file does not hold", where=record.name,
                                   expected="rows of token_indices", found=shorten(missing) or "none")  # fmt: skip
            raw[record.name] = present[0].take([place[i] for i in record.indices])
            others = sorted(place.keys() - set(record.indices))
            if others:
                raw[record.name + _OTHERS] = present[0].take([place[i] for i in others])
        return replace(adapter, raw=raw)

    def from_peft(self, files: PeftFiles) -> Adapter:
        """A file of PEFT's standalone method: tensors that ``target_modules`` does not name are tied copies."""
        config = files.config
        try:
            asked = TrainableTokensConfig(config["token_indices"], _targets(config.get("target_modules")))
        except (KeyError, ConfigError) as error:
            raise AdapterError("adapter_config.json is not one of trainable tokens", found=str(error)) from error
        rows = {
            name.removeprefix(_PREFIX).removesuffix(_SUFFIX): raw
            for name, raw in files.tensors.items()
            if name.endswith(_SUFFIX)
        }
        strangers = [name for name in files.tensors if not name.endswith(_SUFFIX)]
        if strangers or not rows:
            raise AdapterError("tensors that are no trainable tokens", found=", ".join(strangers[:4]) or "no tensor",
                               expected=f"names that end in {_SUFFIX}")  # fmt: skip
        primary = [m for m in rows if _is_target(m, asked.target_modules)] or [min(rows, key=len)]
        copies = [m for m in rows if m not in primary]
        if isinstance(asked.token_indices, dict):
            raise AdapterError("token_indices is no list", found=asked.token_indices)
        records, raw = [], {}
        for module in primary:
            aliases = tuple(f"{m}.weight" for m in copies if rows[m] == rows[module])
            name = f"{module}.weight"
            _check_rows(rows[module], asked.token_indices, name, None)
            records.append(TableRecord(name, aliases, asked.token_indices, tied=True if aliases else None))
            raw[name] = rows[module].to("F32")
        lost = [m for m in copies if all(rows[m] != rows[p] for p in primary)]
        if lost:
            raise AdapterError("tied copies of the rows disagree", where=", ".join(lost), expected="the rows of "
                               + " or ".join(primary), hint="say which is right by removing the other")  # fmt: skip
        manifest = Manifest(
            self.name,
            self.version,
            asdict(asked),
            tuple(records),
            config.get("base_model_name_or_path"),
            config.get("revision"),
        )
        return Adapter(manifest, raw, self)


def resolve(config: TrainableTokensConfig, graph: EmbeddingGraph) -> list[tuple[Table, tuple[int, ...]]]:
    """The tables that a config means, with the indices of each.

    Raises:
        TableError: A target that fits no table; the message lists those there are.
        ConfigError: A dict names one table twice, under two aliases.
    """
    if isinstance(config.token_indices, dict):
        chosen: dict[str, tuple[Table, tuple[int, ...]]] = {}
        for name, indices in config.token_indices.items():
            for table in graph.select([name]):
                if table.name in chosen and chosen[table.name][1] != indices:
                    raise ConfigError("two names of one table are given different indices", where=name,
                                      expected="one list for a tied table", found=table.name)  # fmt: skip
                chosen[table.name] = (table, indices)
        return list(chosen.values())
    tables = (graph.main_input(),) if config.target_modules is None else graph.select(config.target_modules)
    return [(table, config.token_indices) for table in tables]


def _check_range(indices: tuple[int, ...], table: Table) -> None:
    rows = table.shape[0]
    beyond = [i for i in indices if i >= rows]
    if beyond:
        raise TokenIndexError("token_indices are out of range", where=table.name, expected=f"0 to {rows - 1}",
                              found=shorten(beyond), hint="add the tokens to the model first")  # fmt: skip
    if len(indices) > rows // 2:
        warnings.warn(
            f"{len(indices)} of {rows} rows of {table.name} are to be trained: past half of the vocabulary, tuning "
            "the whole embedding is the better tool",
            EmbedSurgeryWarning,
            stacklevel=6,
        )


def _random_rows(store: Store, table: Table, count: int, dtype: str) -> RawArray:
    """Normal rows at the table's own scale, from torch's global generator."""
    import torch

    warnings.warn(
        f"init_weights=False: {count} rows of {table.name} start at random, so the model forgets these tokens",
        EmbedSurgeryWarning,
        stacklevel=6,
    )
    step = max(1, table.shape[0] // _SAMPLE_ROWS)
    sample = rows_of(store, table, tuple(range(0, table.shape[0], step))).float32()
    scale = float(np.std(sample[np.isfinite(sample).all(axis=1)], dtype=np.float64))
    values = torch.randn(count, table.shape[1], dtype=torch.float32).numpy() * np.float32(scale)
    return RawArray.of(values).to(dtype)


def _union(adapter: Adapter, record: TableRecord, indices: list[int]) -> RawArray:
    """A table's trained rows and, between them, the base's rows that other tables train."""
    own = adapter.raw[record.name]
    if len(indices) == len(record.indices):
        both, held = own, list(record.indices)
    else:
        others = adapter.raw.get(record.name + _OTHERS)
        if others is None:
            raise AdapterError("PEFT's format has one list of token indices for all modules", where=record.name,
                               expected="rows that every table has", found=shorten(indices),
                               hint="save an adapter for each table")  # fmt: skip
        both = RawArray(own.dtype, (len(indices), own.shape[1]), own.data + others.data)
        held = [*record.indices, *sorted(set(indices) - set(record.indices))]
    return both.take([held.index(i) for i in indices])


def _modules(record: TableRecord) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.rpartition(".")[0] for name in (record.name, *record.aliases)))


def _targets(value: Any) -> Any:
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
        raise AdapterError("rows of the wrong shape or dtype", where=where, found=f"{raw.shape} of {raw.dtype}",
                           expected=f"({len(indices)}, {width}) floats")  # fmt: skip

"""LoRA on tables in PEFT's files: ``lora_embedding_A/B`` of lookups, ``lora_A/B`` of heads, rows of token adapters.

https://huggingface.co/docs/peft/package_reference/lora. An adapter of PEFT's may hold more than tables: what that is
is said, and left to PEFT.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from embedsurgery.adapters.adapter import Adapter, PeftFiles
from embedsurgery.adapters.manifest import Fingerprint, Manifest, TableRecord
from embedsurgery.errors import AdapterError, EmbedSurgeryWarning
from embedsurgery.graph import Table
from embedsurgery.graph.vocabularies import HEADS, ends
from embedsurgery.surgeries.whole_tables import sampled_rows
from embedsurgery.tensors.raw import EDITABLE, RawArray
from embedsurgery_lora.config import scaling

if TYPE_CHECKING:
    from embedsurgery.surgeries.surgery import Surgery

LEFT = ".left"
"""Suffix of the adapter's tensor with the matrix (V, r)."""

EMBEDDING, LINEAR, TOKENS = "embedding", "linear", "tokens"
"""What a table is in PEFT's terms."""

_PREFIX = "base_model.model."
_DELTA = ".token_adapter.trainable_tokens_delta"
_PAIRS = {EMBEDDING: (".lora_embedding_A", ".lora_embedding_B"), LINEAR: (".lora_B.weight", ".lora_A.weight")}
"""What is ``left`` and what is ``right`` in each; of an embedding both are transposed."""


_VARIANTS = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "kasa_config",
    "arrow_config",
    "velora_config",
    "monteclora_config",
)
"""Keys of PEFT's config that ask for another update than ``scaling * B @ A``."""

_MOVED = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of ``init_lora_weights`` that change the weights of a linear layer before training."""


def kind_of(table: Table) -> str:
    """What PEFT makes of a table: an embedding where it is looked up, a linear layer else."""
    return EMBEDDING if "input" in table.roles else LINEAR


def to_peft(adapter: Adapter) -> PeftFiles:
    """PEFT's config and tensors."""
    asked, tensors = adapter.manifest.config, {}
    ranks, alphas, tokens, modules, tied = {}, {}, {}, [], False
    for record in adapter.manifest.tables:
        module, how = record.name.rpartition(".")[0], asked["tables"][record.name]
        if how["kind"] == TOKENS:
            tensors[f"{_PREFIX}{module}{_DELTA}"] = adapter.raw[record.name]
            tokens[module] = list(record.indices)
            continue
        left, right = adapter.raw[record.name + LEFT], adapter.raw[record.name]
        for one, kind in ((module, how["kind"]), *how.get("twins", ())):
            for suffix, matrix in zip(_PAIRS[kind], (left, right), strict=True):
                tensors[_PREFIX + one + suffix] = _turned(matrix) if kind == EMBEDDING else matrix
        tied = tied or bool(how.get("twins"))
        rank = right.shape[0]
        modules.append(module)
        ranks[module] = rank
        alphas[module] = how["scaling"] * (math.sqrt(rank) if asked.get("use_rslora") else rank)
    first = modules[0] if modules else None
    rank, alpha = (ranks[first], alphas[first]) if first else (asked.get("r", 8), asked.get("lora_alpha", 8))
    config = {
        "alpha_pattern": {m: a for m, a in alphas.items() if a != alpha},
        "base_model_name_or_path": adapter.manifest.base_model,
        "bias": "none",
        **({"ensure_weight_tying": True} if tied else {}),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {m: r for m, r in ranks.items() if r != rank},
        "revision": adapter.manifest.revision,
        "target_modules": modules,
        "task_type": None,
        "trainable_token_indices": tokens or None,
        "use_dora": False,
        "use_rslora": bool(asked.get("use_rslora")),
    }
    return PeftFiles(config, tensors)


def from_files(files: PeftFiles, adapter: Adapter) -> Adapter:
    """Fill an adapter that has our manifest.

    Raises:
        AdapterError: The tensors are not those of the manifest.
    """
    raw: dict[str, RawArray] = {}
    tables = adapter.manifest.config.get("tables")
    for record in adapter.manifest.tables:
        module = record.name.rpartition(".")[0]
        how = tables.get(record.name) if isinstance(tables, Mapping) else None
        if not isinstance(how, Mapping) or how.get("kind") not in (EMBEDDING, LINEAR, TOKENS) or record.shape is None:
            raise AdapterError("the manifest does not say what is done with a table", where=record.name)
        if how["kind"] == TOKENS:
            raw[record.name] = _tensor(files, f"{_PREFIX}{module}{_DELTA}", (len(record.indices), record.shape[1]))
            continue
        found = _pair(files.tensors, module, str(how["kind"]))
        if found is None or (found[0].shape[0], found[1].shape[1]) != record.shape:
            raise AdapterError(
                "the matrices of a table are missing, or of another shape",
                where=record.name,
                expected=list(record.shape),
                found=", ".join(list(files.tensors)[:6]),
            )
        raw[record.name + LEFT], raw[record.name] = found
    return replace(adapter, raw=raw)


def from_peft(files: PeftFiles, surgery: Surgery) -> Adapter:
    """A file of PEFT's; what lies in it beside tables is named in a warning and left.

    Raises:
        AdapterError: It holds no table, or updates of a kind that are no plain LoRA.
    """
    config = files.config
    found = _tables(files.tensors)
    strange = [key for key in _VARIANTS if config.get(key)]
    strange += [name for name in files.tensors if "lora_magnitude_vector" in name][:1]
    begun = str(config.get("init_lora_weights")).lower()
    if begun.startswith(_MOVED) and any(kind == LINEAR for _, kind in found):
        strange.append(f"init_lora_weights {begun!r}, which moved the head's own weights")
    if strange:
        raise AdapterError(
            "a variant of LoRA that is not merged here",
            found=", ".join(strange),
            expected="plain LoRA",
            hint="merge it with PEFT, and use embedsurgery extract on the result",
        )
    records: list[TableRecord] = []
    raw: dict[str, RawArray] = {}
    kinds: dict[str, dict[str, Any]] = {}
    used: set[str] = set()
    twins = _twins(files, found) if config.get("ensure_weight_tying") else {}
    for module, kind in found:
        if module in twins:
            used.update(_PREFIX + module + suffix for suffix in (*_PAIRS[kind], ".base_layer.weight"))
            continue
        name = f"{module}.weight"
        if name in raw:
            raise AdapterError("two updates of one table", where=name, expected="a low-rank update or token rows")
        if kind == TOKENS:
            delta = files.tensors[_PREFIX + module + _DELTA]
            indices = _indices(config.get("trainable_token_indices"), module, delta)
            records.append(TableRecord(name, (), indices))
            raw[name], kinds[name] = delta.to("F32"), {"kind": TOKENS}
            used.add(_PREFIX + module + _DELTA)
            continue
        pair = _pair(files.tensors, module, kind)
        if pair is None:
            raise AdapterError(
                "the matrices of a table are missing, or do not fit each other",
                where=module,
                expected=" and ".join(suffix.lstrip(".") for suffix in _PAIRS[kind]),
            )
        left, right = pair
        table = Table(name, (left.shape[0], right.shape[1]), "F32")
        held = files.tensors.get(f"{_PREFIX}{module}.base_layer.weight")
        sampled, mark, dtype = sampled_rows(table), None, None
        if held is not None and held.shape == table.shape and held.dtype in EDITABLE:
            mark, dtype = Fingerprint.of(held.take(sampled)), held.dtype  # PEFT saves the base's table along
        same = [(other, other_kind) for other, other_kind in found if twins.get(other) == module]
        aliases = tuple(f"{other}.weight" for other, _ in same)
        records.append(TableRecord(name, aliases, sampled, table.shape, dtype, True if same else None, mark))
        raw[name + LEFT], raw[name] = left, right
        kinds[name] = {"kind": kind, "scaling": _factor(config, module, right)}
        if same:
            kinds[name]["twins"] = [list(twin) for twin in same]
        used.update(_PREFIX + module + suffix for suffix in (*_PAIRS[kind], ".base_layer.weight"))
    left_over = sorted({_module_of(name) for name in files.tensors.keys() - used})
    if not records:
        raise AdapterError(
            "no embedding table and no head is in this LoRA adapter",
            found=", ".join(left_over[:6]),
            expected="lora_embedding_A, lora_A of a head, or token rows",
            hint="there is nothing here for embedsurgery: merge it with PEFT",
        )
    if left_over:
        more = f" and {len(left_over) - 6} more" if len(left_over) > 6 else ""
        warnings.warn(
            f"this LoRA adapter has more than tables: {', '.join(left_over[:6])}{more} are left as they are; "
            "PEFT merges them, before or after",
            EmbedSurgeryWarning,
            stacklevel=8,
        )
    kept = {
        "r": config.get("r"),
        "lora_alpha": config.get("lora_alpha"),
        "tables": kinds,
        "use_rslora": bool(config.get("use_rslora")),
        "left": left_over,
    }
    manifest = Manifest(
        surgery.name,
        surgery.version,
        kept,
        tuple(records),
        config.get("base_model_name_or_path"),
        config.get("revision"),
    )
    return Adapter(manifest, raw, surgery)


def _twins(files: PeftFiles, found: list[tuple[str, str]]) -> dict[str, str]:
    """Where PEFT tied the adapters of a tied table: each further module -> the first, whose matrices it has.

    PEFT's forward has the update once at each of them; its merge adds it to the one table once for each.
    """
    first = next((module for module, kind in found if kind == EMBEDDING), None)
    pair = None if first is None else _pair(files.tensors, first, EMBEDDING)
    if first is None or pair is None:
        return {}
    factor = _factor(files.config, first, pair[1])
    same = (m for m, kind in found if m != first and kind != TOKENS and _pair(files.tensors, m, kind) == pair)
    return {module: first for module in same if _factor(files.config, module, pair[1]) == factor}


def _factor(config: Mapping[str, Any], module: str, right: RawArray) -> float:
    alpha = _of_module(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    return scaling(float(alpha), right.shape[0], rslora=bool(config.get("use_rslora")))


def _tables(tensors: Mapping[str, RawArray]) -> list[tuple[str, str]]:
    """The modules of tables that a file updates, and how."""
    found = []
    for name in tensors:
        module = name.removeprefix(_PREFIX)
        if module.endswith(_DELTA):
            found.append((module.removesuffix(_DELTA), TOKENS))
        elif module.endswith(".lora_embedding_A"):
            found.append((module.removesuffix(".lora_embedding_A"), EMBEDDING))
        elif module.endswith(".lora_A.weight") and ends(module.removesuffix(".lora_A.weight"), HEADS):
            found.append((module.removesuffix(".lora_A.weight"), LINEAR))
    return found


def _pair(tensors: Mapping[str, RawArray], module: str, kind: str) -> tuple[RawArray, RawArray] | None:
    """``left`` (V, r) and ``right`` (r, D) in fp32 or fp64, None where one is missing or they do not fit."""
    found = [tensors.get(_PREFIX + module + suffix) for suffix in _PAIRS[kind]]
    pair = [one for one in found if one is not None and len(one.shape) == 2 and one.dtype in EDITABLE]
    if len(pair) != 2:
        return None
    left, right = (_turned(one) if kind == EMBEDDING else one for one in pair)
    wide = "F64" if "F64" in (left.dtype, right.dtype) else "F32"
    return (left.to(wide), right.to(wide)) if left.shape[1] == right.shape[0] else None


def _turned(matrix: RawArray) -> RawArray:
    bits = np.ascontiguousarray(matrix.bits.T)
    return RawArray(matrix.dtype, matrix.shape[::-1], bits.tobytes())


def _tensor(files: PeftFiles, name: str, shape: tuple[int, int]) -> RawArray:
    found = files.tensors.get(name)
    if found is None or found.shape != shape or found.dtype not in EDITABLE:
        raise AdapterError(
            "a tensor is missing, or of another shape",
            where=name,
            expected=list(shape),
            found=None if found is None else f"{found!r}",
        )
    return found


def _indices(asked: Any, module: str, delta: RawArray) -> tuple[int, ...]:
    """The rows of a token adapter: PEFT has a list for the input embedding, or one for each module's name."""
    if isinstance(asked, Mapping):
        asked = next((v for k, v in asked.items() if module == k or module.endswith(f".{k}")), None)
    whole = isinstance(asked, list) and all(type(i) is int and i >= 0 for i in asked) and len(set(asked)) == len(asked)
    if not whole or len(delta.shape) != 2 or delta.shape[0] != len(asked) or delta.dtype not in EDITABLE:
        raise AdapterError(
            "token rows whose indices are not said",
            where=module,
            found=repr(asked)[:80],
            expected=f"trainable_token_indices for {delta!r}",
        )
    return tuple(asked)


def _of_module(patterns: Any, module: str, default: Any) -> Any:
    """PEFT's ``get_pattern_key``: the first pattern that fits a module's name at its end."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _module_of(name: str) -> str:
    module = name.removeprefix(_PREFIX)
    for suffix in (".lora_A.weight", ".lora_B.weight", ".base_layer.weight", ".weight", ".bias"):
        if module.endswith(suffix):
            return module.removesuffix(suffix)
    return module

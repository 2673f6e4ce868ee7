"""Reads LoRA adapters that PEFT wrote.

An adapter of PEFT's can change more than tables; a warning names the other modules, and they are left to PEFT.
``files.py`` has the names of its tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from embedsurgery.adapters.adapter import Adapter, PeftFiles
from embedsurgery.adapters.manifest import Fingerprint, Manifest, TableRecord
from embedsurgery.errors import AdapterError, warn
from embedsurgery.graph import Table
from embedsurgery.graph.vocabularies import HEADS, ends
from embedsurgery.surgeries.whole_tables import sampled_rows
from embedsurgery.tensors.raw import EDITABLE, RawArray
from embedsurgery_lora.config import scaling
from embedsurgery_lora.files import DELTA, EMBEDDING, LEFT, LINEAR, PAIRS, PREFIX, TOKENS, find_pair

if TYPE_CHECKING:
    from embedsurgery.surgeries.surgery import Surgery

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
"""Keys of PEFT's config for updates other than ``scaling * B @ A``."""

_MOVED = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Prefixes of ``init_lora_weights`` for which PEFT changes the weights of a linear layer before training."""


def from_peft(files: PeftFiles, surgery: Surgery) -> Adapter:
    """Read an adapter of PEFT's. A warning names the modules that are not tables; they are left out.

    Raises:
        AdapterError: It changes no table, or it is a variant of LoRA other than ``scaling * B @ A``.
    """
    config = files.config
    found = _find_tables(files.tensors)
    _refuse_variants(files, found)
    records: list[TableRecord] = []
    raw: dict[str, RawArray] = {}
    settings: dict[str, dict[str, Any]] = {}
    twins = _find_twins(files, found) if config.get("ensure_weight_tying") else {}
    for module, kind in found:
        name = f"{module}.weight"
        if module in twins:
            continue
        if name in raw:
            raise AdapterError(
                "two updates of one table", where=name, expected="a low-rank update or token rows", found="both"
            )
        if kind == TOKENS:
            record, tensors = _read_token_rows(files, module)
            settings[name] = {"kind": TOKENS}
        else:
            same = [(other, other_kind) for other, other_kind in found if twins.get(other) == module]
            record, tensors = _read_low_rank(files, module, kind, same)
            settings[name] = {"kind": kind, "scaling": _factor(config, module, tensors[name])}
            if same:
                settings[name]["twins"] = [list(twin) for twin in same]
        records.append(record)
        raw.update(tensors)
    left_over = _left_over_modules(files, found)
    if not records:
        raise AdapterError(
            "the LoRA adapter changes no embedding table and no head",
            found=", ".join(left_over[:6]),
            expected="lora_embedding_A, lora_A of a head, or token rows",
            hint="merge it with PEFT",
        )
    if left_over:
        more = f" and {len(left_over) - 6} more" if len(left_over) > 6 else ""
        warn(
            f"the LoRA adapter changes modules that are not tables: {', '.join(left_over[:6])}{more}; "
            "they are left out, merge them with PEFT",
            plugin=__file__,
        )
    kept = {
        "r": config.get("r"),
        "lora_alpha": config.get("lora_alpha"),
        "tables": settings,
        "use_rslora": bool(config.get("use_rslora")),
        "left": left_over,
    }
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    return Adapter(Manifest(surgery.name, surgery.version, kept, tuple(records), base, revision), raw, surgery)


def _read_token_rows(files: PeftFiles, module: str) -> tuple[TableRecord, dict[str, RawArray]]:
    name, delta = f"{module}.weight", files.tensors[PREFIX + module + DELTA]
    indices = _token_indices(files.config.get("trainable_token_indices"), module, delta)
    return TableRecord(name, (), indices), {name: delta.to("F32")}


def _read_low_rank(
    files: PeftFiles, module: str, kind: str, twins: list[tuple[str, str]]
) -> tuple[TableRecord, dict[str, RawArray]]:
    """Read the update of one table; ``twins`` are further modules with the same matrices."""
    pair = find_pair(files.tensors, module, kind)
    if pair is None:
        raise AdapterError(
            "the matrices of a table are missing or do not fit each other",
            where=module,
            expected=" and ".join(suffix.lstrip(".") for suffix in PAIRS[kind]),
        )
    left, right = pair
    name = f"{module}.weight"
    table = Table(name, (left.shape[0], right.shape[1]), "F32")
    base = files.tensors.get(f"{PREFIX}{module}.base_layer.weight")  # PEFT may save the base's table too
    sampled, fingerprint, dtype = sampled_rows(table), None, None
    if base is not None and base.shape == table.shape and base.dtype in EDITABLE:
        fingerprint, dtype = Fingerprint.of(base.take(sampled)), base.dtype
    aliases = tuple(f"{other}.weight" for other, _ in twins)
    record = TableRecord(name, aliases, sampled, table.shape, dtype, True if twins else None, fingerprint)
    return record, {name + LEFT: left, name: right}


def _left_over_modules(files: PeftFiles, tables: list[tuple[str, str]]) -> list[str]:
    used: set[str] = set()
    for module, kind in tables:
        suffixes = (DELTA,) if kind == TOKENS else (*PAIRS[kind], ".base_layer.weight")
        used.update(PREFIX + module + suffix for suffix in suffixes)
    return sorted({_module_of(name) for name in files.tensors.keys() - used})


def _refuse_variants(files: PeftFiles, tables: list[tuple[str, str]]) -> None:
    variants = [key for key in _VARIANTS if files.config.get(key)]
    variants += [name for name in files.tensors if "lora_magnitude_vector" in name][:1]
    init = str(files.config.get("init_lora_weights")).lower()
    if init.startswith(_MOVED) and any(kind == LINEAR for _, kind in tables):
        variants.append(f"init_lora_weights {init!r}, which changed the head's own weights")
    if variants:
        raise AdapterError(
            "unsupported variant of LoRA",
            found=", ".join(variants),
            expected="plain LoRA",
            hint="merge it with PEFT, and use embedsurgery extract on the result",
        )


def _find_twins(files: PeftFiles, found: list[tuple[str, str]]) -> dict[str, str]:
    """Return module -> the first module with the same matrices, where PEFT tied the adapters of a tied table.

    PEFT's forward applies the update once at each module, but its merge adds it to the shared table once per module.
    Merged once, the model computes what it did in training.
    """
    first = next((module for module, kind in found if kind == EMBEDDING), None)
    pair = None if first is None else find_pair(files.tensors, first, EMBEDDING)
    if first is None or pair is None:
        return {}
    factor = _factor(files.config, first, pair[1])
    same = (m for m, kind in found if m != first and kind != TOKENS and find_pair(files.tensors, m, kind) == pair)
    return {module: first for module in same if _factor(files.config, module, pair[1]) == factor}


def _factor(config: Mapping[str, Any], module: str, right: RawArray) -> float:
    alpha = _of_module(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    return scaling(float(alpha), right.shape[0], rslora=bool(config.get("use_rslora")))


def _find_tables(tensors: Mapping[str, RawArray]) -> list[tuple[str, str]]:
    """Find the modules of tables that a file updates, each with its kind."""
    found = []
    for name in tensors:
        module = name.removeprefix(PREFIX)
        if module.endswith(DELTA):
            found.append((module.removesuffix(DELTA), TOKENS))
        elif module.endswith(".lora_embedding_A"):
            found.append((module.removesuffix(".lora_embedding_A"), EMBEDDING))
        elif module.endswith(".lora_A.weight") and ends(module.removesuffix(".lora_A.weight"), HEADS):
            found.append((module.removesuffix(".lora_A.weight"), LINEAR))
    return found


def _token_indices(value: Any, module: str, delta: RawArray) -> tuple[int, ...]:
    """Return the rows of a token adapter: PEFT writes a list for the input embedding, or one per module name."""
    if isinstance(value, Mapping):
        value = next((v for k, v in value.items() if module == k or module.endswith(f".{k}")), None)
    valid = isinstance(value, list) and all(type(i) is int and i >= 0 for i in value) and len(set(value)) == len(value)
    if not valid or len(delta.shape) != 2 or delta.shape[0] != len(value) or delta.dtype not in EDITABLE:
        raise AdapterError(
            "invalid indices of token rows",
            where=module,
            found=repr(value)[:80],
            expected=f"trainable_token_indices for {delta!r}",
        )
    return tuple(value)


def _of_module(patterns: Any, module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of a module's name, as PEFT's ``get_pattern_key``."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _module_of(name: str) -> str:
    module = name.removeprefix(PREFIX)
    for suffix in (".lora_A.weight", ".lora_B.weight", ".base_layer.weight", ".weight", ".bias"):
        if module.endswith(suffix):
            return module.removesuffix(suffix)
    return module

"""PEFT's files of LoRA on tables: ``lora_embedding_A/B`` of embeddings, ``lora_A/B`` of heads, rows of token adapters.

https://huggingface.co/docs/peft/package_reference/lora. This file writes them and reads them back with embedsurgery's
manifest; ``reading.py`` reads those that PEFT wrote.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from embedsurgery.adapters.adapter import Adapter, PeftFiles
from embedsurgery.errors import AdapterError
from embedsurgery.graph import Table
from embedsurgery.tensors.raw import EDITABLE, RawArray

if TYPE_CHECKING:
    pass

LEFT = ".left"
"""Suffix of the name of the matrix (V, r) in an adapter."""

EMBEDDING, LINEAR, TOKENS = "embedding", "linear", "tokens"
"""How PEFT adapts a table."""

PREFIX = "base_model.model."
DELTA = ".token_adapter.trainable_tokens_delta"
PAIRS = {EMBEDDING: (".lora_embedding_A", ".lora_embedding_B"), LINEAR: (".lora_B.weight", ".lora_A.weight")}
"""Kind -> suffixes of ``left`` and ``right`` in PEFT's files. For an embedding both are stored transposed."""


def kind_of(table: Table) -> str:
    """Return how PEFT adapts a table: as an embedding if it is an input table, otherwise as a linear layer."""
    return EMBEDDING if "input" in table.roles else LINEAR


def to_peft(adapter: Adapter) -> PeftFiles:
    """Return PEFT's config and tensors of an adapter."""
    settings, tensors = adapter.manifest.config, {}
    ranks, alphas, tokens, modules, tied = {}, {}, {}, [], False
    for record in adapter.manifest.tables:
        module, how = record.name.rpartition(".")[0], settings["tables"][record.name]
        if how["kind"] == TOKENS:
            tensors[f"{PREFIX}{module}{DELTA}"] = adapter.raw[record.name]
            tokens[module] = list(record.indices)
            continue
        left, right = adapter.raw[record.name + LEFT], adapter.raw[record.name]
        for target, kind in ((module, how["kind"]), *how.get("twins", ())):
            for suffix, matrix in zip(PAIRS[kind], (left, right), strict=True):
                tensors[PREFIX + target + suffix] = _transpose(matrix) if kind == EMBEDDING else matrix
        tied = tied or bool(how.get("twins"))
        rank = right.shape[0]
        modules.append(module)
        ranks[module] = rank
        alphas[module] = how["scaling"] * (math.sqrt(rank) if settings.get("use_rslora") else rank)
    first = modules[0] if modules else None
    rank, alpha = (ranks[first], alphas[first]) if first else (settings.get("r", 8), settings.get("lora_alpha", 8))
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
        "use_rslora": bool(settings.get("use_rslora")),
    }
    return PeftFiles(config, tensors)


def from_files(files: PeftFiles, adapter: Adapter) -> Adapter:
    """Add the tensors of its files to an adapter that has embedsurgery's manifest.

    Raises:
        AdapterError: The tensors do not match the manifest.
    """
    raw: dict[str, RawArray] = {}
    tables = adapter.manifest.config.get("tables")
    for record in adapter.manifest.tables:
        module = record.name.rpartition(".")[0]
        how = tables.get(record.name) if isinstance(tables, Mapping) else None
        if not isinstance(how, Mapping) or how.get("kind") not in (EMBEDDING, LINEAR, TOKENS) or record.shape is None:
            raise AdapterError("the manifest lacks the settings of a table", where=record.name)
        if how["kind"] == TOKENS:
            raw[record.name] = _take_tensor(files, f"{PREFIX}{module}{DELTA}", (len(record.indices), record.shape[1]))
            continue
        pair = find_pair(files.tensors, module, str(how["kind"]))
        if pair is None or (pair[0].shape[0], pair[1].shape[1]) != record.shape:
            raise AdapterError(
                "the matrices of a table are missing or have a wrong shape",
                where=record.name,
                expected=list(record.shape),
                found=", ".join(list(files.tensors)[:6]),
            )
        raw[record.name + LEFT], raw[record.name] = pair
    return replace(adapter, raw=raw)


def find_pair(tensors: Mapping[str, RawArray], module: str, kind: str) -> tuple[RawArray, RawArray] | None:
    """Return ``left`` (V, r) and ``right`` (r, D) in fp32 or fp64; None if one is missing or they do not fit."""
    stored = [tensors.get(PREFIX + module + suffix) for suffix in PAIRS[kind]]
    pair = [one for one in stored if one is not None and len(one.shape) == 2 and one.dtype in EDITABLE]
    if len(pair) != 2:
        return None
    left, right = (_transpose(one) if kind == EMBEDDING else one for one in pair)
    wide = "F64" if "F64" in (left.dtype, right.dtype) else "F32"
    return (left.to(wide), right.to(wide)) if left.shape[1] == right.shape[0] else None


def _transpose(matrix: RawArray) -> RawArray:
    bits = np.ascontiguousarray(matrix.bits.T)
    return RawArray(matrix.dtype, matrix.shape[::-1], bits.tobytes())


def _take_tensor(files: PeftFiles, name: str, shape: tuple[int, int]) -> RawArray:
    found = files.tensors.get(name)
    if found is None or found.shape != shape or found.dtype not in EDITABLE:
        raise AdapterError(
            "a tensor is missing or has a wrong shape",
            where=name,
            expected=list(shape),
            found=None if found is None else f"{found!r}",
        )
    return found

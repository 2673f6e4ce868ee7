"""Soft prompts in PEFT's file format: one tensor, and a config that tells which submodule its rows belong to.

https://huggingface.co/docs/peft/package_reference/prompt_tuning and, for P-tuning, whose encoder PEFT runs on saving,
https://huggingface.co/docs/peft/package_reference/p_tuning
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from embedsurgery.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter, PeftFiles
from embedsurgery.adapters.manifest import MAIN_INPUT, Manifest, TableRecord
from embedsurgery.errors import AdapterError, ConfigError, UnsupportedError
from embedsurgery.surgeries.soft_prompt.config import NAME, TENSOR, UNUSED, SoftPromptConfig, submodules_of
from embedsurgery.surgeries.surgery import Surgery
from embedsurgery.tensors.raw import EDITABLE, RawArray

PEFT_TYPE = "PROMPT_TUNING"
P_TUNING = "P_TUNING"
NO_ROWS = {
    "PREFIX_TUNING": "keys and values for each layer, not rows of an embedding",
    "CARTRIDGE": "keys and values for each layer, not rows of an embedding",
    "ADAPTION_PROMPT": "prompts inside the attention of some layers, not rows of an embedding",
    "MULTITASK_PROMPT_TUNING": "a prompt for each task, made of factors",
    "CPT": "a prompt that its own loss trains, with a projection",
}
"""``peft_type`` of PEFT's other prompt methods -> what they store. None of it is a soft prompt; all are refused."""

HEADS = "base_model."
"""Prefix of tensors that PEFT saves beside a prompt: the heads that it trains with it for classification."""

CLASSIFIERS, ANSWERS = ("classifier", "score"), ("qa_outputs",)
"""Suffixes of these heads' module names, for classes and for answers."""

_SEQ2SEQ = "SEQ_2_SEQ_LM"
_INITS = {"random": "RANDOM", "sample_vocab": "SAMPLE_VOCAB", "text": "TEXT"}
_KEPT = ("token_dim", "num_layers", "num_attention_heads", "task_type", "tokenizer_kwargs", "auto_mapping")


def prompt_to_peft(adapter: Adapter) -> PeftFiles:
    """Return PEFT's config and tensors.

    PEFT inserts a prompt before the encoder's input only, also if the file has rows for the decoder.
    """
    kept = adapter.manifest.config
    rows = adapter.raw[TENSOR]
    if UNUSED in adapter.raw:
        rows = _join_rows(rows, adapter.raw[UNUSED])
    count = int(kept["num_virtual_tokens"])
    tokenizer = kept.get("tokenizer_name_or_path")
    init = str(kept.get("init") or "random")
    is_text = init == "text" and bool(tokenizer)  # PEFT refuses this init without a tokenizer's name
    config: dict[str, Any] = {
        "auto_mapping": kept.get("auto_mapping"),
        "base_model_name_or_path": adapter.manifest.base_model,
        "inference_mode": True,
        "num_attention_heads": kept.get("num_attention_heads"),
        "num_layers": kept.get("num_layers"),
        "num_transformer_submodules": rows.shape[0] // count,
        "num_virtual_tokens": count,
        "peft_type": PEFT_TYPE,
        "prompt_tuning_init": _INITS[init] if is_text or init != "text" else _INITS["random"],
        "prompt_tuning_init_text": kept.get("init_text") if is_text else None,
        "revision": adapter.manifest.revision,
        "task_type": kept.get("task_type"),
        "token_dim": kept.get("token_dim") or rows.shape[1],
        "tokenizer_kwargs": kept.get("tokenizer_kwargs") if is_text else None,
        "tokenizer_name_or_path": tokenizer,
    }
    return PeftFiles(config, {TENSOR: rows} | {name: raw for name, raw in adapter.raw.items() if is_head(name)})


def heads_for(task: str, heads: Mapping[str, RawArray]) -> dict[str, RawArray]:
    """Return the heads that PEFT saves beside a prompt for a task, under its names. It cannot load the file without."""
    ends = {"SEQ_CLS": CLASSIFIERS, "TOKEN_CLS": CLASSIFIERS, "QUESTION_ANS": ANSWERS}.get(task, ())
    return {
        HEADS + name: values
        for name, values in heads.items()
        if any(part.endswith(ends) for part in name.split(".")[:-1])
    }


def is_head(name: str) -> bool:
    """Whether an adapter's tensor belongs to a head that was trained with the prompt, by PEFT's name for it."""
    return name.startswith(HEADS)


def prompt_from_files(files: PeftFiles, adapter: Adapter) -> Adapter:
    """Return the adapter with the tensors of its files.

    Raises:
        AdapterError: The files do not fit the manifest.
    """
    kept = adapter.manifest.config
    count = _check_count(kept, "manifest")
    try:
        names = submodules_of(kept)
    except ConfigError as error:
        raise AdapterError("invalid submodules in the manifest", where=WEIGHTS_NAME, found=error.found) from error
    if files.config.get("num_virtual_tokens") != count:
        raise AdapterError(
            "num_virtual_tokens differs from the manifest",
            where=CONFIG_NAME,
            expected=count,
            found=files.config.get("num_virtual_tokens"),
            hint="the config was edited: load the original",
        )
    rows = _read_rows(files, count)
    used = count * len(names)
    width = adapter.manifest.tables[0].shape[1] if adapter.manifest.tables[0].shape else rows.shape[1]
    if rows.shape[0] < used or rows.shape[1] != width:
        raise AdapterError(
            "the tensor does not fit the manifest", where=TENSOR, expected=f"({used}, {width})", found=rows.shape
        )
    return replace(adapter, raw=_split_tensors(files, rows, used))


def prompt_from_peft(files: PeftFiles, surgery: Surgery) -> Adapter:
    """Return an adapter from files of PEFT's prompt tuning or P-tuning.

    Raises:
        UnsupportedError: Files of another PEFT method, which does not train rows.
        AdapterError: The files contradict themselves.
    """
    config = files.config
    kind = config.get("peft_type")
    if kind in NO_ROWS:
        raise UnsupportedError(
            "this PEFT method cannot be a soft prompt",
            where=CONFIG_NAME,
            expected=f"{PEFT_TYPE} or {P_TUNING}",
            found=f"{kind}: {NO_ROWS[str(kind)]}",
            hint="train a soft prompt, or use the adapter with PEFT",
        )
    count = _check_count(config, CONFIG_NAME)
    rows = _read_rows(files, count).to("F32")
    is_seq2seq = config.get("task_type") == _SEQ2SEQ
    inits = {theirs: name for name, theirs in _INITS.items()}
    kept = SoftPromptConfig(count).to_json() | {name: config.get(name) for name in _KEPT}
    kept |= {
        "submodules": ["encoder" if is_seq2seq else "model"],
        "init": inits.get(str(config.get("prompt_tuning_init")), "random"),
        "init_text": config.get("prompt_tuning_init_text"),
        "tokenizer_name_or_path": config.get("tokenizer_name_or_path"),
    }
    manifest = Manifest(
        NAME,
        surgery.version,
        kept,
        (TableRecord(MAIN_INPUT, (), ()),),
        config.get("base_model_name_or_path"),
        config.get("revision"),
    )
    return Adapter(manifest, _split_tensors(files, rows, count), surgery)


def _split_tensors(files: PeftFiles, rows: RawArray, used: int) -> dict[str, RawArray]:
    raw = {TENSOR: rows.take(range(used)).to("F32")}
    raw |= {name: value for name, value in files.tensors.items() if is_head(name)}
    if rows.shape[0] > used:
        raw[UNUSED] = rows.take(range(used, rows.shape[0])).to("F32")
    return raw


def _check_count(config: Any, where: str) -> int:
    count = config.get("num_virtual_tokens")
    if type(count) is not int or count < 1:
        raise AdapterError(
            "num_virtual_tokens must be a positive integer",
            where=where,
            expected="1 or more",
            found=repr(count)[:40],
            hint=f"peft_type is {config.get('peft_type')!r}",
        )
    return count


def _read_rows(files: PeftFiles, count: int) -> RawArray:
    others = [name for name in files.tensors if name != TENSOR and not is_head(name)]
    if others:
        raise AdapterError(
            "the file must hold a soft prompt and no other tensors",
            where=WEIGHTS_NAME,
            expected=TENSOR,
            found=", ".join(others[:4]),
        )
    rows = files.tensors.get(TENSOR)
    if rows is None:
        raise AdapterError("the file holds no soft prompt", where=WEIGHTS_NAME, expected=TENSOR, found="no tensor")
    if len(rows.shape) != 2 or rows.dtype not in EDITABLE or rows.shape[0] == 0 or rows.shape[0] % count:
        raise AdapterError(
            "the soft prompt has the wrong shape or dtype",
            where=TENSOR,
            found=f"{rows.shape} of {rows.dtype}",
            expected=f"(a multiple of {count}, D) floats",
        )
    return rows


def _join_rows(first: RawArray, second: RawArray) -> RawArray:
    shape = (first.shape[0] + second.shape[0], first.shape[1])
    return RawArray(first.dtype, shape, first.data + second.data)

"""Soft prompts in PEFT's files: one tensor, and a config that says how its rows are shared out.

https://huggingface.co/docs/peft/package_reference/prompt_tuning and, for files whose encoder PEFT stores evaluated,
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
    "PREFIX_TUNING": "keys and values for each layer, which are no rows of an embedding",
    "CARTRIDGE": "keys and values for each layer, which are no rows of an embedding",
    "ADAPTION_PROMPT": "prompts inside the attention of some layers, which are no rows of an embedding",
    "MULTITASK_PROMPT_TUNING": "a prompt for each task, made of factors",
    "CPT": "a prompt that its own loss trains, with a projection",
}
"""What PEFT's other prompt methods store, by ``peft_type``: none can be a soft prompt, and each is refused by name."""

HEADS = "base_model."
"""How names of tensors begin that PEFT saves beside a prompt: heads, which it trains along for classification."""

CLASSIFIERS, ANSWERS = ("classifier", "score"), ("qa_outputs",)
"""How the names of such heads' modules end."""

_SEQ2SEQ = "SEQ_2_SEQ_LM"
_INITS = {"random": "RANDOM", "sample_vocab": "SAMPLE_VOCAB", "text": "TEXT"}
_KEPT = ("token_dim", "num_layers", "num_attention_heads", "task_type", "tokenizer_kwargs", "auto_mapping")


def to_peft(adapter: Adapter) -> PeftFiles:
    """PEFT's config and tensor.

    PEFT puts a prompt before the encoder's input alone, whatever a file holds for the decoder.
    """
    kept = adapter.manifest.config
    rows = adapter.raw[TENSOR]
    if UNUSED in adapter.raw:
        rows = _joined(rows, adapter.raw[UNUSED])
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
    """A model's heads that PEFT saves beside a prompt for a task, and cannot load it without, under its names."""
    ends = {"SEQ_CLS": CLASSIFIERS, "TOKEN_CLS": CLASSIFIERS, "QUESTION_ANS": ANSWERS}.get(task, ())
    return {
        HEADS + name: values
        for name, values in heads.items()
        if any(part.endswith(ends) for part in name.split(".")[:-1])
    }


def is_head(name: str) -> bool:
    """Whether a tensor of an adapter is of a head that was trained along, under the name that PEFT gave it."""
    return name.startswith(HEADS)


def from_files(files: PeftFiles, adapter: Adapter) -> Adapter:
    """The rows that the manifest speaks of."""
    kept = adapter.manifest.config
    count = _count(kept, "manifest")
    try:
        names = submodules_of(kept)
    except ConfigError as error:
        raise AdapterError("the manifest's submodules are none", where=WEIGHTS_NAME, found=error.found) from error
    if files.config.get("num_virtual_tokens") != count:
        raise AdapterError(
            "num_virtual_tokens is not that of the manifest",
            where=CONFIG_NAME,
            expected=count,
            found=files.config.get("num_virtual_tokens"),
            hint="the config was edited: load the original",
        )
    rows = _rows(files, count)
    used = count * len(names)
    width = adapter.manifest.tables[0].shape[1] if adapter.manifest.tables[0].shape else rows.shape[1]
    if rows.shape[0] < used or rows.shape[1] != width:
        raise AdapterError(
            "the tensor is not the manifest's", where=TENSOR, expected=f"({used}, {width})", found=rows.shape
        )
    return replace(adapter, raw=_shared_out(files, rows, used))


def from_peft(files: PeftFiles, surgery: Surgery) -> Adapter:
    """A file of PEFT's prompt tuning or P-tuning, whose encoder PEFT has run when it saves.

    Raises:
        UnsupportedError: A method of PEFT's whose tensors are no rows.
    """
    config = files.config
    kind = config.get("peft_type")
    if kind in NO_ROWS:
        raise UnsupportedError(
            f"an adapter of PEFT's {kind} cannot be a soft prompt",
            where=CONFIG_NAME,
            expected=f"{PEFT_TYPE} or {P_TUNING}",
            found=NO_ROWS[str(kind)],
            hint="train a soft prompt, or use the adapter with PEFT",
        )
    count = _count(config, CONFIG_NAME)
    rows = _rows(files, count).to("F32")
    is_seq2seq = config.get("task_type") == _SEQ2SEQ
    inits = {name: ours for ours, name in _INITS.items()}
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
    return Adapter(manifest, _shared_out(files, rows, count), surgery)


def _shared_out(files: PeftFiles, rows: RawArray, used: int) -> dict[str, RawArray]:
    raw = {TENSOR: rows.take(range(used)).to("F32")}
    raw |= {name: value for name, value in files.tensors.items() if is_head(name)}
    if rows.shape[0] > used:
        raw[UNUSED] = rows.take(range(used, rows.shape[0])).to("F32")
    return raw


def _count(config: Any, where: str) -> int:
    count = config.get("num_virtual_tokens")
    if type(count) is not int or count < 1:
        raise AdapterError(
            "num_virtual_tokens is no count",
            where=where,
            expected="1 or more",
            found=repr(count)[:40],
            hint=f"peft_type is {config.get('peft_type')!r}",
        )
    return count


def _rows(files: PeftFiles, count: int) -> RawArray:
    strangers = [name for name in files.tensors if name != TENSOR and not is_head(name)]
    if strangers:
        raise AdapterError(
            "tensors that are no soft prompt", where=WEIGHTS_NAME, expected=TENSOR, found=", ".join(strangers[:4])
        )
    rows = files.tensors.get(TENSOR)
    if rows is None:
        raise AdapterError("no prompt in this file", where=WEIGHTS_NAME, expected=TENSOR, found="no tensor")
    if len(rows.shape) != 2 or rows.dtype not in EDITABLE or rows.shape[0] == 0 or rows.shape[0] % count:
        raise AdapterError(
            "a prompt of the wrong shape or dtype",
            where=TENSOR,
            found=f"{rows.shape} of {rows.dtype}",
            expected=f"(a multiple of {count}, D) floats",
        )
    return rows


def _joined(first: RawArray, second: RawArray) -> RawArray:
    shape = (first.shape[0] + second.shape[0], first.shape[1])
    return RawArray(first.dtype, shape, first.data + second.data)

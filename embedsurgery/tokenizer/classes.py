"""Knows the tokenizer classes of transformers that replace the post-processor of ``tokenizer.json`` by their own.

A prefix is in the file's post-processor, so such a class would drop it. In transformers 5.23 the classes below set
theirs after loading (``models/*/tokenization_*.py``), and in transformers 4 some others do (``update_post_processor``).
``PreTrainedTokenizerFast`` keeps the file's in both. So ``tokenizer_config.json`` gets that class instead, and with it
the settings that the other class would have added: padding side, input names and special tokens. ``patching.py`` and
``live.py`` use this file when they add a prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from embedsurgery.errors import UnsupportedError

PLAIN_CLASS = "PreTrainedTokenizerFast"
"""The class that loads ``tokenizer.json`` unchanged, in transformers 4 and 5."""

_PLAIN_CLASSES = (PLAIN_CLASS, "PreTrainedTokenizer", "TokenizersBackend")
PROCESSOR_FLAGS = ("add_bos_token", "add_eos_token")
"""Keys of ``tokenizer_config.json`` for which transformers 4 rebuilds the post-processor; 5 ignores them."""

_IDS_AND_MASK = ("input_ids", "attention_mask")
_IDS_TYPES_MASK = ("input_ids", "token_type_ids", "attention_mask")
_IDS_MASK_TYPES = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class _ClassDefaults:
    """Settings that a class adds without a config: role -> text of its special tokens, input names, padding side."""

    roles: Mapping[str, str] = field(default_factory=dict)
    inputs: tuple[str, ...] = _IDS_AND_MASK
    side: str = "right"


def _roles(**texts: str) -> dict[str, str]:
    return {f"{role}_token": text for role, text in texts.items()}


_BERT = _roles(unk="[UNK]", sep="[SEP]", pad="[PAD]", cls="[CLS]", mask="[MASK]")
_ROBERTA = _roles(bos="<s>", eos="</s>", sep="</s>", cls="<s>", unk="<unk>", pad="<pad>", mask="<mask>")
_T5 = _roles(eos="</s>", unk="<unk>", pad="<pad>")
_LLAMA = _roles(unk="<unk>", bos="<s>", eos="</s>")
_END = "<|endoftext|>"

_CLASSES: Mapping[str, _ClassDefaults] = {
    "Bert": _ClassDefaults(_BERT, _IDS_TYPES_MASK),
    **dict.fromkeys(("Electra", "Lxmert", "MobileBert"), _ClassDefaults(_BERT, _IDS_TYPES_MASK)),
    "DistilBert": _ClassDefaults(_BERT),
    "RoFormer": _ClassDefaults(_BERT),
    "BigBird": _ClassDefaults(
        _roles(unk="<unk>", bos="<s>", eos="</s>", pad="<pad>", sep="[SEP]", mask="[MASK]", cls="[CLS]")
    ),
    "Camembert": _ClassDefaults(_ROBERTA),
    "CLIP": _ClassDefaults(_roles(unk=_END, bos="<|startoftext|>", eos=_END, pad=_END)),
    "CodeLlama": _ClassDefaults(_LLAMA, side="left"),
    "Cohere": _ClassDefaults(
        _roles(
            unk="<UNK>",
            bos="<BOS_TOKEN>",
            eos="<|END_OF_TURN_TOKEN|>",
            pad="<PAD>",
            cls="<CLS>",
            sep="<SEP>",
            mask="<MASK_TOKEN>",
        ),
        side="left",
    ),
    "Deberta": _ClassDefaults({**_BERT, **_roles(bos="[CLS]", eos="[SEP]")}, _IDS_MASK_TYPES),
    "DebertaV2": _ClassDefaults({**_BERT, **_roles(bos="[CLS]", eos="[SEP]")}, _IDS_MASK_TYPES),
    "Esmc": _ClassDefaults(_roles(unk="<unk>", cls="<cls>", pad="<pad>", mask="<mask>", eos="<eos>")),
    "Funnel": _ClassDefaults(
        _roles(unk="<unk>", sep="<sep>", pad="<pad>", cls="<cls>", mask="<mask>", bos="<s>", eos="</s>")
    ),
    "Gemma": _ClassDefaults(_roles(unk="<unk>", bos="<bos>", eos="<eos>", pad="<pad>", mask="<mask>"), side="left"),
    "GPTNeoX": _ClassDefaults(_roles(unk=_END, bos=_END, eos=_END, pad="<|padding|>")),
    "Herbert": _ClassDefaults(_roles(cls="<s>", unk="<unk>", pad="<pad>", mask="<mask>", sep="</s>")),
    "Llama": _ClassDefaults(_LLAMA, side="left"),
    "MPNet": _ClassDefaults({**_ROBERTA, "unk_token": "[UNK]"}),
    "Pegasus": _ClassDefaults({**_T5, "mask_token": "<mask_2>"}),
    "RemBert": _ClassDefaults(
        _roles(bos="[CLS]", eos="[SEP]", unk="<unk>", sep="[SEP]", pad="<pad>", cls="[CLS]", mask="[MASK]")
    ),
    **dict.fromkeys(("Bart", "LED", "Longformer", "Mvp", "Roberta"), _ClassDefaults(_ROBERTA)),
    "T5": _ClassDefaults(_T5),
    "XGLM": _ClassDefaults(_roles(bos="<s>", eos="</s>", sep="</s>", cls="<s>", unk="<unk>", pad="<pad>")),
    "XLMRoberta": _ClassDefaults(_ROBERTA),
    "XLNet": _ClassDefaults(
        _roles(bos="<s>", eos="</s>", unk="<unk>", sep="<sep>", pad="<pad>", cls="<cls>", mask="<mask>"), side="left"
    ),
}
"""Classes that replace the post-processor, by their name without "Tokenizer"."""

DYNAMIC_CLASSES = (
    "Lasr",
    "LayoutLMv2",
    "LayoutLMv3",
    "LayoutXLM",
    "Luke",
    "MLuke",
    "MBart",
    "MBart50",
    "MarkupLM",
    "Nllb",
    "Nougat",
    "SeamlessM4T",
    "Splinter",
    "Udop",
    "Whisper",
)
"""Classes that set their post-processor at run time, or that `PLAIN_CLASS` cannot replace."""

_CLASS_OF_MODEL_TYPE = {
    "albert": "Albert",
    "bert": "Bert",
    "camembert": "Camembert",
    "clip": "CLIP",
    "deberta": "Deberta",
    "deberta-v2": "DebertaV2",
    "distilbert": "DistilBert",
    "electra": "Electra",
    "gemma": "Gemma",
    "gpt_neox": "GPTNeoX",
    "llama": "Llama",
    "mpnet": "MPNet",
    "pegasus": "Pegasus",
    "roberta": "Roberta",
    "t5": "T5",
    "xlm-roberta": "XLMRoberta",
}
"""``model_type`` -> class of a tokenizer whose config does not name one."""


def short_name(name: str) -> str:
    """Return a class's name without "Tokenizer" and "Fast"."""
    return name.removesuffix("Fast").removesuffix("Tokenizer")


def replaces_post_processor(name: str) -> bool:
    """Whether a class of transformers, given by its name, replaces the file's post-processor."""
    return short_name(name) in _CLASSES or short_name(name) in DYNAMIC_CLASSES


def dynamic_class_error(name: str, where: object) -> UnsupportedError:
    """Return the error for a class that sets its post-processor at run time."""
    return UnsupportedError(
        "this tokenizer sets its post-processor at run time, so a prefix would be lost",
        where=where,
        found=name,
        hint="bake without a prefix and write the markers into the text, or add them to the chat template only",
    )


def use_plain_class(
    body: Mapping[str, Any], special: Mapping[str, Any], texts: Mapping[str, int], model_type: str | None, where: object
) -> dict[str, Any]:
    """Return a ``tokenizer_config.json`` with which transformers uses the post-processor of ``tokenizer.json``.

    Args:
        body: Content of ``tokenizer_config.json``; empty without that file.
        special: Content of ``special_tokens_map.json``; empty without that file.
        texts: Text -> id of the tokenizer's tokens.
        model_type: The ``model_type`` of the model's config.
        where: Path of the checkpoint, for messages.

    Raises:
        UnsupportedError: The class sets its post-processor at run time.
    """
    after = {key: value for key, value in body.items() if key not in PROCESSOR_FLAGS}
    declared = body.get("tokenizer_class")
    name = declared if isinstance(declared, str) else _CLASS_OF_MODEL_TYPE.get(str(model_type), "")
    if name in _PLAIN_CLASSES:
        return after
    short = short_name(name)
    if short in DYNAMIC_CLASSES:
        raise dynamic_class_error(name, where)
    if short not in _CLASSES and isinstance(declared, str):
        return after
    # A declared class that is not listed keeps the file's post-processor. Without a declared class, transformers would
    # choose one by the model, so the plain class is declared then too.
    defaults = _CLASSES.get(short, _ClassDefaults())
    roles = {role: text for role, text in defaults.roles.items() if text in texts and role not in special}
    sides = {"padding_side": defaults.side} if defaults.side != "right" else {}
    added = {"model_input_names": list(defaults.inputs), **sides, **roles}
    return {
        **after,
        **{key: value for key, value in added.items() if after.get(key) is None},
        "tokenizer_class": PLAIN_CLASS,
    }

"""Classes of transformers' tokenizers that put a post-processor of their own in the place of the file's.

A tokenizer whose file puts tokens before every text must be loaded as the file has it. transformers 5.23 lets these
classes set theirs after loading (``models/*/tokenization_*.py``), and transformers 4 some others
(``update_post_processor``); both take the file as it is for ``PreTrainedTokenizerFast``. So that class is named
instead, with what the other class would have set beside: the side of the padding, the names of the inputs, the roles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from embedsurgery.errors import UnsupportedError

PLAIN = "PreTrainedTokenizerFast"
"""The class that takes ``tokenizer.json`` as it is, in transformers 4 and 5."""

_PLAIN = (PLAIN, "PreTrainedTokenizer", "TokenizersBackend")
FLAGS = ("add_bos_token", "add_eos_token")
"""Keys of ``tokenizer_config.json`` for which transformers 4 makes the post-processor anew; 5 passes over them."""

_TWO = ("input_ids", "attention_mask")
_THREE = ("input_ids", "token_type_ids", "attention_mask")
_LAST = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class _Class:
    """What a class sets by itself: names of the inputs, the side of the padding, role -> text."""

    roles: Mapping[str, str] = field(default_factory=dict)
    inputs: tuple[str, ...] = _TWO
    side: str = "right"


def _roles(**texts: str) -> dict[str, str]:
    return {f"{role}_token": text for role, text in texts.items()}


_BERT = _roles(unk="[UNK]", sep="[SEP]", pad="[PAD]", cls="[CLS]", mask="[MASK]")
_ROBERTA = _roles(bos="<s>", eos="</s>", sep="</s>", cls="<s>", unk="<unk>", pad="<pad>", mask="<mask>")
_T5 = _roles(eos="</s>", unk="<unk>", pad="<pad>")
_LLAMA = _roles(unk="<unk>", bos="<s>", eos="</s>")
_END = "<|endoftext|>"

_CLASSES: Mapping[str, _Class] = {
    "Bert": _Class(_BERT, _THREE),
    **dict.fromkeys(("Electra", "Lxmert", "MobileBert"), _Class(_BERT, _THREE)),
    "DistilBert": _Class(_BERT),
    "RoFormer": _Class(_BERT),
    "BigBird": _Class(_roles(unk="<unk>", bos="<s>", eos="</s>", pad="<pad>", sep="[SEP]", mask="[MASK]", cls="[CLS]")),
    "Camembert": _Class(_ROBERTA),
    "CLIP": _Class(_roles(unk=_END, bos="<|startoftext|>", eos=_END, pad=_END)),
    "CodeLlama": _Class(_LLAMA, side="left"),
    "Cohere": _Class(
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
    "Deberta": _Class({**_BERT, **_roles(bos="[CLS]", eos="[SEP]")}, _LAST),
    "DebertaV2": _Class({**_BERT, **_roles(bos="[CLS]", eos="[SEP]")}, _LAST),
    "Esmc": _Class(_roles(unk="<unk>", cls="<cls>", pad="<pad>", mask="<mask>", eos="<eos>")),
    "Funnel": _Class(_roles(unk="<unk>", sep="<sep>", pad="<pad>", cls="<cls>", mask="<mask>", bos="<s>", eos="</s>")),
    "Gemma": _Class(_roles(unk="<unk>", bos="<bos>", eos="<eos>", pad="<pad>", mask="<mask>"), side="left"),
    "GPTNeoX": _Class(_roles(unk=_END, bos=_END, eos=_END, pad="<|padding|>")),
    "Herbert": _Class(_roles(cls="<s>", unk="<unk>", pad="<pad>", mask="<mask>", sep="</s>")),
    "Llama": _Class(_LLAMA, side="left"),
    "MPNet": _Class({**_ROBERTA, "unk_token": "[UNK]"}),
    "Pegasus": _Class({**_T5, "mask_token": "<mask_2>"}),
    "RemBert": _Class(
        _roles(bos="[CLS]", eos="[SEP]", unk="<unk>", sep="[SEP]", pad="<pad>", cls="[CLS]", mask="[MASK]")
    ),
    **dict.fromkeys(("Bart", "LED", "Longformer", "Mvp", "Roberta"), _Class(_ROBERTA)),
    "T5": _Class(_T5),
    "XGLM": _Class(_roles(bos="<s>", eos="</s>", sep="</s>", cls="<s>", unk="<unk>", pad="<pad>")),
    "XLMRoberta": _Class(_ROBERTA),
    "XLNet": _Class(
        _roles(bos="<s>", eos="</s>", unk="<unk>", sep="<sep>", pad="<pad>", cls="<cls>", mask="<mask>"), side="left"
    ),
}
"""By the class's name without "Tokenizer"."""

AS_THEY_RUN = (
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
"""Classes that set their post-processor as they run, or that no plain class can stand for."""

_BY_MODEL = {
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
"""Class of a tokenizer whose config does not name one, by ``model_type``."""


def short_name(name: str) -> str:
    """A class's name without "Tokenizer" and "Fast"."""
    return name.removesuffix("Fast").removesuffix("Tokenizer")


def rebuilds(name: str) -> bool:
    """Whether a class of transformers, by its name, does not take the file's post-processor."""
    return short_name(name) in _CLASSES or short_name(name) in AS_THEY_RUN


def as_it_runs(name: str, where: object) -> UnsupportedError:
    """What is to be said of a class that sets its post-processor as it runs."""
    return UnsupportedError(
        "this tokenizer sets its post-processor as it runs, so nothing put into it would stay",
        where=where,
        found=name,
        hint="bake without a prefix, and write the markers into the text, or put them into the chat template alone",
    )


def plain_config(
    body: Mapping[str, Any], special: Mapping[str, Any], texts: Mapping[str, int], model_type: str | None, where: object
) -> dict[str, Any]:
    """A ``tokenizer_config.json`` with which the file's post-processor is the one that is used.

    Args:
        body: What it says; empty where there is no such file.
        special: What ``special_tokens_map.json`` says.
        texts: Text -> id of the tokenizer's tokens.
        model_type: Of the model's config.
        where: For messages.

    Raises:
        UnsupportedError: The class sets its post-processor as it runs.
    """
    after = {key: value for key, value in body.items() if key not in FLAGS}
    named = body.get("tokenizer_class")
    name = named if isinstance(named, str) else _BY_MODEL.get(str(model_type), "")
    if name in _PLAIN:
        return after
    short = short_name(name)
    if short in AS_THEY_RUN:
        raise as_it_runs(name, where)
    if short not in _CLASSES and isinstance(named, str):
        return after
    known = _CLASSES.get(short, _Class())
    roles = {role: text for role, text in known.roles.items() if text in texts and role not in special}
    sides = {"padding_side": known.side} if known.side != "right" else {}
    beside = {"model_input_names": list(known.inputs), **sides, **roles}
    return {
        **after,
        **{key: value for key, value in beside.items() if after.get(key) is None},
        "tokenizer_class": PLAIN,
    }

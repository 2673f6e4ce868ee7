"""What is known of architectures by name, and what a config says about its own architecture.

Most checkpoints need no entry here: ``from_names.py`` reads their names, shapes and bytes. An entry has what those do
not tell. Plugins add entries with the hook ``embedsurgery_layouts``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from embedsurgery.graph.config import TEXT_SECTIONS, TIE_FLAG

LANGUAGE_MODEL = re.compile(
    r"LMHead|DoubleHeads|MTModel|EncoderDecoderModel|GenerationDecoder|"
    r"For(CausalLM|MaskedLM|PreTraining|ConditionalGeneration|BlockDiffusion|\w*2Text|\w*2Seq|\w*ToText)"
)
"""Names of classes, in a config's ``architectures``, that project to the vocabulary."""

STACKS = ("encoder", "decoder", "text_encoder", "text_decoder")


@dataclass(frozen=True)
class Layout:
    """What the files of one architecture do not tell.

    Attributes:
        head: Module path, in the language model, of a head that is tied and not stored; "" if there is none.
        ties: {target: origin}: ends of module paths that share one table if the paths before them are equal. The target
            may be missing from the files.
        forced: Whether the model ties even if the config says that it does not.
    """

    head: str = "lm_head"
    ties: Mapping[str, str] = field(default_factory=lambda: {f"{s}.embed_tokens": "shared" for s in STACKS})
    forced: bool = False


ARCHITECTURES: Mapping[str, Layout] = {
    **dict.fromkeys(("canary", "moonshine", "moonshine_streaming", "whisper"), Layout(head="proj_out")),
    # T5 1.1's flag is False because its head is untied; encoder and decoder still share one table.
    **dict.fromkeys(("longt5", "mt5", "pop2piano", "t5", "udop", "umt5"), Layout(forced=True)),
    **dict.fromkeys(("biogpt", "trocr"), Layout(head="output_projection")),
    # Dia's head projects to audio codes. Perceiver's head is a function, not a module.
    **dict.fromkeys(("dia", "perceiver"), Layout(head="")),
    "bert-generation": Layout(head="lm_head.decoder"),
    "blt": Layout(ties={"model.local_encoder.embed_tokens": "lm_head"}),
    "diffusion_gemma": Layout(ties={"encoder.language_model.embed_tokens": "decoder.embed_tokens"}),
    "fsmt": Layout("model.decoder.output_projection", {"encoder.embed_tokens": "decoder.embed_tokens"}),
    "gpt_neox_japanese": Layout(head="embed_out"),
    "luke": Layout(ties={"entity_predictions.decoder": "luke.entity_embeddings.entity_embeddings"}),
    "pix2struct": Layout(head="decoder.lm_head"),
    "prophetnet": Layout(ties={f"{s}.word_embeddings": "word_embeddings" for s in ("encoder", "decoder")}),
    "rwkv": Layout(head="head"),
    "speecht5": Layout(head="text_decoder_postnet.lm_head"),
    "t5gemma": Layout(head="lm_head.out_proj"),
    "t5gemma2": Layout("lm_head.out_proj", {"decoder.embed_tokens": "encoder.embed_tokens"}),
}
"""Layouts of the architectures that need one, by ``model_type`` or class name, as in a config or its text section."""


def read_tie_flag(config: Mapping[str, Any] | None) -> bool | None:
    """Return whether a config says that the head is tied: ``tie_word_embeddings`` of the config and its text sections.

    None if they contradict each other or are missing. Before version 5, transformers left the flag out of the file when
    it was True, so a missing flag means True there.
    """
    if config is None:
        return None
    found = [section.get(TIE_FLAG) for section in _text_sections(config)]
    flags = {flag for flag in found if isinstance(flag, bool)}
    if flags:
        return flags.pop() if len(flags) == 1 else None
    version = re.match(r"\d+", str(config.get("transformers_version")))
    return True if version is None or int(version[0]) < 5 else None


def is_language_model(config: Mapping[str, Any] | None) -> bool:
    """Whether a class in the config's ``architectures`` projects to the vocabulary."""
    return any(LANGUAGE_MODEL.search(name) for name in _class_names(config or {}))


def layout_of(config: Mapping[str, Any] | None, architectures: Mapping[str, Layout]) -> Layout:
    """Return the layout of the config's class or ``model_type``, or of its text section's; else the default layout."""
    for section in _text_sections(config or {}):
        for key in (*_class_names(section), section.get("model_type")):
            if isinstance(key, str) and key in architectures:
                return architectures[key]
    return Layout()


def _class_names(config: Mapping[str, Any]) -> list[str]:
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _text_sections(config: Mapping[str, Any], depth: int = 3) -> Iterator[Mapping[str, Any]]:
    """Iterate a config and the nested configs of its language model, the outermost first."""
    yield config
    for key in TEXT_SECTIONS:
        if isinstance(config.get(key), Mapping) and depth:
            yield from _text_sections(config[key], depth - 1)

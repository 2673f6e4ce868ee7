"""What is known of architectures by name, and what a config says of its own: data, and the reading of it.

A checkpoint of an architecture that is not here reads by its names, shapes and bytes (``names.py``); an entry is for
what those do not tell. Packages bring more through the hook ``embedsurgery_layouts``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from embedsurgery.graph.config import TEXT_SECTIONS

LANGUAGE_MODEL = re.compile(
    r"LMHead|DoubleHeads|MTModel|EncoderDecoderModel|GenerationDecoder|"
    r"For(CausalLM|MaskedLM|PreTraining|ConditionalGeneration|BlockDiffusion|\w*2Text|\w*2Seq|\w*ToText)"
)
"""Classes in a config's ``architectures`` that project to the vocabulary."""

STACKS = ("encoder", "decoder", "text_encoder", "text_decoder")


@dataclass(frozen=True)
class Layout:
    """What the files of one architecture do not say by themselves.

    Attributes:
        head: Module path, in the language model, of a projection that is tied and not stored; "" if none is.
        ties: {target: origin}: ends of module paths, after one prefix, that are one table; the target need
            not be stored.
        forced: The model ties even where the config says that it does not.
    """

    head: str = "lm_head"
    ties: Mapping[str, str] = field(default_factory=lambda: {f"{s}.embed_tokens": "shared" for s in STACKS})
    forced: bool = False


ARCHITECTURES: Mapping[str, Layout] = {
    **dict.fromkeys(("canary", "moonshine", "moonshine_streaming", "whisper"), Layout(head="proj_out")),
    # T5 1.1's flag is False for its head, and says nothing of the shared table
    **dict.fromkeys(("longt5", "mt5", "pop2piano", "t5", "udop", "umt5"), Layout(forced=True)),
    **dict.fromkeys(("biogpt", "trocr"), Layout(head="output_projection")),
    **dict.fromkeys(("dia", "perceiver"), Layout(head="")),  # to audio codes; by a function, not a module
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
"""Architectures that need telling, by ``model_type`` or class name, as in a config or its text section."""


def tie_flag(config: Mapping[str, Any] | None) -> bool | None:
    """Whether a config says that the head is tied: ``tie_word_embeddings`` of it and of its text sections.

    None where they contradict each other or nothing is said. Transformers before 5 left the flag out of a
    config where it was True; since then its absence means nothing.
    """
    if config is None:
        return None
    found = [section.get("tie_word_embeddings") for section in _sections(config)]
    flags = {flag for flag in found if isinstance(flag, bool)}
    if flags:
        return flags.pop() if len(flags) == 1 else None
    version = re.match(r"\d+", str(config.get("transformers_version")))
    return True if version is None or int(version[0]) < 5 else None


def is_language_model(config: Mapping[str, Any] | None) -> bool:
    """Whether the config's architectures have a projection to the vocabulary."""
    return any(LANGUAGE_MODEL.search(name) for name in _classes(config or {}))


def _classes(config: Mapping[str, Any]) -> list[str]:
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _sections(config: Mapping[str, Any], depth: int = 3) -> Iterator[Mapping[str, Any]]:
    """A config and the configs of its language model, the outermost first."""
    yield config
    for key in TEXT_SECTIONS:
        if isinstance(config.get(key), Mapping) and depth:
            yield from _sections(config[key], depth - 1)


def layout_of(config: Mapping[str, Any] | None, architectures: Mapping[str, Layout]) -> Layout:
    """The entry of the config's class or ``model_type``, or of its text section's; else what holds for most."""
    for section in _sections(config or {}):
        for key in (*_classes(section), section.get("model_type")):
            if isinstance(key, str) and key in architectures:
                return architectures[key]
    return Layout()

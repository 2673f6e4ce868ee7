"""Textual inversion as a plugin of embedsurgery: learned embeddings of diffusion models, for CLIP text encoders.

Gal et al. 2022, https://arxiv.org/abs/2208.01618. ``files.py`` reads the files, ``pipeline.py`` changes pipelines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import embedsurgery as es
from embedsurgery.initializers import InitializerRecord
from embedsurgery.plugins.hookspecs import CommandRecord
from embedsurgery_textual_inversion.files import LearnedEmbedding as LearnedEmbedding
from embedsurgery_textual_inversion.files import expand_prompt as expand_prompt
from embedsurgery_textual_inversion.files import read_embedding as read_embedding
from embedsurgery_textual_inversion.initializer import Vector
from embedsurgery_textual_inversion.pipeline import attach_embedding as attach_embedding
from embedsurgery_textual_inversion.pipeline import bake as bake

embedsurgery_contract = 1


@es.hookimpl
def embedsurgery_initializers() -> Sequence[InitializerRecord]:
    """``textual-inversion:FILE#N``."""
    return [InitializerRecord("textual-inversion", Vector(), "FILE#N")]


@es.hookimpl
def embedsurgery_commands() -> Sequence[CommandRecord]:
    """``embedsurgery textual-inversion``."""

    def load() -> Any:
        from embedsurgery_textual_inversion.command import command

        return command

    return [CommandRecord("textual-inversion", "Bake learned embeddings into a diffusion pipeline.", load)]

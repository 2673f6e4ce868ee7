"""Token Distillation as a plugin of embedsurgery: an initialiser and a command.

Dobler, Elliott and de Melo, "Token Distillation: Attention-aware Input Embeddings For New Tokens", ICLR 2026,
https://arxiv.org/abs/2505.20133. The method is in ``method.py``; torch and transformers are imported when it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import embedsurgery as es
from embedsurgery.initializers import InitializerRecord
from embedsurgery.plugins.hookspecs import CommandRecord
from embedsurgery_distill.initializer import TokenDistillation as TokenDistillation
from embedsurgery_distill.initializer import teacher as teacher

embedsurgery_contract = 1


@es.hookimpl
def embedsurgery_initializers() -> Sequence[InitializerRecord]:
    """``distill:TEXTS`` inside `teacher`, or ``distill:MODEL::TEXTS`` anywhere."""
    return [InitializerRecord("distill", TokenDistillation(), "[MODEL::]TEXTS")]


@es.hookimpl
def embedsurgery_commands() -> Sequence[CommandRecord]:
    """``embedsurgery distill``."""

    def load() -> Any:
        from embedsurgery_distill.command import command

        return command

    return [CommandRecord("distill", "Learn the rows of new tokens from texts, as an adapter.", load)]


def distill(*arguments: Any, **options: Any) -> Any:
    """See `embedsurgery_distill.method.distill`."""
    from embedsurgery_distill.method import distill

    return distill(*arguments, **options)

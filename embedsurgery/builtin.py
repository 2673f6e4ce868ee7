"""The built-in surgeries, registered through the same hook as a plugin's."""

from __future__ import annotations

from collections.abc import Sequence

from embedsurgery.hookspecs import hookimpl
from embedsurgery.surgeries.base import SurgeryRecord
from embedsurgery.surgeries.trainable_tokens import PEFT_TYPE, TrainableTokens, TrainableTokensConfig


@hookimpl
def embedsurgery_surgeries() -> Sequence[SurgeryRecord]:
    """Trainable tokens; several adapters of them can share a model while their rows are disjoint."""
    tokens = TrainableTokens()
    return [SurgeryRecord(tokens.name, TrainableTokensConfig, tokens, PEFT_TYPE, frozenset({tokens.name}))]

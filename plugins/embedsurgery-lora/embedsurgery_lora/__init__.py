"""LoRA on whole embedding tables and heads as a plugin of embedsurgery, which reads and writes PEFT's files.

Hu et al. 2021, https://arxiv.org/abs/2106.09685; on embeddings as in PEFT (``peft/tuners/lora/layer.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

import embedsurgery as es
from embedsurgery.surgeries.surgery import SurgeryRecord
from embedsurgery_lora.config import LoraTablesConfig as LoraTablesConfig
from embedsurgery_lora.surgery import Lora as Lora

embedsurgery_contract = 1


@es.hookimpl
def embedsurgery_surgeries() -> Sequence[SurgeryRecord]:
    """Register the surgery. No other adapter can be attached beside it, because it changes whole tables."""
    lora = Lora()
    return [SurgeryRecord(lora.name, LoraTablesConfig, lora, "LORA")]

"""The model that teaches, by transformers. The name of a class in a config is looked up among those it knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto import modeling_auto as auto
from transformers.utils import logging

from embedsurgery.errors import CheckpointError
from embedsurgery.hub import find_id


def load(model: str | Path, *, progress: bool = True) -> tuple[Any, Any]:
    """A model with a head where its config says that it has one, and its tokenizer.

    Args:
        model: A directory, or a Hub id.
        progress: Whether transformers may show bars.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    remote = find_id(model)
    source: dict[str, Any] = {"pretrained_model_name_or_path": model}
    if remote is not None:
        source = {"pretrained_model_name_or_path": remote.repo, "revision": remote.revision or "main"}
    shown = logging.is_progress_bar_enabled()
    if not progress:
        logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(**source)
        asked = (config.architectures or [None])[0]
        kinds = (
            (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, transformers.AutoModelForCausalLM),
            (auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, transformers.AutoModelForMaskedLM),
            (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, transformers.AutoModelForSeq2SeqLM),
        )
        fits = (kind for names, kind in kinds if asked is not None and names.get(config.model_type) == asked)
        loaded = next(fits, transformers.AutoModel).from_pretrained(**source)
        return loaded, transformers.AutoTokenizer.from_pretrained(**source)
    except (OSError, ValueError) as error:
        line = str(error).strip().partition("\n")[0]
        raise CheckpointError("transformers cannot load this model", where=model, found=line) from error
    finally:
        if shown:
            logging.enable_progress_bar()

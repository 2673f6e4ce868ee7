"""Loads the teacher model with transformers. A config's class name is looked up only among transformers' classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto import modeling_auto as auto
from transformers.utils import logging

from embedsurgery.errors import CheckpointError
from embedsurgery.hub import find_id


def load(model: str | Path, *, progress: bool = True) -> tuple[Any, Any]:
    """Load a model and its tokenizer, with a language model head if the config's class has one.

    Args:
        model: A directory or a Hub id.
        progress: Whether transformers shows progress bars.

    Returns:
        The model and the tokenizer.

    Raises:
        CheckpointError: transformers cannot load them.
    """
    hub_id = find_id(model)
    source: dict[str, Any] = {"pretrained_model_name_or_path": model}
    if hub_id is not None:
        source = {"pretrained_model_name_or_path": hub_id.repo, "revision": hub_id.revision or "main"}
    was_enabled = logging.is_progress_bar_enabled()
    if not progress:
        logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(**source)
        class_name = (config.architectures or [None])[0]
        kinds = (
            (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, transformers.AutoModelForCausalLM),
            (auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, transformers.AutoModelForMaskedLM),
            (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, transformers.AutoModelForSeq2SeqLM),
        )
        fits = (kind for names, kind in kinds if class_name is not None and names.get(config.model_type) == class_name)
        loaded = next(fits, transformers.AutoModel).from_pretrained(**source)
        return loaded, transformers.AutoTokenizer.from_pretrained(**source)
    except (OSError, ValueError) as error:
        line = str(error).strip().partition("\n")[0]
        raise CheckpointError("transformers cannot load this model", where=model, found=line) from error
    finally:
        if was_enabled:
            logging.enable_progress_bar()

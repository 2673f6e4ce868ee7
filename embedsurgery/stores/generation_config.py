"""Adds suppressed tokens to ``generation_config.json``, so that they are never generated.

transformers (5.23, ``SuppressTokensLogitsProcessor``) honours ``suppress_tokens`` in all generation modes.
"""

from __future__ import annotations

import json
from typing import Any

from embedsurgery.errors import CheckpointError
from embedsurgery.files.json_patching import patch_json
from embedsurgery.files.json_reading import parse_json, read_small
from embedsurgery.plan import PatchFile, Suppress
from embedsurgery.stores.checkpoint import Checkpoint

GENERATION = "generation_config.json"
KEY = "suppress_tokens"

_GENERATING = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "max_length",
    "min_length",
    "do_sample",
    "early_stopping",
    "num_beams",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "repetition_penalty",
    "length_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    KEY,
    "begin_suppress_tokens",
    "num_return_sequences",
    "use_cache",
)
"""Settings that transformers reads from the model's config if there is no generation config."""


def add_suppressed(listed: Any, ids: tuple[int, ...], where: object) -> list[int]:
    """Append token ids to a list of suppressed tokens.

    Args:
        listed: The current value; None counts as an empty list.
        ids: The token ids to add.
        where: The file or model, for messages.

    Raises:
        CheckpointError: The current value is not a list of ids.
    """
    known = [] if listed is None else listed
    if not isinstance(known, list) or not all(type(i) is int for i in known):
        raise CheckpointError(f"invalid {KEY}", where=where, expected="a list of ids", found=repr(listed)[:80])
    return [*known, *(i for i in ids if i not in known)]


def suppression_patches(checkpoint: Checkpoint, edit: Suppress) -> tuple[PatchFile, ...]:
    """Return the patch that suppresses tokens; empty if they are suppressed already. A missing file is created."""
    path = checkpoint.directory / GENERATION
    if not path.exists():
        known = _generation_settings(checkpoint)
        body = {**known, KEY: add_suppressed(known.get(KEY), edit.ids, checkpoint.directory)}
        return (PatchFile.change(GENERATION, None, (json.dumps(body, indent=2, sort_keys=True) + "\n").encode()),)
    data = read_small(path)
    body = parse_json(data, path)
    after = {**body, KEY: add_suppressed(body.get(KEY), edit.ids, path)}
    return () if after == body else (PatchFile.change(GENERATION, data, patch_json(data, body, after, path)),)


def _generation_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the generation settings in the model's config.

    They count only as long as there is no generation config, so a new one must repeat them.
    """
    config = checkpoint.config or {}
    sections = (config.get(key) for key in ("decoder", "generator", "text_config"))
    inner = next((section for section in sections if isinstance(section, dict)), {})
    found = {key: config.get(key) if config.get(key) is not None else inner.get(key) for key in _GENERATING}
    return {key: value for key, value in found.items() if value is not None}

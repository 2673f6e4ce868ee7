"""``generation_config.json``: what becomes of it when tokens are to be kept from being generated.

transformers (5.23, ``SuppressTokensLogitsProcessor``) honours ``suppress_tokens`` in every way of generating.
"""

from __future__ import annotations

import json
from typing import Any

from embedsurgery.errors import CheckpointError
from embedsurgery.files.json_patching import respell
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
"""What a loader takes from the model's config where there is no generation config."""


def suppressed(listed: Any, ids: tuple[int, ...], where: object) -> list[int]:
    """A list of suppressed tokens with some more.

    Raises:
        CheckpointError: It is no list of ids.
    """
    known = [] if listed is None else listed
    if not isinstance(known, list) or not all(type(i) is int for i in known):
        raise CheckpointError(
            f"{KEY} of the wrong kind", where=where, expected="a list of ids", found=repr(listed)[:80]
        )
    return [*known, *(i for i in ids if i not in known)]


def suppression(checkpoint: Checkpoint, edit: Suppress) -> tuple[PatchFile, ...]:
    """The patch that keeps tokens from being generated; a file that is not there is made."""
    path = checkpoint.directory / GENERATION
    if not path.exists():
        known = _from_model(checkpoint)
        body = {**known, KEY: suppressed(known.get(KEY), edit.ids, checkpoint.directory)}
        return (PatchFile.change(GENERATION, None, (json.dumps(body, indent=2, sort_keys=True) + "\n").encode()),)
    data = read_small(path)
    body = parse_json(data, path)
    after = {**body, KEY: suppressed(body.get(KEY), edit.ids, path)}
    return () if after == body else (PatchFile.change(GENERATION, data, respell(data, body, after, path)),)


def _from_model(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the model's config says of generating, which a generation config would hide."""
    config = checkpoint.config or {}
    sections = (config.get(key) for key in ("decoder", "generator", "text_config"))
    inner = next((section for section in sections if isinstance(section, dict)), {})
    found = {key: config.get(key) if config.get(key) is not None else inner.get(key) for key in _GENERATING}
    return {key: value for key, value in found.items() if value is not None}

"""Bakes a soft prompt: plans tokens for it, with texts, ids and rows, and a tokenizer prefix that inserts them.

Rows, biases and heads of the tokens are planned in ``vocabulary_edits.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from embedsurgery.adapters.adapter import Adapter
from embedsurgery.adapters.new_tokens import assign_ids, check_token_count
from embedsurgery.errors import ConfigError, PlanError, UnsupportedError
from embedsurgery.graph import Table, Vocabulary
from embedsurgery.graph.config import as_mapping, find_named_ids, position_limit
from embedsurgery.plan import AddTokens, Plan, Prefix, Token
from embedsurgery.surgeries.soft_prompt.bake_config import BakeConfig, sanitize_name
from embedsurgery.surgeries.soft_prompt.config import prompts_of
from embedsurgery.surgeries.soft_prompt.vocabulary_edits import VocabularyEdits
from embedsurgery.surgeries.surgery import BakeContext
from embedsurgery.tokenizer.known import KnownTokens
from embedsurgery.tokenizer.prefix import MARKER_START

_READ_TWICE = ("SEQ_CLS", "QUESTION_ANS")
"""PEFT's names of the tasks for which an encoder-decoder model gives its text to the decoder as well."""

_OTHER_LOOKUPS = ("embed_tokens_per_layer", "value_embeddings", "entity_embeddings")
"""Modules of further lookups of the input's ids. A soft prompt has no vectors for them."""


def plan_prompt(adapter: Adapter, context: BakeContext) -> Plan:
    """Return the edits that bake a soft prompt in. They update `BakeContext.state`.

    Raises:
        UnsupportedError: A prompt for a decoder, a model that cannot read it as tokens, or a vocabulary that cannot
            grow.
        BaseMismatchError: The tokenizer belongs to another model.
        ConfigError: There is no tokenizer, or the options are not a `BakeConfig`.
        PlanError: The tokenizer has tokens of these names, or another prompt is inserted before every text.
    """
    config = BakeConfig() if context.options is None else context.options
    if not isinstance(config, BakeConfig):
        raise ConfigError(
            "bake options must be a BakeConfig", where=context.label, expected="a BakeConfig", found=repr(config)[:80]
        )
    table = context.located[adapter.manifest.tables[0].name]
    prompt = _read_vectors(adapter, table, context)
    known = context.tokens() if context.tokens is not None else None
    if known is None or context.state.texts is None:
        raise ConfigError(
            "baking a soft prompt needs a tokenizer", where=context.store.name, found="none", hint="give tokenizer="
        )
    vocabulary = context.store.graph.vocabulary_of(table)
    new = _make_tokens(config.name or sanitize_name(context.label), len(prompt), known, context, vocabulary, config)
    prefix = _make_prefix(new, config, known, context)
    rows = VocabularyEdits(context, table, vocabulary, known, config, new, prompt)
    edits = (AddTokens(tuple(new), prefix=prefix), *rows.edits())
    context.state.texts.update({token.id: token.content for token in new})
    facts = {
        "name": _prompt_name(new[0]),
        "ids": [token.id for token in new],
        "tokens": {str(token.id): token.content for token in new},
        "text": "".join(token.content for token in new),
        "prefix": "none" if prefix is None else _prefix_places(prefix),
        "after_bos": config.after_bos,
    }
    return Plan(edits, {"prompt": facts})


def _read_vectors(adapter: Adapter, table: Table, context: BakeContext) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the prompt's vectors, F32 (n, D), if the model can read them as tokens."""
    graph, where = context.store.graph, context.store.name
    prompts = prompts_of(adapter)
    config = as_mapping(context.store.config) if context.store.config is not None else {}
    # A base whose encoder has no table of tokens, such as Whisper, reads text with its decoder only.
    reads_text = any("encoder" in name or "shared" in name for name in (*table.names, *table.modules))
    if "decoder" in prompts or (config.get("is_encoder_decoder") is True and not reads_text):
        raise UnsupportedError(
            "a prompt for the decoder cannot be baked: a text goes to the encoder",
            where=where,
            expected="a prompt for the encoder alone",
            found=f"a prompt for {' and '.join(prompts)}",
            hint="attach the prompt instead of baking it",
        )
    if config.get("is_encoder_decoder") is True and adapter.manifest.config.get("task_type") in _READ_TWICE:
        raise UnsupportedError(
            "this model gives its text to the decoder as well, which was trained without the prompt",
            where=where,
            found=adapter.manifest.config["task_type"],
            hint="attach the prompt instead of baking it",
        )
    tables = [t.name for t in graph.tables if t is not table]
    others = [name for name in tables if name.rpartition(".")[0].rpartition(".")[2] in _OTHER_LOOKUPS]
    if others:
        raise UnsupportedError(
            "this model looks its ids up in other tables, too, and a soft prompt has no rows for them",
            where=where,
            found=", ".join(others),
            hint="attach the prompt instead of baking it",
        )
    values = next(iter(prompts.values())).float32()
    if not np.isfinite(values).all():
        raise UnsupportedError(
            "the soft prompt must be finite", where=repr(adapter), found="NaN or infinity", hint="train it again"
        )
    limit = position_limit(context.store.config)
    if limit is not None and len(values) >= limit:
        raise UnsupportedError(
            "the soft prompt is too long for the model's positions",
            where=where,
            expected=f"fewer than {limit} virtual tokens",
            found=len(values),
        )
    return values


def _make_tokens(
    name: str, count: int, known: KnownTokens, context: BakeContext, vocabulary: Vocabulary, config: BakeConfig
) -> list[Token]:
    """Return the virtual tokens with texts and ids."""
    texts, size = context.state.texts or {}, context.state.sizes[vocabulary.name]
    contents = [f"{MARKER_START}{name}:{number}|>" for number in range(count)]
    taken = sorted(set(contents) & set(texts.values()))
    if taken:
        raise PlanError(
            "the tokenizer already has virtual tokens of this name",
            where=known.source,
            found=f"{taken[0]!r} and {len(taken) - 1} more",
            hint="bake it under another name",
        )
    check_token_count(known, vocabulary.size)
    # Adapters that were planned before this one may have added or replaced tokens that the tokenizer does not show.
    following = max([known.next_id, *(index + 1 for index in texts if index not in known.texts)])
    roles = find_named_ids(as_mapping(context.store.config)) if config.reserved else {}
    free = [i for i in known.replaceable() if i < size and i not in roles] if config.reserved else []
    free = [i for i in free if texts.get(i) == known.texts[i]]
    return assign_ids(contents, free, following, known.texts, special=True)


def _make_prefix(new: Sequence[Token], config: BakeConfig, known: KnownTokens, context: BakeContext) -> Prefix | None:
    """Return the prefix by which the tokenizer inserts the tokens automatically; None if it is not to."""
    others = any(text.startswith(MARKER_START) for text in known.texts.values())
    prefix = config.prefix or ("all" if context.alone and not others else "none")
    if prefix == "none":
        return None
    if context.state.prefix is not None:
        raise PlanError(
            "two soft prompts cannot both be inserted before every text",
            where=context.store.name,
            found=f"{context.state.prefix} and {_prompt_name(new[0])}",
            expected="one",
            hint="bake with prefix='none', and write the tokens of one prompt into each text",
        )
    context.state.prefix = _prompt_name(new[0])
    return Prefix(
        f"{MARKER_START}{_prompt_name(new[0])}|>",
        tuple(t.content for t in new),
        tuple(t.id for t in new),
        prefix in ("all", "text"),
        prefix in ("all", "chat"),
        config.after_bos,
    )


def _prompt_name(token: Token) -> str:
    return token.content.removeprefix(MARKER_START).rpartition(":")[0]


def _prefix_places(prefix: Prefix) -> str:
    return "all" if prefix.texts and prefix.chats else "text" if prefix.texts else "chat"

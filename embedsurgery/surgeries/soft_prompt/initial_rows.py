"""How virtual tokens start: at random, from a text, or from tokens drawn out of the vocabulary.

What is drawn comes from torch's global generator, as it does where modules are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from embedsurgery.errors import ConfigError, UnsupportedError
from embedsurgery.graph import Table
from embedsurgery.stores.store import Store, rows_of
from embedsurgery.surgeries.scales import table_scale
from embedsurgery.surgeries.soft_prompt.config import SoftPromptConfig
from embedsurgery.surgeries.surgery import Base
from embedsurgery.tensors.raw import RawArray
from embedsurgery.tokenizer.content import is_reserved

_CHUNK = 1024
"""Rows that are looked at together while tokens are drawn."""


def first_rows(config: SoftPromptConfig, count: int, store: Store, table: Table, base: Base) -> RawArray:
    """Virtual tokens as they begin, F32 (count, D): vectors as the table's lookup would give them, scaled as it does.

    Args:
        config: What was asked.
        count: How many, of all submodules together.
        store: The model's tables.
        table: That of the input ids.
        base: What else is known of the model.

    Raises:
        ConfigError: No tokenizer for a text, a text without tokens, a vocabulary without a usable row.
    """
    import torch

    factor = np.float32(next((site.scale for site in table.sites if site.role == "input" and site.scale), 1.0))
    if config.init == "random":
        std = np.float32(table_scale(store, table) * factor if config.random_std is None else config.random_std)
        return RawArray.of(torch.randn(count, table.shape[1], dtype=torch.float32).numpy() * std)
    if config.init == "text":
        ids = _repeated(_tokens_of(config, table, base), count)
        return RawArray.of(rows_of(store, table, tuple(ids)).float32() * factor)
    drawn = _drawn(count, store, table, _known(config, table, base))
    return RawArray.of(drawn * factor)


def _tokens_of(config: SoftPromptConfig, table: Table, base: Base) -> list[int]:
    """The ids of the text."""
    from embedsurgery.tokenizer.live import encode_plain

    tokenizer = _tokenizer(config, base)
    if tokenizer is None:
        raise ConfigError(
            "init='text' needs a tokenizer", expected="tokenizer=, in the config or to attach", found="none"
        )
    text = str(config.init_text)
    ids = list(tokenizer(text)["input_ids"]) if config.special_tokens else encode_plain(tokenizer, text)
    beyond = [index for index in ids if not 0 <= index < table.shape[0]]
    if not ids or beyond:
        raise ConfigError(
            "the text's tokens are none of this model's",
            where=repr(text)[:80],
            expected=f"ids below {table.shape[0]}",
            found=beyond or "no token",
            hint="is it the model's tokenizer?",
        )
    return ids


def _repeated(ids: Sequence[int], count: int) -> list[int]:
    return [ids[number % len(ids)] for number in range(count)]


def _known(config: SoftPromptConfig, table: Table, base: Base) -> list[int]:
    """The rows that may be drawn: those of ordinary tokens, where a tokenizer tells them from others."""
    from embedsurgery.tokenizer.live import texts

    tokenizer = _tokenizer(config, base)
    padding = {site.padding_idx for site in table.sites}
    if tokenizer is None:
        return [index for index in range(table.shape[0]) if index not in padding]
    special = {*padding, *getattr(tokenizer, "all_special_ids", ())}
    return sorted(
        index
        for index, text in texts(tokenizer).items()
        if index < table.shape[0] and index not in special and not is_reserved(text)
    )


def _drawn(count: int, store: Store, table: Table, known: Sequence[int]) -> Any:
    """Rows drawn from the known ones, each once while there are enough.

    Those that no training has touched are passed over as far as they show: zero, no numbers, or several the same.
    """
    import torch

    order = torch.randperm(len(known)).tolist()
    found: list[Any] = []
    for start in range(0, len(order), _CHUNK):
        rows = rows_of(store, table, tuple(known[place] for place in order[start : start + _CHUNK])).float32()
        _, first, times = np.unique(rows, axis=0, return_index=True, return_counts=True)
        usable = np.zeros(len(rows), dtype=bool)
        usable[first[times == 1]] = True
        usable &= np.isfinite(rows).all(axis=1) & rows.any(axis=1)
        found.extend(rows[usable])
        if len(found) >= count:
            break
    if not found:
        raise ConfigError(
            "no row of the vocabulary can be drawn",
            where=table.name,
            expected="rows of known tokens",
            found="rows of zeros, of NaN, or all the same",
        )
    return np.stack([found[number % len(found)] for number in range(count)])


def _tokenizer(config: SoftPromptConfig, base: Base) -> Any:
    """The tokenizer that was given, loaded where it was named; code that comes with it is not run."""
    given = config.tokenizer if config.tokenizer is not None else base.tokenizer
    if not isinstance(given, str) and not hasattr(given, "__fspath__"):
        return given
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UnsupportedError(
            "loading a tokenizer by its name needs transformers",
            where=str(given),
            hint="pip install transformers, or give the tokenizer itself",
        ) from error
    try:
        return AutoTokenizer.from_pretrained(given, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            "the tokenizer cannot be loaded",
            where=str(given),
            found=str(error)[:200],
            hint="give its directory, or the tokenizer itself",
        ) from error

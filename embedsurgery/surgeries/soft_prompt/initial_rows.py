"""Initial values of virtual tokens: random, from a text, or from tokens drawn from the vocabulary.

Random numbers come from torch's global generator, as they do when modules are made.
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
"""Number of rows that are read at once while tokens are drawn."""


def make_initial_rows(config: SoftPromptConfig, count: int, store: Store, table: Table, base: Base) -> RawArray:
    """Return initial virtual tokens, F32 (count, D): vectors as the table's lookup returns them, its scale included.

    Args:
        config: The config.
        count: Number of virtual tokens of all submodules together.
        store: The model's tables.
        table: The table of the input ids.
        base: The model, apart from its tables.

    Raises:
        ConfigError: A text without tokenizer or tokens, or a vocabulary without a usable row.
    """
    import torch  # not needed for merging, which imports this package

    factor = np.float32(next((site.scale for site in table.sites if site.role == "input" and site.scale), 1.0))
    if config.init == "random":
        std = np.float32(table_scale(store, table) * factor if config.random_std is None else config.random_std)
        return RawArray.of(torch.randn(count, table.shape[1], dtype=torch.float32).numpy() * std)
    if config.init == "text":
        ids = _repeat_ids(_encode_text(config, table, base), count)
        return RawArray.of(rows_of(store, table, tuple(ids)).float32() * factor)
    drawn = _draw_token_rows(count, store, table, _find_drawable_rows(config, table, base))
    return RawArray.of(drawn * factor)


def _encode_text(config: SoftPromptConfig, table: Table, base: Base) -> list[int]:
    """Return the ids of the text."""
    from embedsurgery.tokenizer.live import encode_plain

    tokenizer = _load_tokenizer(config, base)
    if tokenizer is None:
        raise ConfigError(
            "init='text' needs a tokenizer", expected="tokenizer=, in the config or to attach", found="none"
        )
    text = str(config.init_text)
    ids = list(tokenizer(text)["input_ids"]) if config.special_tokens else encode_plain(tokenizer, text)
    beyond = [index for index in ids if not 0 <= index < table.shape[0]]
    if not ids or beyond:
        raise ConfigError(
            "init_text has tokens that this model lacks, or none",
            where=repr(text)[:80],
            expected=f"ids below {table.shape[0]}",
            found=beyond or "no token",
            hint="give the model's own tokenizer",
        )
    return ids


def _repeat_ids(ids: Sequence[int], count: int) -> list[int]:
    return [ids[number % len(ids)] for number in range(count)]


def _find_drawable_rows(config: SoftPromptConfig, table: Table, base: Base) -> list[int]:
    """Return the rows that may be drawn: those of ordinary tokens, or all if there is no tokenizer to tell them."""
    from embedsurgery.tokenizer.live import token_texts_of

    tokenizer = _load_tokenizer(config, base)
    padding = {site.padding_idx for site in table.sites}
    if tokenizer is None:
        return [index for index in range(table.shape[0]) if index not in padding]
    special = {*padding, *getattr(tokenizer, "all_special_ids", ())}
    return sorted(
        index
        for index, text in token_texts_of(tokenizer).items()
        if index < table.shape[0] and index not in special and not is_reserved(text)
    )


def _draw_token_rows(count: int, store: Store, table: Table, known: Sequence[int]) -> Any:
    """Draw from the known rows, without repeats while there are enough.

    Rows that look untrained are skipped: those that are zero, not finite, or equal to another.

    Returns:
        F32 (count, D)
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
            expected="a row of a known token that looks trained",
            found=f"{len(known)} rows, all zero, not finite or equal to another",
        )
    return np.stack([found[number % len(found)] for number in range(count)])


def _load_tokenizer(config: SoftPromptConfig, base: Base) -> Any:
    """Return the given tokenizer, loaded if it is a name or directory. Code that comes with it is not run."""
    given = config.tokenizer if config.tokenizer is not None else base.tokenizer
    if not isinstance(given, str) and not hasattr(given, "__fspath__"):
        return given
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UnsupportedError(
            "loading a tokenizer needs transformers",
            where=str(given),
            hint="pip install transformers, or give a tokenizer object",
        ) from error
    try:
        return AutoTokenizer.from_pretrained(given, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            "the tokenizer cannot be loaded",
            where=str(given),
            found=str(error)[:200],
            hint="give its directory, or a tokenizer object",
        ) from error

"""The config of trainable tokens: which rows of which tables, checked when it is made.

``surgery.py`` makes an adapter from it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from embedsurgery.adapters.carried_tokens import NewTokens
from embedsurgery.errors import ConfigError, TokenIndexError
from embedsurgery.graph import EmbeddingGraph, Table
from embedsurgery.stores.store import shorten


@dataclass(frozen=True)
class TrainableTokensConfig:
    """Asks for trainable rows, with PEFT's names and semantics.

    Attributes:
        token_indices: Row numbers: a list, range, tuple, numpy array or tensor of integers, each once; or a dict of
            module name -> such a list, for different rows of different tables. `add_tokens` returns one.
        target_modules: A list of module names, or a regular expression, as in PEFT. None selects the model's input
            embedding, or else the table called ``embed_tokens``, with everything that is tied to it. For new tokens it
            selects every table of their vocabulary, an untied head's included, because the model could not generate
            them otherwise.
        init_weights: True starts from the current rows, so that nothing changes until training. False starts from
            random rows with the table's standard deviation, and discards what the model knows of these tokens.
        new_tokens: What `add_tokens` returned. The adapter then carries the tokens, and extends a base without them
            when it is merged. None takes the tokens from ``token_indices``, and else those that `add_tokens` added to
            the model at these ids.

    Raises:
        TokenIndexError: Indices are negative, repeated, missing or not integers.
        ConfigError: ``target_modules`` is given with a dict of module names, or has the wrong type.
    """

    token_indices: Any
    target_modules: str | Sequence[str] | None = None
    init_weights: bool = True
    new_tokens: Any = None

    def __post_init__(self) -> None:
        indices: Any
        source = self.token_indices if self.new_tokens is None else self.new_tokens
        new = source if isinstance(source, NewTokens) else getattr(source, "new_tokens", None)
        if new is None and self.new_tokens is not None:
            raise ConfigError("new_tokens must be what add_tokens returned", found=repr(self.new_tokens)[:80])
        object.__setattr__(self, "new_tokens", new)
        if isinstance(self.token_indices, Mapping):
            indices = {str(name): _parse_indices(part) for name, part in self.token_indices.items()}
            if not indices:
                raise TokenIndexError("token_indices is empty", expected="at least one index", found="none")
            if self.target_modules is not None:
                raise ConfigError(
                    "token_indices is a dict of module names, so target_modules has no effect",
                    expected="target_modules=None",
                    found=f"target_modules={self.target_modules!r}",
                )
        else:
            indices = _parse_indices(self.token_indices)
        object.__setattr__(self, "token_indices", indices)
        if self.target_modules is not None and not isinstance(self.target_modules, str):
            listed = isinstance(self.target_modules, (list, tuple, set, frozenset))
            names = tuple(self.target_modules) if listed else ()
            if not names or not all(isinstance(name, str) for name in names):
                raise ConfigError(
                    "target_modules must name modules",
                    expected="a list of names, a regular expression or None",
                    found=repr(self.target_modules),
                )
            object.__setattr__(self, "target_modules", names)
        if not isinstance(self.init_weights, bool):
            raise ConfigError("init_weights must be a bool", expected="True or False", found=repr(self.init_weights))

    def to_json(self) -> dict[str, Any]:
        """Return the config as JSON values, without the new tokens, which the manifest has in a field of its own."""
        return {name: getattr(self, name) for name in ("token_indices", "target_modules", "init_weights")}


def _parse_indices(values: Any) -> tuple[int, ...]:
    """Return checked row numbers from any iterable of integers."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TokenIndexError("token_indices must be a list", expected="a list of integers", found=repr(values))
    items = values.tolist() if hasattr(values, "tolist") else list(values)
    if not isinstance(items, list):
        raise TokenIndexError("token_indices must be a list", expected="one axis of integers", found=repr(values))
    items = [item.item() if hasattr(item, "item") else item for item in items]
    wrong = [item for item in items if isinstance(item, bool) or not hasattr(type(item), "__index__")]
    if wrong:
        hint = "tokenizer.convert_tokens_to_ids gives a token's index" if isinstance(wrong[0], str) else None
        raise TokenIndexError(
            "token_indices must be integers",
            expected="integers",
            hint=hint,
            found=", ".join(f"{item!r}" for item in wrong[:8]),
        )
    indices = [operator.index(item) for item in items]
    if not indices:
        raise TokenIndexError("token_indices is empty", expected="at least one index", found="none")
    negative = [i for i in indices if i < 0]
    if negative:
        raise TokenIndexError("token_indices must not be negative", expected="row numbers", found=shorten(negative))
    counts: dict[int, int] = {}
    for index in indices:
        counts[index] = counts.get(index, 0) + 1
    repeated = sorted(i for i, count in counts.items() if count > 1)
    if repeated:
        raise TokenIndexError("token_indices must not repeat", expected="each index once", found=shorten(repeated))
    return tuple(indices)


def resolve_targets(config: TrainableTokensConfig, graph: EmbeddingGraph) -> list[tuple[Table, tuple[int, ...]]]:
    """Return the tables that a config selects, with the indices of each.

    Raises:
        TableError: A target fits no table. The message lists the tables.
        ConfigError: A dict names one table under two aliases, with different indices.
    """
    if isinstance(config.token_indices, dict):
        selected: dict[str, tuple[Table, tuple[int, ...]]] = {}
        for name, indices in config.token_indices.items():
            for table in graph.select([name]):
                if table.name in selected and selected[table.name][1] != indices:
                    raise ConfigError(
                        "two names of one table have different indices",
                        where=name,
                        expected="one list for a tied table",
                        found=table.name,
                    )
                selected[table.name] = (table, indices)
        return list(selected.values())
    if config.target_modules is not None:
        tables = graph.select(config.target_modules)
    elif config.new_tokens is not None:
        tables = tuple(graph.table(name) for name in graph.vocabulary_of(graph.main_input()).tables)
    else:
        tables = (graph.main_input(),)
    return [(table, config.token_indices) for table in tables]

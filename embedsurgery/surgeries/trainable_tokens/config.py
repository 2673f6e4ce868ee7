"""What a user asks of trainable tokens: which rows of which tables, checked at once."""

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
    """Asks for trainable rows. PEFT's names and semantics.

    Attributes:
        token_indices: Row numbers: a list, range, tuple, numpy array or tensor of integers, each once; or a dict of
            module name -> such a list, for different rows of different tables. `add_tokens` returns one.
        target_modules: A list of module names, or a regular expression, as in PEFT. None is the model's input
            embedding with everything that is tied to it, else the module called ``embed_tokens``; for new tokens it
            is every table of their vocabulary, an untied head's too, which could not emit them otherwise.
        init_weights: True starts from the current rows, so that nothing changes until training; False from
            random rows at the table's own scale, which throws away what the model knows of these tokens.
        new_tokens: What `add_tokens` returned: the adapter then carries the tokens, so that it extends a fresh base
            by itself. None is what `token_indices` brings, and else what `add_tokens` gave the model at these ids.

    Raises:
        TokenIndexError: Indices that are negative, repeated, missing, or no integers.
        ConfigError: ``target_modules`` beside a dict that names its modules itself, or of the wrong type.
    """

    token_indices: Any
    target_modules: str | Sequence[str] | None = None
    init_weights: bool = True
    new_tokens: Any = None

    def __post_init__(self) -> None:
        indices: Any
        asked = self.token_indices if self.new_tokens is None else self.new_tokens
        new = asked if isinstance(asked, NewTokens) else getattr(asked, "new_tokens", None)
        if new is None and self.new_tokens is not None:
            raise ConfigError("new_tokens is not what add_tokens returned", found=repr(self.new_tokens)[:80])
        object.__setattr__(self, "new_tokens", new)
        if isinstance(self.token_indices, Mapping):
            indices = {str(name): _indices(part) for name, part in self.token_indices.items()}
            if not indices:
                raise TokenIndexError("token_indices is empty", expected="at least one index")
            if self.target_modules is not None:
                raise ConfigError(
                    "token_indices names its modules itself",
                    expected="target_modules=None",
                    found=f"target_modules={self.target_modules!r}",
                )
        else:
            indices = _indices(self.token_indices)
        object.__setattr__(self, "token_indices", indices)
        if self.target_modules is not None and not isinstance(self.target_modules, str):
            listed = isinstance(self.target_modules, (list, tuple, set, frozenset))
            names = tuple(self.target_modules) if listed else ()
            if not names or not all(isinstance(name, str) for name in names):
                raise ConfigError(
                    "target_modules has no module names",
                    expected="names, a regular expression or None",
                    found=repr(self.target_modules),
                )
            object.__setattr__(self, "target_modules", names)
        if not isinstance(self.init_weights, bool):
            raise ConfigError("init_weights is no bool", expected="True or False", found=repr(self.init_weights))

    def to_json(self) -> dict[str, Any]:
        """What was asked, as JSON values; the new tokens stand in the manifest themselves."""
        return {name: getattr(self, name) for name in ("token_indices", "target_modules", "init_weights")}


def _indices(values: Any) -> tuple[int, ...]:
    """Checked row numbers from anything that holds integers."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TokenIndexError("token_indices is no list", expected="integers", found=repr(values))
    items = values.tolist() if hasattr(values, "tolist") else list(values)
    if not isinstance(items, list):
        raise TokenIndexError("token_indices has no axis", expected="one axis of integers", found=repr(values))
    items = [item.item() if hasattr(item, "item") else item for item in items]
    wrong = [item for item in items if isinstance(item, bool) or not hasattr(type(item), "__index__")]
    if wrong:
        hint = "tokenizer.convert_tokens_to_ids gives a token's index" if isinstance(wrong[0], str) else None
        raise TokenIndexError(
            "token_indices holds what is no integer",
            expected="integers",
            hint=hint,
            found=", ".join(f"{item!r}" for item in wrong[:8]),
        )
    indices = [operator.index(item) for item in items]
    if not indices:
        raise TokenIndexError("token_indices is empty", expected="at least one index")
    negative = [i for i in indices if i < 0]
    if negative:
        raise TokenIndexError("token_indices holds negative numbers", expected="row numbers", found=shorten(negative))
    counts: dict[int, int] = {}
    for index in indices:
        counts[index] = counts.get(index, 0) + 1
    repeated = sorted(i for i, count in counts.items() if count > 1)
    if repeated:
        raise TokenIndexError("token_indices holds repeats", expected="each index once", found=shorten(repeated))
    return tuple(indices)


def resolve(config: TrainableTokensConfig, graph: EmbeddingGraph) -> list[tuple[Table, tuple[int, ...]]]:
    """The tables that a config means, with the indices of each.

    Raises:
        TableError: A target that fits no table; the message lists those there are.
        ConfigError: A dict names one table twice, under two aliases.
    """
    if isinstance(config.token_indices, dict):
        chosen: dict[str, tuple[Table, tuple[int, ...]]] = {}
        for name, indices in config.token_indices.items():
            for table in graph.select([name]):
                if table.name in chosen and chosen[table.name][1] != indices:
                    raise ConfigError(
                        "two names of one table are given different indices",
                        where=name,
                        expected="one list for a tied table",
                        found=table.name,
                    )
                chosen[table.name] = (table, indices)
        return list(chosen.values())
    if config.target_modules is not None:
        tables = graph.select(config.target_modules)
    elif config.new_tokens is not None:
        tables = tuple(graph.table(name) for name in graph.vocabulary_of(graph.main_input()).tables)
    else:
        tables = (graph.main_input(),)
    return [(table, config.token_indices) for table in tables]

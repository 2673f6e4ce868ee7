"""A soft prompt becomes tokens: the plan that gives a model rows, ids and texts for its virtual tokens.

The rows are the virtual tokens' vectors, divided by what the model's lookup multiplies by. In a head of its own a
virtual token has the mean of the known tokens' rows. Its logit is then the mean of theirs, so that by Jensen's
inequality its probability is at most one part in as many as there are tokens, whatever the hidden state, and greedy
decoding never picks it. No finite row is unlikelier for every hidden state; a bias does better, where there is one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedsurgery.adapters.adapter import Adapter
from embedsurgery.adapters.new_tokens import assign_ids, check_belongs
from embedsurgery.errors import ConfigError, EmbedSurgeryWarning, PlanError, UnsupportedError
from embedsurgery.graph import Table, Vocabulary
from embedsurgery.graph.config import as_mapping, named_ids, position_limit
from embedsurgery.initializers.initializer import NewToken, TableView
from embedsurgery.initializers.methods import Mean
from embedsurgery.plan import AddTokens, Edit, Grow, Plan, Prefix, SetEntries, SetRows, Suppress, Token, Untie
from embedsurgery.surgeries.soft_prompt.bake_config import BakeConfig, plain
from embedsurgery.surgeries.soft_prompt.config import prompts_of
from embedsurgery.surgeries.soft_prompt.lookup_scale import Scale, scale_of
from embedsurgery.surgeries.surgery import BakeContext
from embedsurgery.tensors.raw import RawArray
from embedsurgery.tokenizer.known import KnownTokens
from embedsurgery.tokenizer.prefix import MARK

INERT = -10_000.0
"""Bias of what is never to be offered: finite in fp16 too, and the exponential of such a logit is zero."""

_READ_TWICE = ("SEQ_CLS", "QUESTION_ANS")
"""Tasks, as PEFT calls them, for which a model of encoder and decoder reads its text with both."""

_BESIDE = ("embed_tokens_per_layer", "value_embeddings", "entity_embeddings")
"""Lookups that take the input's ids too, of which a soft prompt has no vectors."""


def plan_prompt(adapter: Adapter, context: BakeContext) -> Plan:
    """The edits that bake a soft prompt in; `BakeContext.state` is brought up to date with them.

    Raises:
        UnsupportedError: A prompt for a decoder, a model that it does not fit into, a vocabulary that cannot grow.
        BaseMismatchError: The tokenizer is another model's.
        ConfigError: No tokenizer was given.
        PlanError: The tokenizer has tokens of these names already.
    """
    config = BakeConfig() if context.options is None else context.options
    if not isinstance(config, BakeConfig):
        raise ConfigError(
            "not a way to bake a soft prompt", where=context.label, expected="a BakeConfig", found=repr(config)[:80]
        )
    table = context.located[adapter.manifest.tables[0].name]
    prompt = _prompt(adapter, table, context)
    known = context.tokens() if context.tokens is not None else None
    if known is None or context.state.texts is None:
        raise ConfigError(
            "a soft prompt becomes tokens, and there is no tokenizer", where=context.store.name, hint="give tokenizer="
        )
    vocabulary = context.store.graph.vocabulary_of(table)
    new = _tokens(config.name or plain(context.label), len(prompt), known, context, vocabulary, config)
    prefix = _prefix(new, config, known, context)
    baking = _Baking(context, table, vocabulary, known, config, new, prompt)
    edits = (AddTokens(tuple(new), prefix=prefix), *baking.edits())
    context.state.texts.update({token.id: token.content for token in new})
    facts = {
        "name": _name(new[0]),
        "ids": [token.id for token in new],
        "tokens": {str(token.id): token.content for token in new},
        "text": "".join(token.content for token in new),
        "prefix": "none" if prefix is None else _where(prefix),
        "after_bos": config.after_bos,
    }
    return Plan(edits, {"prompt": facts})


def _prompt(adapter: Adapter, table: Table, context: BakeContext) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The vectors, F32 (n, D), of a prompt that fits the model."""
    graph, where = context.store.graph, context.store.name
    prompts = prompts_of(adapter)
    config = as_mapping(context.store.config) if context.store.config is not None else {}
    encoding = any("encoder" in name or "shared" in name for name in (*table.names, *table.modules))
    if "decoder" in prompts or (config.get("is_encoder_decoder") is True and not encoding):
        raise UnsupportedError(
            "a prompt for the decoder cannot become text: the text is the encoder's",
            where=where,
            found=f"a prompt for {' and '.join(prompts)}",
            expected="one for the encoder alone",
            hint="attach it",
        )
    if config.get("is_encoder_decoder") is True and adapter.manifest.config.get("task_type") in _READ_TWICE:
        raise UnsupportedError(
            "this model gives its text to the decoder too, where the prompt was not",
            where=where,
            found=adapter.manifest.config["task_type"],
            hint="attach it",
        )
    beside = [
        t.name
        for t in graph.tables
        if t is not table and t.name.split(".")[-2:-1][:1] and t.name.split(".")[-2] in _BESIDE
    ]
    if beside:
        raise UnsupportedError(
            "this model looks its ids up in another table too, of which a soft prompt knows nothing",
            where=where,
            found=", ".join(beside),
            hint="attach it",
        )
    values = next(iter(prompts.values())).float32()
    if not np.isfinite(values).all():
        raise UnsupportedError("the soft prompt holds NaN or infinity", where=repr(adapter), hint="train it again")
    limit = position_limit(context.store.config)
    if limit is not None and len(values) >= limit:
        raise UnsupportedError(
            "the soft prompt leaves no position for a text",
            where=where,
            expected=f"fewer than {limit} virtual tokens",
            found=len(values),
        )
    return values


def _tokens(
    name: str, count: int, known: KnownTokens, context: BakeContext, vocabulary: Vocabulary, config: BakeConfig
) -> list[Token]:
    """The virtual tokens with texts and ids."""
    texts, size = context.state.texts or {}, context.state.sizes[vocabulary.name]
    contents = [f"{MARK}{name}:{number}|>" for number in range(count)]
    taken = sorted(set(contents) & set(texts.values()))
    if taken:
        raise PlanError(
            "the tokenizer has virtual tokens of this name already",
            where=known.source,
            found=f"{taken[0]!r} and {len(taken) - 1} more",
            hint="bake it under another name",
        )
    check_belongs(known, vocabulary.size)
    following = max([known.next_id, *(index + 1 for index in texts if index not in known.texts)])
    roles = named_ids(as_mapping(context.store.config)) if config.reserved else {}
    free = [i for i in known.replaceable() if i < size and i not in roles] if config.reserved else []
    free = [i for i in free if texts.get(i) == known.texts[i]]
    return assign_ids(contents, free, following, known.texts, special=True)


def _prefix(new: Sequence[Token], config: BakeConfig, known: KnownTokens, context: BakeContext) -> Prefix | None:
    """Where the tokenizer puts them by itself; None for nowhere."""
    others = any(text.startswith(MARK) for text in known.texts.values())
    prefix = config.prefix or ("all" if context.alone and not others else "none")
    if prefix == "none":
        return None
    if context.state.prefix is not None:
        raise PlanError(
            "two soft prompts would stand before every text",
            where=context.store.name,
            found=f"{context.state.prefix} and {_name(new[0])}",
            expected="one",
            hint="bake with prefix='none', and choose by the markers in the text",
        )
    context.state.prefix = _name(new[0])
    return Prefix(
        f"{MARK}{_name(new[0])}|>",
        tuple(t.content for t in new),
        tuple(t.id for t in new),
        prefix in ("all", "text"),
        prefix in ("all", "chat"),
        config.after_bos,
    )


def _name(token: Token) -> str:
    return token.content.removeprefix(MARK).rpartition(":")[0]


def _where(prefix: Prefix) -> str:
    return "all" if prefix.texts and prefix.chats else "text" if prefix.texts else "chat"


@dataclass(frozen=True)
class _Baking:
    """Rows, entries and heads for new tokens."""

    context: BakeContext
    table: Table
    vocabulary: Vocabulary
    known: KnownTokens
    config: BakeConfig
    new: Sequence[Token]
    prompt: np.ndarray[Any, np.dtype[np.float32]]

    def edits(self) -> Iterator[Edit]:
        state, size = self.context.state, self.context.state.sizes[self.vocabulary.name]
        grown = max(size, max(token.id for token in self.new) + 1)
        multiple = self.config.pad_to_multiple_of
        if grown > size and multiple:
            grown = -(-grown // multiple) * multiple
        tables = self._tables()
        beyond = list(range(size, grown))
        spare = tuple(token.id for token in self.new if token.id < size)
        if beyond:
            rows = {name: self._rows(table, name, beyond) for name, table in tables.items()}
            entries = {name: self._entries(name, len(beyond)) for name in self.vocabulary.vectors}
            yield Grow(self.vocabulary.name, len(beyond), rows, entries)
            state.sizes[self.vocabulary.name] = grown
        if spare:
            for name, table in tables.items():
                yield SetRows(name, spare, self._rows(table, name, spare))
            for name in self.vocabulary.vectors:
                yield SetEntries(name, spare, self._entries(name, len(spare)))
        yield from self._parted(tables, [*spare, *beyond])
        if any("output" in table.roles for table in tables.values()):
            yield Suppress(tuple(sorted({*spare, *beyond})))  # what only pads the table is no token either

    def _tables(self) -> dict[str, Table]:
        """The vocabulary's tables, heads that earlier edits part included."""
        found = {name: self.context.store.graph.table(name) for name in self.vocabulary.tables}
        shortest = min(found.values(), key=lambda table: table.shape[0])
        if shortest.shape[0] < self.vocabulary.size:
            raise UnsupportedError(
                "the tables of this vocabulary have different numbers of rows, so a new id would be "
                "another token's in one of them",
                where=shortest.name,
                expected=f"{self.vocabulary.size} rows",
                found=shortest.shape[0],
                hint="attach the prompt",
            )
        return found | {head: found[name] for name, head in self.context.state.parted.items() if name in found}

    def _parted(self, tables: Mapping[str, Table], ids: Sequence[int]) -> Iterator[Untie]:
        """A head of its own for what is lookup and projection, where no bias keeps tokens from being offered."""
        for name, table in tables.items():
            outputs = [f"{site.module}.{site.parameter}" for site in table.sites if site.role == "output"]
            if not outputs or "input" not in table.roles or self._biased(table) or self.config.tied == "keep":
                continue
            if name in self.context.state.parted or name in self.context.state.parted.values():
                continue
            yield Untie(name, outputs[0], tuple(ids), self._mean(table, len(ids)))
            self.context.state.parted[name] = outputs[0]

    def _biased(self, table: Table) -> bool:
        """Whether every projection by a table has a bias of this vocabulary."""
        biases = [site.bias for site in table.sites if site.role == "output"]
        one = len(self.vocabulary.vectors) > 0 and len(biases) == 1
        return one or (bool(biases) and all(bias in self.vocabulary.vectors for bias in biases))

    def _rows(self, table: Table, name: str, ids: Sequence[int]) -> RawArray:
        """Rows of a table for some ids: the prompt's in the prompt's table, else the mean of the known tokens'."""
        if name != self.table.name:
            return self._mean(table, len(ids))
        rows = np.array(self._mean(table, len(ids)).float32())
        place = {token.id: number for number, token in enumerate(self.new)}
        scale = self._scale().in_dtype(table.dtype)
        for number, index in enumerate(ids):
            if index in place:
                rows[number] = (self.prompt[place[index]].astype(np.float64) / scale).astype(np.float32)
        return RawArray.of(rows)

    def _mean(self, table: Table, count: int) -> RawArray:
        known = min(self.known.next_id, table.shape[0])
        mean = self.context.state.means.get(table.name)
        if mean is None:
            view = TableView.of_table(self.context.store, table, known)
            mean = RawArray.of(Mean().rows(view, [NewToken("", 0)], None, []).astype(np.float32))
            self.context.state.means[table.name] = mean
        return mean.take([0] * count)

    def _entries(self, name: str, count: int) -> RawArray:
        return RawArray.of(np.full(count, INERT, dtype=np.float32))

    def _scale(self) -> Scale:
        scale = scale_of(self.table, self.context.store.config)
        if scale is None:
            warnings.warn(
                f"nothing says by what {self.context.store.name} multiplies the rows of {self.table.name}: taken for 1",
                EmbedSurgeryWarning,
                stacklevel=2,
            )
            return Scale()
        return scale

"""Plans new tokens for a base: their ids, their rows and the rows' initial values. Changes nothing.

The tokenizer is a `KnownTokens`, the same for one in memory and for a checkpoint's files. ``carried_tokens.py`` has
what an adapter stores of new tokens, and ``initializers/`` computes initial values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from embedsurgery.adapters.carried_tokens import NewTokens
from embedsurgery.errors import AttachmentError, BaseMismatchError, ConfigError, UnsupportedError, warn
from embedsurgery.graph import EmbeddingGraph, Vocabulary
from embedsurgery.graph.config import as_mapping, find_named_ids
from embedsurgery.initializers.initial_rows import add_parts, compute_initial_rows, parse_init
from embedsurgery.initializers.initializer import InitializerRecord, NewToken, TableView
from embedsurgery.plan import AddTokens, Edit, Grow, Plan, SetEntries, SetRows, Token
from embedsurgery.stores.store import Store
from embedsurgery.tensors.raw import RawArray
from embedsurgery.tokenizer.content import is_reserved
from embedsurgery.tokenizer.known import KnownTokens

FILLER_INIT = "mean"
"""The initialiser of rows that pad a table to a multiple."""

MAX_SPARE_ROWS = 4096
"""The most rows that a table may have beyond the tokenizer's ids; in a large table, an eighth of it."""

Init = str | Mapping[str, str]


@dataclass(frozen=True)
class TokensPlan:
    """The plan to add tokens.

    Attributes:
        plan: The edits.
        ids: Id of each requested token, existing ones included.
        new: The tokens that did not exist, None if all did.
    """

    plan: Plan
    ids: tuple[int, ...]
    new: NewTokens | None


class AddedTokens(Sequence[int]):
    """The ids that `add_tokens` returns, in the order of the requested tokens. A sequence of integers.

    Attributes:
        new_tokens: The tokens that the base did not have, None if it had all. An adapter that is trained on these ids
            carries them.
    """

    def __init__(self, ids: Sequence[int], new_tokens: NewTokens | None, undo: Callable[[], None]) -> None:
        self._ids = tuple(ids)
        self._undo: Callable[[], None] | None = undo
        self.new_tokens = new_tokens

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[int, ...]: ...
    def __getitem__(self, index: int | slice) -> int | tuple[int, ...]:
        return self._ids[index]

    def __len__(self) -> int:
        return len(self._ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and not isinstance(other, str) and list(self) == list(other)

    def __hash__(self) -> int:
        return hash(self._ids)

    def __repr__(self) -> str:
        return f"AddedTokens({list(self._ids)})"

    def undo(self) -> None:
        """Remove the tokens from model and tokenizer, and restore both bit for bit.

        Raises:
            AttachmentError: They were removed already, or the model has an attachment.
            PlanError: The model's tables were resized since.
        """
        if self._undo is None:
            raise AttachmentError("the tokens were removed already", where=repr(self))
        self._undo()
        self._undo = None


def plan_tokens(
    store: Store,
    known: KnownTokens,
    tokens: str | Sequence[str],
    *,
    initializers: Mapping[str, InitializerRecord],
    init: Init = "mean",
    special: bool = False,
    reserved: bool = False,
    pad_to_multiple_of: int | None = None,
    seed: int = 0,
) -> TokensPlan:
    """Plan ids and rows for new tokens. Changes nothing.

    Args:
        store: The base.
        known: Its tokenizer.
        tokens: Texts of the tokens. A token that exists keeps its id.
        initializers: Name -> record.
        init: NAME or NAME:ARGUMENT for all tokens, or text -> such a string.
        special: Whether they are special tokens.
        reserved: Whether they first replace reserved tokens ("[unused7]").
        pad_to_multiple_of: If tables must grow, grow them to a multiple of this number of rows.
        seed: Seed of random initialisers.

    Raises:
        ConfigError: Tokens are missing, empty, repeated, or exist without being special as requested; or ``init`` or
            ``pad_to_multiple_of`` is invalid.
        TableError: The model's vocabulary is not known.
        BaseMismatchError: The tokenizer has more tokens than the model has rows, or far fewer.
        UnsupportedError: The tables have different numbers of rows, and one of them lacks the new rows.
    """
    contents = _parse_tokens(tokens)
    _check_multiple(pad_to_multiple_of)
    vocabulary = store.graph.vocabulary_of(store.graph.main_input())
    check_token_count(known, vocabulary.size)
    requested = set(contents)
    ids = {text: index for index, text in known.texts.items() if text in requested}
    _check_existing(ids, known, special)
    named = find_named_ids(as_mapping(store.config))
    # A reserved token that the config names, as padding say, is not free.
    free = [i for i in known.replaceable() if i < vocabulary.size and i not in named] if reserved else []
    new = assign_ids([c for c in contents if c not in ids], free, known.next_id, known.texts, special=special)
    ids.update({token.content: token.id for token in new})
    inits = _parse_inits(init, contents, initializers)
    ordered = tuple(ids[c] for c in contents)
    if not new:
        return TokensPlan(Plan(()), ordered, None)
    _check_table_lengths(store.graph, vocabulary, new)
    _warn_named_ids(named, new)
    grown = max(vocabulary.size, max(token.id for token in new) + 1)
    if grown > vocabulary.size and pad_to_multiple_of:
        grown = -(-grown // pad_to_multiple_of) * pad_to_multiple_of
    initializer = _RowInitializer(store, known, initializers, inits, seed)
    edits: list[Edit] = [AddTokens(tuple(new)), *_plan_row_edits(new, vocabulary, grown, initializer)]
    record = NewTokens(tuple(sorted(new, key=lambda t: t.id)), vocabulary.size, grown, vocabulary.vectors)
    return TokensPlan(Plan(tuple(edits)), ordered, record)


def _parse_tokens(tokens: str | Sequence[str]) -> list[str]:
    contents = [tokens] if isinstance(tokens, str) else list(tokens)
    wrong = [c for c in contents if not isinstance(c, str)]
    if wrong or not contents:
        raise ConfigError(
            "tokens must be strings", expected="one or several strings", found=repr(wrong or contents)[:80]
        )
    if not all(contents):
        raise ConfigError("a token is empty", expected="texts", found=repr(contents)[:80])
    repeated = sorted(content for content, count in Counter(contents).items() if count > 1)
    if repeated:
        raise ConfigError("tokens are repeated", expected="each token once", found=", ".join(map(repr, repeated[:8])))
    return contents


def _check_multiple(multiple: int | None) -> None:
    if multiple is not None and (type(multiple) is not int or multiple < 1):
        raise ConfigError("pad_to_multiple_of is invalid", expected="a positive integer", found=repr(multiple))


def check_token_count(known: KnownTokens, size: int) -> None:
    """Refuse a tokenizer with more or far fewer tokens than the model has rows: it is probably another model's.

    With far fewer tokens its next id would be the row of another token.
    """
    if known.next_id > size:
        raise BaseMismatchError(
            "the tokenizer has ids beyond the model's rows",
            where=known.source,
            expected=f"at most {size} tokens",
            found=known.next_id,
            hint="check that it is this model's tokenizer",
        )
    if size - known.next_id > max(MAX_SPARE_ROWS, size // 8):
        raise BaseMismatchError(
            "the tokenizer has far fewer tokens than the model has rows",
            where=known.source,
            expected=f"about {size} tokens",
            found=known.next_id,
            hint="check that it is this model's tokenizer; if it is, first shrink the tables with "
            "model.resize_token_embeddings(len(tokenizer))",
        )


def _check_existing(ids: Mapping[str, int], known: KnownTokens, special: bool) -> None:
    """Refuse existing tokens that are not special as requested, and warn of reserved ones that no text gives."""
    special_ids = set(known.specials()) if special and ids else set()
    plain = [text for text, index in ids.items() if special and index not in special_ids]
    if plain:
        raise ConfigError(
            "a token exists already and is not special",
            where=known.source,
            found=", ".join(f"{text!r} ({ids[text]})" for text in plain[:8]),
            hint="add it without special, or choose another text",
        )
    for text, index in ids.items():
        if is_reserved(text) and list(known.encode(text)) != [index]:
            warn(
                f"{text!r} exists with id {index}, but the tokenizer does not encode the text as this token; to use "
                "its row, add another text with reserved=True"
            )


def _warn_named_ids(named: Mapping[int, str], new: Sequence[Token]) -> None:
    """Warn of new ids that the model's config names already: as padding, as the end, as an image."""
    for token in new:
        if token.id in named:
            warn(f"the new token {token.content!r} gets id {token.id}, but the config has it as {named[token.id]}")


def _check_table_lengths(graph: EmbeddingGraph, vocabulary: Vocabulary, new: Sequence[Token]) -> None:
    """Refuse new ids if one table of the vocabulary has rows for them and another does not."""
    shortest = min((graph.table(name) for name in vocabulary.tables), key=lambda table: table.shape[0])
    beyond = [token.id for token in new if token.id >= shortest.shape[0]]
    if shortest.shape[0] < vocabulary.size and beyond:
        raise UnsupportedError(
            "the tables of this vocabulary have different numbers of rows, so a new id would be another token's in one",
            where=f"{graph.source}: {shortest.name}",
            expected=f"ids below {shortest.shape[0]}",
            found=", ".join(map(str, beyond[:8])),
            hint="replace reserved tokens",
        )


def assign_ids(
    contents: Sequence[str], free: Sequence[int], following: int, texts: Mapping[int, str], *, special: bool
) -> list[Token]:
    """Assign an id to each text.

    Args:
        contents: The texts of new tokens.
        free: Ids of the reserved tokens to replace first.
        following: The id of the next added token.
        texts: Id -> text of the tokenizer's tokens.
        special: Whether they are special tokens.
    """
    replacing = [Token(c, i, special, replaces=texts[i]) for c, i in zip(contents, free, strict=False)]
    rest = enumerate(contents[len(replacing) :], following)
    return [*replacing, *(Token(content, index, special) for index, content in rest)]


def _parse_inits(
    init: Init, contents: list[str], known: Mapping[str, InitializerRecord]
) -> dict[str, tuple[InitializerRecord, str | None]]:
    """Return text of a token -> its initialiser and argument."""
    if isinstance(init, Mapping):
        if set(init) != set(contents):
            raise ConfigError(
                "the keys of init are not the new tokens",
                where="init",
                expected=", ".join(map(repr, contents)),
                found=", ".join(map(repr, init)) or "none",
            )
        return {content: parse_init(init[content], known) for content in contents}
    return dict.fromkeys(contents, parse_init(init, known))


@dataclass(frozen=True)
class _RowInitializer:
    """Computes the initial rows of new tokens for each table and vector."""

    store: Store
    known: KnownTokens
    initializers: Mapping[str, InitializerRecord]
    inits: Mapping[str, tuple[InitializerRecord, str | None]]
    seed: int

    def rows(self, view: TableView, tokens: Sequence[Token]) -> RawArray:
        """Return a row for each token, F32 (n, D). A token without a text is padding."""
        rows: dict[int, RawArray] = {}
        groups: dict[tuple[str, str | None], list[Token]] = {}
        for token in tokens:
            record, argument = self._init_of(token)
            groups.setdefault((record.name, argument), []).append(token)
        for group in groups.values():
            record, argument = self._init_of(group[0])
            plain = [NewToken(token.content, token.id) for token in group]
            new = add_parts(record, argument, plain, self.known.encode, self._find_id, self.known.unknown)
            values = compute_initial_rows(record, argument, view, new, self.seed)
            rows.update({token.id: values.take([n]) for n, token in enumerate(group)})
        return RawArray.of(np.concatenate([rows[token.id].float32() for token in tokens]))

    def _init_of(self, token: Token) -> tuple[InitializerRecord, str | None]:
        return self.inits[token.content] if token.content else (self.initializers[FILLER_INIT], None)

    def _find_id(self, text: str) -> int | None:
        return next((i for i, known in self.known.texts.items() if known == text), None)


def _plan_row_edits(
    new: Sequence[Token], vocabulary: Vocabulary, grown: int, initializer: _RowInitializer
) -> Iterator[Edit]:
    """Plan to grow the tables by the rows that they lack, and to set the rows and entries that are spare."""
    store, size = initializer.store, vocabulary.size
    named = {token.id: token for token in new}
    beyond = [named.get(i, Token("", i)) for i in range(size, grown)]
    spare = [token for token in new if token.id < size]
    known_rows = min(initializer.known.next_id, size)
    views = {name: TableView.of_table(store, store.graph.table(name), known_rows) for name in vocabulary.tables}
    vectors = {name: TableView.of_vector(store, name, known_rows) for name in vocabulary.vectors}
    if beyond:
        rows = {name: initializer.rows(view, beyond) for name, view in views.items()}
        entries = {name: _as_entries(initializer.rows(view, beyond)) for name, view in vectors.items()}
        yield Grow(vocabulary.name, len(beyond), rows, entries)
    if spare:
        ids = tuple(token.id for token in spare)
        for name, view in views.items():
            yield SetRows(name, ids, initializer.rows(view, spare))
        for name, view in vectors.items():
            yield SetEntries(name, ids, _as_entries(initializer.rows(view, spare)))


def _as_entries(column: RawArray) -> RawArray:
    """Return a vector's entries, (n,), from the rows of its view, (n, 1)."""
    return RawArray(column.dtype, (column.shape[0],), column.data)

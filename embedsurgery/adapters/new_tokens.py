"""New tokens for a base: which ids they get, which rows, and how those start. A plan is all that comes out.

The tokenizer is asked through `KnownTokens`, so that a live one and a checkpoint's files are the same here. What an
adapter keeps of new tokens is ``vocabulary.py``'s.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from embedsurgery.adapters.carried_tokens import NewTokens
from embedsurgery.errors import AttachmentError, BaseMismatchError, ConfigError, EmbedSurgeryWarning, UnsupportedError
from embedsurgery.graph import EmbeddingGraph, Vocabulary
from embedsurgery.graph.config import as_mapping, named_ids
from embedsurgery.initializers.initial_rows import initial_rows, parse_init, with_parts
from embedsurgery.initializers.initializer import InitializerRecord, NewToken, TableView
from embedsurgery.plan import AddTokens, Edit, Grow, Plan, SetEntries, SetRows, Token
from embedsurgery.stores.store import Store
from embedsurgery.tensors.raw import RawArray
from embedsurgery.tokenizer.content import is_reserved
from embedsurgery.tokenizer.known import KnownTokens

FILLER = "mean"
"""How rows start that only pad a table to a multiple."""

FEW_SPARE = 4096
"""So many rows beyond the tokenizer's may pad any table; or an eighth of it."""

Init = str | Mapping[str, str]


@dataclass(frozen=True)
class TokensPlan:
    """What adding tokens will do.

    Attributes:
        plan: The edits.
        ids: Id of each token that was asked for, those that existed included.
        new: Those that did not exist, None where all did.
    """

    plan: Plan
    ids: tuple[int, ...]
    new: NewTokens | None


class AddedTokens(Sequence[int]):
    """Ids of tokens, in the order in which they were asked for; what `add_tokens` returns.

    Attributes:
        new_tokens: What the base did not have; an adapter that is trained on these ids carries it.
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
        """Take the tokens out of model and tokenizer again, bit for bit.

        Raises:
            AttachmentError: It was done already, or an attachment still uses the rows.
            PlanError: The model has grown otherwise since.
        """
        if self._undo is None:
            raise AttachmentError("the tokens were taken out already", where=repr(self))
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
    """Ids and rows for new tokens; changes nothing.

    Args:
        store: The base.
        known: Its tokenizer.
        tokens: Texts. Those that exist are found, not added twice.
        initializers: Name -> record.
        init: NAME or NAME:ARGUMENT for all tokens, or for each by its text.
        special: Whether they are special tokens.
        reserved: Take the ids of reserved tokens ("[unused7]") first.
        pad_to_multiple_of: Where a table must grow, grow it to a multiple.
        seed: For initialisers that draw.

    Raises:
        ConfigError: No token, an empty one, one twice, one that exists and is not special, an initialiser or multiple
            that is none.
        TableError: The model's vocabulary is not known.
        BaseMismatchError: The tokenizer has more tokens than the model has rows, or far fewer.
        UnsupportedError: Tables of different lengths, of which one lacks the new rows.
    """
    contents = _checked(tokens)
    _check_multiple(pad_to_multiple_of)
    vocabulary = store.graph.vocabulary_of(store.graph.main_input())
    check_belongs(known, vocabulary.size)
    wanted = set(contents)
    ids = {text: index for index, text in known.texts.items() if text in wanted}
    _check_existing(ids, known, special)
    roles = named_ids(as_mapping(store.config))
    free = [i for i in known.replaceable() if i < vocabulary.size and i not in roles] if reserved else []
    new = assign_ids([c for c in contents if c not in ids], free, known.next_id, known.texts, special=special)
    ids.update({token.content: token.id for token in new})
    inits = _inits(init, contents, initializers)
    ordered = tuple(ids[c] for c in contents)
    if not new:
        return TokensPlan(Plan(()), ordered, None)
    _check_heads(store.graph, vocabulary, new)
    _warn_of_roles(roles, new)
    grown = max(vocabulary.size, max(token.id for token in new) + 1)
    if grown > vocabulary.size and pad_to_multiple_of:
        grown = -(-grown // pad_to_multiple_of) * pad_to_multiple_of
    starts = _Starts(store, known, initializers, inits, seed)
    edits: list[Edit] = [AddTokens(tuple(new)), *_edits(new, vocabulary, grown, starts)]
    record = NewTokens(tuple(sorted(new, key=lambda t: t.id)), vocabulary.size, grown, vocabulary.vectors)
    return TokensPlan(Plan(tuple(edits)), ordered, record)


def _checked(tokens: str | Sequence[str]) -> list[str]:
    contents = [tokens] if isinstance(tokens, str) else list(tokens)
    wrong = [c for c in contents if not isinstance(c, str)]
    if wrong or not contents:
        raise ConfigError("no texts of tokens", expected="one or several strings", found=repr(wrong or contents)[:80])
    if not all(contents):
        raise ConfigError("a token is empty", expected="a text", found=repr(contents)[:80])
    twice = sorted(content for content, count in Counter(contents).items() if count > 1)
    if twice:
        raise ConfigError("a token is named twice", expected="each once", found=", ".join(map(repr, twice[:8])))
    return contents


def _check_multiple(multiple: int | None) -> None:
    if multiple is not None and (type(multiple) is not int or multiple < 1):
        raise ConfigError("pad_to_multiple_of is no multiple", expected="a positive integer", found=repr(multiple))


def check_belongs(known: KnownTokens, size: int) -> None:
    """Refuse a tokenizer of another model, as far as numbers tell: its next id would be a row that a token has."""
    if known.next_id > size:
        raise BaseMismatchError(
            "the tokenizer has ids beyond the model's rows",
            where=known.source,
            expected=f"{size} tokens at most",
            found=known.next_id,
            hint="is it this model's tokenizer?",
        )
    if size - known.next_id > max(FEW_SPARE, size // 8):
        raise BaseMismatchError(
            "the tokenizer has far fewer tokens than the model has rows",
            where=known.source,
            expected=f"about {size} tokens",
            found=known.next_id,
            hint="is it this model's tokenizer? if it is, cut the tables to it first: "
            "model.resize_token_embeddings(len(tokenizer))",
        )


def _check_existing(ids: Mapping[str, int], known: KnownTokens, special: bool) -> None:
    """Refuse to find a token that is less special than asked for; say where no text reaches one that is reserved."""
    marked = set(known.specials()) if special and ids else set()
    plain = [text for text, index in ids.items() if special and index not in marked]
    if plain:
        raise ConfigError(
            "a token exists already, and is not special",
            where=known.source,
            found=", ".join(f"{text!r} ({ids[text]})" for text in plain[:8]),
            hint="ask for it without special, or choose another text",
        )
    for text, index in ids.items():
        if is_reserved(text) and list(known.encode(text)) != [index]:
            warnings.warn(
                f"{text!r} exists as {index}, and the tokenizer does not make that token of the text; a text "
                "of your own gets its row with reserved=True",
                EmbedSurgeryWarning,
                stacklevel=4,
            )


def _warn_of_roles(roles: Mapping[int, str], new: Sequence[Token]) -> None:
    """Say where a new token's id has a part in the model already: padding, the end, the place of an image."""
    for token in new:
        if token.id in roles:
            warnings.warn(
                f"the new token {token.content!r} gets id {token.id}, which the model's config calls {roles[token.id]}",
                EmbedSurgeryWarning,
                stacklevel=4,
            )


def _check_heads(graph: EmbeddingGraph, vocabulary: Vocabulary, new: Sequence[Token]) -> None:
    """Refuse new ids that one table of the vocabulary has rows for and another has not."""
    shortest = min((graph.table(name) for name in vocabulary.tables), key=lambda table: table.shape[0])
    beyond = [token.id for token in new if token.id >= shortest.shape[0]]
    if shortest.shape[0] < vocabulary.size and beyond:
        raise UnsupportedError(
            "the tables of this vocabulary have different numbers of rows, so a new id would be "
            "another token's in one of them",
            where=f"{graph.source}: {shortest.name}",
            expected=f"ids below {shortest.shape[0]}",
            found=", ".join(map(str, beyond[:8])),
            hint="take reserved tokens' rows",
        )


def assign_ids(
    contents: Sequence[str], free: Sequence[int], following: int, texts: Mapping[int, str], *, special: bool
) -> list[Token]:
    """An id for each text.

    Args:
        contents: The texts of new tokens.
        free: Ids of reserved tokens that they replace first.
        following: The id that the tokenizer gives to the next token that is added.
        texts: Id -> text of the tokenizer's tokens.
        special: Whether they are special tokens.
    """
    replacing = [Token(c, i, special, replaces=texts[i]) for c, i in zip(contents, free, strict=False)]
    rest = enumerate(contents[len(replacing) :], following)
    return [*replacing, *(Token(content, index, special) for index, content in rest)]


def _inits(
    init: Init, contents: list[str], known: Mapping[str, InitializerRecord]
) -> dict[str, tuple[InitializerRecord, str | None]]:
    """Token's text -> its initialiser and argument."""
    if isinstance(init, Mapping):
        strange = sorted(set(init) - set(contents))
        missing = [c for c in contents if c not in init]
        if strange or missing:
            raise ConfigError(
                "init does not name the tokens that are added",
                expected=", ".join(map(repr, contents)),
                found=", ".join(map(repr, init)) or "none",
            )
        return {content: parse_init(init[content], known) for content in contents}
    return dict.fromkeys(contents, parse_init(init, known))


@dataclass(frozen=True)
class _Starts:
    """How rows start: what every table and vector is asked with."""

    store: Store
    known: KnownTokens
    initializers: Mapping[str, InitializerRecord]
    inits: Mapping[str, tuple[InitializerRecord, str | None]]
    seed: int

    def rows(self, view: TableView, tokens: Sequence[Token]) -> list[RawArray]:
        """A row (1, D) for each token; one without a text is padding."""
        rows: dict[int, RawArray] = {}
        groups: dict[tuple[str, str | None], list[Token]] = {}
        for token in tokens:
            record, argument = self._init(token)
            groups.setdefault((record.name, argument), []).append(token)
        for group in groups.values():
            record, argument = self._init(group[0])
            asked = [NewToken(token.content, token.id) for token in group]
            found = with_parts(record, argument, asked, self.known.encode, self._find, self.known.unknown)
            values = initial_rows(record, argument, view, found, self.seed)
            rows.update({token.id: values.take([n]) for n, token in enumerate(group)})
        return [rows[token.id] for token in tokens]

    def _init(self, token: Token) -> tuple[InitializerRecord, str | None]:
        return self.inits[token.content] if token.content else (self.initializers[FILLER], None)

    def _find(self, text: str) -> int | None:
        return next((i for i, known in self.known.texts.items() if known == text), None)


def _edits(new: Sequence[Token], vocabulary: Vocabulary, grown: int, starts: _Starts) -> Iterator[Edit]:
    """Growth for what the tables lack; rows, and entries of vectors, for what they have to spare."""
    store, size = starts.store, vocabulary.size
    named = {token.id: token for token in new}
    beyond = [named.get(i, Token("", i)) for i in range(size, grown)]
    spare = [token for token in new if token.id < size]
    seen = min(starts.known.next_id, size)
    views = {name: TableView.of_table(store, store.graph.table(name), seen) for name in vocabulary.tables}
    vectors = {name: TableView.of_vector(store, name, seen) for name in vocabulary.vectors}
    if beyond:
        rows = {name: _joined(starts.rows(view, beyond)) for name, view in views.items()}
        entries = {name: _flat(_joined(starts.rows(view, beyond))) for name, view in vectors.items()}
        yield Grow(vocabulary.name, len(beyond), rows, entries)
    if spare:
        for name, view in views.items():
            yield SetRows(name, tuple(token.id for token in spare), _joined(starts.rows(view, spare)))
        for name, view in vectors.items():
            yield SetEntries(name, tuple(token.id for token in spare), _flat(_joined(starts.rows(view, spare))))


def _joined(rows: Sequence[RawArray]) -> RawArray:
    return RawArray.of(np.concatenate([row.float32() for row in rows]))


def _flat(column: RawArray) -> RawArray:
    return RawArray(column.dtype, (column.shape[0],), column.data)

"""New tokens that an adapter carries, and the edits that extend another base's vocabulary by them.

An adapter stores the tokens with their texts and ids and, beyond its own rows, what else its base needs: a filler row
for the padding of each table, and entries for per-token vectors such as a head's bias. ``new_tokens.py`` assigns the
ids of new tokens and initialises their rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from embedsurgery.errors import BaseMismatchError
from embedsurgery.graph import EmbeddingGraph, Table, Vocabulary
from embedsurgery.graph.wrappers import plain_name
from embedsurgery.plan import AddTokens, Edit, Grow, SetEntries, Token
from embedsurgery.plan.serial import string_or_none
from embedsurgery.tensors.raw import RawArray


@dataclass(frozen=True)
class NewTokens:
    """Tokens that an adapter adds to its base.

    Attributes:
        tokens: The tokens, with their ids.
        rows: Number of rows of the base's input table.
        grown: Number of its rows with the tokens. It equals ``rows`` if spare rows were enough.
        vectors: Names of the per-token vectors that grow with the tables.
    """

    tokens: tuple[Token, ...]
    rows: int
    grown: int
    vectors: tuple[str, ...] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        """The ids of the tokens."""
        return tuple(token.id for token in self.tokens)

    def to_json(self) -> dict[str, Any]:
        """Return the tokens as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> NewTokens:
        """Parse the result of `to_json`. Anything unexpected raises KeyError, TypeError or ValueError."""
        tokens = tuple(
            Token(str(t["content"]), _parse_count(t["id"]), bool(t["special"]), string_or_none(t["replaces"]))
            for t in body["tokens"]
        )
        rows, grown = _parse_count(body["rows"]), _parse_count(body["grown"])
        if len({t.id for t in tokens}) != len(tokens) or grown < rows or any(t.id >= grown for t in tokens):
            raise ValueError("token ids are repeated, or beyond the grown table")
        return cls(tokens, rows, grown, tuple(map(str, body["vectors"])))


def _parse_count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


def combine_new_tokens(known: Sequence[NewTokens], indices: Collection[int]) -> NewTokens | None:
    """Combine the tokens of the calls that added any of some ids, None if no call did.

    Args:
        known: The tokens that each call added, in the order of the calls.
        indices: The ids.
    """
    found = [new for new in known if not set(new.ids).isdisjoint(indices)]
    if not found:
        return None
    tokens = {token.id: token for new in found for token in new.tokens}
    ordered = tuple(tokens[index] for index in sorted(tokens))
    return NewTokens(ordered, found[0].rows, found[-1].grown, found[-1].vectors)


def filler_name(table: str) -> str:
    """Return the name in an adapter's tensors of the row that pads a table, (1, D)."""
    return f"{table}.filler"


def entries_name(vector: str) -> str:
    """Return the name of a vector's entries: one for each new token, in their order, and then the filler."""
    return f"{vector}.entries"


@dataclass
class BaseState:
    """The state of a base after the edits that are planned so far. Planning updates it.

    Attributes:
        texts: Id -> text of every token, None without a tokenizer.
        sizes: Name of a vocabulary -> number of its rows.
        untied_heads: Table of a lookup -> table of the projection that was untied from it.
        prefix: Name of the soft prompt that is prepended to every text, None without one.
        means: Table -> mean of its rows, (1, D), if it was computed.
    """

    texts: dict[int, str] | None
    sizes: dict[str, int]
    untied_heads: dict[str, str] = field(default_factory=dict)
    prefix: str | None = None
    means: dict[str, RawArray] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: EmbeddingGraph, texts: Mapping[int, str] | None) -> BaseState:
        """Return the state of a base before any edit."""
        return cls(None if texts is None else dict(texts), {v.name: v.size for v in graph.vocabularies})


def plan_extension(
    new: NewTokens,
    highest: int,
    raw: Mapping[str, RawArray],
    located: Mapping[str, Table],
    graph: EmbeddingGraph,
    state: BaseState,
    entries: Callable[[str], RawArray],
) -> list[Edit]:
    """Plan the edits that add an adapter's tokens to a base with the same ids. Tokens that it has are skipped.

    Args:
        new: The tokens.
        highest: The highest row that the adapter sets.
        raw: The adapter's tensors.
        located: Name of a table record -> table of the base.
        graph: The graph of the base.
        state: The state of the base. It is updated with the edits.
        entries: Reads a per-token vector of the base, (V,).

    Raises:
        BaseMismatchError: Another token has an id, a token has another id, or the base's vocabulary has other tables.
    """
    edits: list[Edit] = []
    ids = {text: index for index, text in (state.texts or {}).items()}
    missing = [token for token in new.tokens if not _has_token(token, state, ids, graph.source)]
    if missing and state.texts is not None:
        edits.append(AddTokens(tuple(missing)))
        state.texts.update({token.id: token.content for token in missing})
    vocabulary = _find_vocabulary(located.values(), graph)
    size = state.sizes[vocabulary.name]
    edits.extend(_plan_entries(new, raw, located, vocabulary, size, entries))
    needed = max((highest, *new.ids)) + 1
    if size < needed:
        # On the same base the padding is the adapter's too. A base of another size gets only the rows that it needs.
        target = new.grown if size == new.rows else needed
        edits.append(_plan_growth(new, raw, located, vocabulary, size, target))
        state.sizes[vocabulary.name] = target
    return edits


def _has_token(token: Token, state: BaseState, ids: Mapping[str, int], source: str) -> bool:
    """Whether the tokenizer has a token with the same id. ``ids`` is text -> id of all its tokens.

    Raises:
        BaseMismatchError: Another token has the id, or the token has another id.
    """
    if state.texts is None:
        return False
    existing = state.texts.get(token.id)
    if existing == token.content:
        return True
    if existing is not None and existing != token.replaces:
        raise BaseMismatchError(
            "an id of the adapter's new tokens is taken",
            where=f"{source}: token id {token.id}",
            expected=f"{token.replaces or token.content!r}",
            found=repr(existing),
            hint="use the base that the adapter was trained on, or train the token again",
        )
    elsewhere = ids.get(token.content)
    if elsewhere is not None:
        raise BaseMismatchError(
            "a new token of the adapter has another id in this base",
            where=f"{source}: {token.content!r}",
            expected=token.id,
            found=elsewhere,
            hint="use the base that the adapter was trained on, or train the token again",
        )
    return False


def _find_vocabulary(tables: Iterable[Table], graph: EmbeddingGraph) -> Vocabulary:
    names = {table.name for table in tables}
    found = [v for v in graph.vocabularies if names & set(v.tables)]
    if len(found) != 1:
        raise BaseMismatchError(
            "the adapter's tables do not belong to one vocabulary of this base",
            where=graph.source,
            expected="one vocabulary",
            found=", ".join(f"{v.name} ({v.size} rows)" for v in found) or "none",
        )
    return found[0]


def _plan_growth(
    new: NewTokens,
    raw: Mapping[str, RawArray],
    located: Mapping[str, Table],
    vocabulary: Vocabulary,
    size: int,
    target: int,
) -> Grow:
    """Plan new rows and the vectors' entries. All rows are filler: other edits set the adapter's own."""
    count = target - size
    records = {table.name: name for name, table in located.items()}
    if any(name not in records for name in vocabulary.tables):
        raise _other_tables_error(new, located, vocabulary)
    rows = {name: raw[filler_name(records[name])].take([0] * count) for name in vocabulary.tables}
    positions = {token.id: number for number, token in enumerate(new.tokens)}
    order = [positions.get(index, len(new.tokens)) for index in range(size, target)]
    matches = {name: _match_vector(name, new.vectors, vocabulary.vectors) for name in vocabulary.vectors}
    vectors = {name: raw[entries_name(match)].take(order) for name, match in matches.items()}
    return Grow(vocabulary.name, count, rows, vectors)


def _plan_entries(
    new: NewTokens,
    raw: Mapping[str, RawArray],
    located: Mapping[str, Table],
    vocabulary: Vocabulary,
    size: int,
    read_vector: Callable[[str], RawArray],
) -> Iterator[SetEntries]:
    """Plan the vectors' entries of new tokens that get spare rows of the base, if they differ from the base's."""
    if len(vocabulary.vectors) != len(new.vectors):
        raise _other_tables_error(new, located, vocabulary)
    positions = [number for number, token in enumerate(new.tokens) if token.id < size]
    ids = tuple(new.tokens[number].id for number in positions)
    for name in vocabulary.vectors if ids else ():
        entries = raw[entries_name(_match_vector(name, new.vectors, vocabulary.vectors))].take(positions)
        current = read_vector(name)
        # A planned edit may have grown the vector already, so the base does not have all entries yet.
        known = [index for index in ids if index < current.shape[0]]
        if len(known) < len(ids) or entries.to(current.dtype).data != current.take(ids).data:
            yield SetEntries(name, ids, entries)


def _other_tables_error(new: NewTokens, located: Mapping[str, Table], vocabulary: Vocabulary) -> BaseMismatchError:
    return BaseMismatchError(
        "the base's vocabulary has other tables than the adapter's",
        where=vocabulary.name,
        expected=", ".join((*located, *new.vectors)),
        found=", ".join((*vocabulary.tables, *vocabulary.vectors)),
    )


def _match_vector(name: str, carried: tuple[str, ...], vectors: tuple[str, ...]) -> str:
    """Return the adapter's name for a vector of the base: an equal name, one with an equal end, or the only one."""
    plain = plain_name(name)
    if len(vectors) == 1:
        return carried[0]
    for known in carried:
        if plain == known or plain.endswith("." + known) or known.endswith("." + plain):
            return known
    raise BaseMismatchError(
        "the adapter does not have this per-token vector",
        where=name,
        expected=", ".join(carried),
        hint="check that this is the adapter's base",
    )


def choose_evidence(indices: Iterable[int], new: NewTokens, rows: int, most: int = 64) -> tuple[int, ...]:
    """Choose the rows of the fingerprint for an adapter with new tokens: its other rows, and a sample of the table.

    Args:
        indices: The adapter's rows of the table.
        new: Its new tokens. The base does not have their rows, so they cannot be in the fingerprint.
        rows: Number of rows of the table in the base.
        most: Maximum size of the sample.
    """
    new_ids = set(new.ids)
    count = min(rows, most)
    # The middles of equal parts of the table, and not its last rows: tokens that were added before may have those.
    sample = [(2 * part + 1) * rows // (2 * count) for part in range(count)]
    return tuple(sorted({i for i in (*indices, *sample) if i not in new_ids and i < rows}))

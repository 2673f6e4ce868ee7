"""What an adapter carries of a vocabulary that it extends, and the edits that extend a base's in the same way.

The tokens come with their texts and ids, and the tables with what is needed beyond the adapter's own rows: a filler for
rows that only pad a table, and entries for per-token vectors such as a head's bias. Which ids new tokens get, and
how their rows start, is ``new_tokens.py``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from embedsurgery.errors import BaseMismatchError
from embedsurgery.graph import EmbeddingGraph, Table, Vocabulary
from embedsurgery.graph.wrappers import plain_name
from embedsurgery.plan import AddTokens, Edit, Grow, SetEntries, Token
from embedsurgery.tensors.raw import RawArray


@dataclass(frozen=True)
class NewTokens:
    """Tokens that a base does not have.

    Attributes:
        tokens: Each with the id that it gets.
        rows: How many rows the base's input table had.
        grown: How many it has with the tokens: as many, where spare rows were enough.
        vectors: Names of the per-token vectors that grow with the tables.
    """

    tokens: tuple[Token, ...]
    rows: int
    grown: int
    vectors: tuple[str, ...] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens' ids."""
        return tuple(token.id for token in self.tokens)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> NewTokens:
        """The inverse of `to_json`; what is not as expected raises KeyError, TypeError or ValueError."""
        tokens = tuple(
            Token(str(t["content"]), _natural(t["id"]), bool(t["special"]), _text(t["replaces"]))
            for t in body["tokens"]
        )
        rows, grown = _natural(body["rows"]), _natural(body["grown"])
        if len({t.id for t in tokens}) != len(tokens) or grown < rows or any(t.id >= grown for t in tokens):
            raise ValueError("tokens whose ids repeat, or that the grown table does not have")
        return cls(tokens, rows, grown, tuple(map(str, body["vectors"])))


def _text(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def together(known: Sequence[NewTokens], indices: Collection[int]) -> NewTokens | None:
    """As one what was added in several calls, in their order: those calls of which an index is; None where none is."""
    found = [new for new in known if not set(new.ids).isdisjoint(indices)]
    if not found:
        return None
    tokens = {token.id: token for new in found for token in new.tokens}
    ordered = tuple(tokens[index] for index in sorted(tokens))
    return NewTokens(ordered, found[0].rows, found[-1].grown, found[-1].vectors)


def filler_name(table: str) -> str:
    """Key in an adapter's tensors of the row, (1, D), that pads a table."""
    return f"{table}.filler"


def entries_name(vector: str) -> str:
    """Key of a per-token vector's entries: one for each new token, in their order, and then the filler."""
    return f"{vector}.entries"


@dataclass
class State:
    """What a base has, as edits that are planned one after another will have changed it.

    Attributes:
        texts: Id -> text of every token, None where no tokenizer is at hand.
        sizes: Vocabulary's name -> rows.
        parted: Lookup's table -> projection that has got a table of its own.
        prefix: Name of the soft prompt that stands before every text; None for none.
        means: Table -> the mean of its rows, (1, D), once it was asked for.
    """

    texts: dict[int, str] | None
    sizes: dict[str, int]
    parted: dict[str, str] = field(default_factory=dict)
    prefix: str | None = None
    means: dict[str, RawArray] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: EmbeddingGraph, texts: Mapping[int, str] | None) -> State:
        """As the base is now."""
        return cls(None if texts is None else dict(texts), {v.name: v.size for v in graph.vocabularies})


def extension(
    new: NewTokens,
    highest: int,
    raw: Mapping[str, RawArray],
    located: Mapping[str, Table],
    graph: EmbeddingGraph,
    state: State,
    entries: Callable[[str], RawArray],
) -> list[Edit]:
    """The edits that give a base the tokens of an adapter, at the same ids; none where it has them.

    Args:
        new: The tokens.
        highest: The highest row that the adapter sets.
        raw: The adapter's tensors.
        located: Table record's name -> table of the base.
        graph: Of the base.
        state: Of the base; brought up to date with the edits.
        entries: Gives a per-token vector of the base as it is now, (V,).

    Raises:
        BaseMismatchError: An id that another token has, a token that has another id, a vocabulary of other tables.
    """
    edits: list[Edit] = []
    ids = {text: index for index, text in (state.texts or {}).items()}
    missing = [token for token in new.tokens if not _has(token, state, ids, graph.source)]
    if missing and state.texts is not None:
        edits.append(AddTokens(tuple(missing)))
        state.texts.update({token.id: token.content for token in missing})
    vocabulary = _vocabulary(located.values(), graph)
    size = state.sizes[vocabulary.name]
    edits.extend(_entries(new, raw, located, vocabulary, size, entries))
    needed = max((highest, *new.ids)) + 1
    if size < needed:
        target = new.grown if size == new.rows else needed
        edits.append(_growth(new, raw, located, vocabulary, size, target))
        state.sizes[vocabulary.name] = target
    return edits


def _has(token: Token, state: State, ids: Mapping[str, int], source: str) -> bool:
    """Whether the tokenizer has a token already, at the same id; ``ids``: text -> id of all that it has.

    Raises:
        BaseMismatchError: The id or the text is taken.
    """
    if state.texts is None:
        return False
    there = state.texts.get(token.id)
    if there == token.content:
        return True
    if there is not None and there != token.replaces:
        raise BaseMismatchError(
            "an id of the adapter's new tokens is taken",
            where=f"{source}: token id {token.id}",
            expected=f"{token.replaces or token.content!r}",
            found=repr(there),
            hint="use the base that the adapter was made on, or train the token again",
        )
    elsewhere = ids.get(token.content)
    if elsewhere is not None:
        raise BaseMismatchError(
            "a new token of the adapter has another id here",
            where=f"{source}: {token.content!r}",
            expected=token.id,
            found=elsewhere,
            hint="use the base that the adapter was made on, or train the token again",
        )
    return False


def _vocabulary(tables: Iterable[Table], graph: EmbeddingGraph) -> Vocabulary:
    names = {table.name for table in tables}
    found = [v for v in graph.vocabularies if names & set(v.tables)]
    if len(found) != 1:
        raise BaseMismatchError(
            "the tables that an adapter extends are not of one vocabulary here",
            where=graph.source,
            expected="one vocabulary",
            found=", ".join(f"{v.name} ({v.size} rows)" for v in found) or "none",
        )
    return found[0]


def _growth(
    new: NewTokens,
    raw: Mapping[str, RawArray],
    located: Mapping[str, Table],
    vocabulary: Vocabulary,
    size: int,
    target: int,
) -> Grow:
    """New rows that are all filler (the adapter's own are set over it), and the vectors' entries."""
    count = target - size
    records = {table.name: name for name, table in located.items()}
    if any(name not in records for name in vocabulary.tables):
        raise _other_tables(new, located, vocabulary)
    rows = {name: raw[filler_name(records[name])].take([0] * count) for name in vocabulary.tables}
    place = {token.id: number for number, token in enumerate(new.tokens)}
    order = [place.get(index, len(new.tokens)) for index in range(size, target)]
    vectors = {
        name: raw[entries_name(_same(name, new.vectors, vocabulary.vectors))].take(order) for name in vocabulary.vectors
    }
    return Grow(vocabulary.name, count, rows, vectors)


def _entries(
    new: NewTokens,
    raw: Mapping[str, RawArray],
    located: Mapping[str, Table],
    vocabulary: Vocabulary,
    size: int,
    now: Callable[[str], RawArray],
) -> Iterator[SetEntries]:
    """The vectors' entries of tokens whose rows the base has to spare, where it has others."""
    if len(vocabulary.vectors) != len(new.vectors):
        raise _other_tables(new, located, vocabulary)
    places = [number for number, token in enumerate(new.tokens) if token.id < size]
    ids = tuple(new.tokens[number].id for number in places)
    for name in vocabulary.vectors if ids else ():
        entries = raw[entries_name(_same(name, new.vectors, vocabulary.vectors))].take(places)
        there = now(name)
        known = [number for number, index in enumerate(ids) if index < there.shape[0]]
        if len(known) < len(ids) or entries.to(there.dtype).data != there.take(ids).data:
            yield SetEntries(name, ids, entries)


def _other_tables(new: NewTokens, located: Mapping[str, Table], vocabulary: Vocabulary) -> BaseMismatchError:
    return BaseMismatchError(
        "the base's vocabulary has other tables than that of the adapter",
        where=vocabulary.name,
        expected=", ".join((*located, *new.vectors)),
        found=", ".join((*vocabulary.tables, *vocabulary.vectors)),
    )


def _same(name: str, theirs: tuple[str, ...], ours: tuple[str, ...]) -> str:
    """The adapter's name of a vector of the base: the same, or one that ends alike, or the one there is."""
    plain = plain_name(name)
    if len(ours) == 1:
        return theirs[0]
    for known in theirs:
        if plain == known or plain.endswith("." + known) or known.endswith("." + plain):
            return known
    raise BaseMismatchError(
        "a per-token vector that the adapter does not know",
        where=name,
        expected=", ".join(theirs),
        hint="is this the adapter's base?",
    )


def evidence(indices: Iterable[int], new: NewTokens, rows: int, most: int = 64) -> tuple[int, ...]:
    """Rows that a base is recognised by where some of an adapter's own are new: the others, and a sample of all.

    Args:
        indices: The adapter's rows of the table.
        new: Its new tokens.
        rows: Rows of the table in the base.
        most: Size of the sample: the middles of so many equal parts, and so not the last rows, which tokens that
            were added before may have.
    """
    strangers = set(new.ids)
    count = min(rows, most)
    known = [(2 * part + 1) * rows // (2 * count) for part in range(count)]
    return tuple(sorted({i for i in (*indices, *known) if i not in strangers and i < rows}))

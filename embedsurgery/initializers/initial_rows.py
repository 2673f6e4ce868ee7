"""What callers use of initialisers: what the user wrote, the texts to tokenise, and the rows of one table.

The known initialisers are an argument everywhere: the registry above this package has them.
"""

from __future__ import annotations

import difflib
import hashlib
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from embedsurgery.errors import ConfigError, EmbedSurgeryWarning, PluginError
from embedsurgery.initializers.initializer import Ask, InitializerRecord, NewToken, TableView, sound
from embedsurgery.plugin_calls import call, wrong
from embedsurgery.stores.store import shorten
from embedsurgery.tensors.raw import RawArray


def find_initializer(name: str, known: Mapping[str, InitializerRecord]) -> InitializerRecord:
    """The initialiser of this name.

    Raises:
        ConfigError: There is none; the message lists those there are and the nearest.
    """
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name.strip().lower(), known, n=1)
    raise ConfigError(
        "no initialiser is called so",
        where=f"init {name[:100]!r}",
        expected=", ".join(record.usage for record in known.values()),
        hint=f"did you mean {known[near[0]].usage!r}?" if near else None,
    )


def parse_init(text: str, known: Mapping[str, InitializerRecord]) -> tuple[InitializerRecord, str | None]:
    """What a user means by NAME or NAME:ARGUMENT; everything behind the first colon is the argument, as it stands.

    Args:
        text: Such as "mean" or "copy:<s>".
        known: Name -> record, as in ``registry().initializers``.

    Raises:
        ConfigError: It is empty or no string, there is no such initialiser, or it lacks an argument, or takes none.
    """
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(
            "an init is a name, or a name and an argument",
            where="init",
            found=repr(text)[:100],
            expected=", ".join(record.usage for record in known.values()),
        )
    name, colon, argument = text.partition(":")
    record = find_initializer(name, known)
    if record.argument is None:
        if colon:
            raise ConfigError(f"init {name!r} takes no argument", where=f"init {text[:100]!r}", expected=name)
        return record, None
    if not argument:
        raise ConfigError(f"init {name!r} needs an argument", where=f"init {text[:100]!r}", expected=record.usage)
    return record, argument


def with_parts(
    record: InitializerRecord,
    argument: str | None,
    tokens: Sequence[NewToken],
    encode: Callable[[str], Sequence[int]],
    find: Callable[[str], int | None],
    unknown: int | None = None,
) -> tuple[NewToken, ...]:
    """The tokens with the parts that the initialiser asks for.

    Args:
        record: The initialiser.
        argument: Its argument.
        tokens: The new tokens.
        encode: Ids of a text, without special tokens, by the tokenizer as it was before the new tokens.
        find: Id of the token with exactly this content, None where there is none.
        unknown: Id of the unknown token: its row says nothing of a text, so it is no part of one.

    Raises:
        ConfigError: A text without sub-tokens, or a token to copy that does not exist.
    """
    answers: dict[Ask, tuple[int, ...]] = {}
    done = []
    for token in tokens:
        ask = _ask(record, token, argument)
        if ask is not None and ask not in answers:
            found = find(ask.text) if ask.single else None
            ids = tuple(encode(ask.text)) if found is None else (found,)
            answers[ask] = ids if ask.single else tuple(i for i in ids if i != unknown)
            if ask.single and found is None and (len(ids) != 1 or ids[0] == unknown):
                raise ConfigError(
                    "no token is called so",
                    where=f"init {record.name!r}",
                    found=repr(ask.text)[:100],
                    expected="a token's content, or a text that is one token",
                )
            if not answers[ask]:
                raise _no_parts(record, token, ask)
        done.append(token if ask is None else replace(token, parts=answers[ask]))
    return tuple(done)


def initial_rows(
    record: InitializerRecord, argument: str | None, view: TableView, tokens: Sequence[NewToken], seed: int
) -> RawArray:
    """How the rows of new tokens start in one table, or their entries in one vector.

    Deterministic: the same seed, table name and rows give the same result, in whatever store and blocks they lie;
    a random row depends on its token's content (or, where that is empty, its id) and not on the tokens beside it.
    The random numbers are those of numpy's PCG64 and may change between versions of numpy (NEP 19).

    Args:
        record: The initialiser.
        argument: Its argument, as `parse_init` gives it.
        view: The table as it is now.
        tokens: The n new tokens, as `with_parts` gives them.
        seed: Any integer.

    Returns:
        F32 (n, D) in the order of the tokens; (n, 1) for a vector.

    Raises:
        ConfigError: The rows cannot start like that in this table.
        PluginError: The initialiser returned something else than such rows.
    """
    try:
        seed = operator.index(seed)
    except TypeError:
        raise ConfigError("a seed is an integer", where="seed", found=repr(seed)[:100]) from None
    shape = (len(tokens), view.shape[1])
    if not tokens:
        return RawArray("F32", shape, b"")
    _check_parts(record, argument, view, tokens)
    streams = [_stream(seed, view.name, token) for token in tokens]
    rows: object = call(f"{record.name}.rows", object, record.initializer.rows, view, tokens, argument, streams)
    if not isinstance(rows, np.ndarray) or rows.dtype not in (np.float32, np.float64) or rows.shape != shape:
        found = f"{rows.dtype} {rows.shape}" if isinstance(rows, np.ndarray) else type(rows).__name__
        raise PluginError(
            "an initialiser returned the wrong thing",
            where=record.name,
            expected=f"float32 or float64 {shape}",
            found=found,
        )
    with np.errstate(over="ignore", invalid="ignore"):
        values = rows.astype(np.float32)
    broken = [token.id for token, fine in zip(tokens, sound(values), strict=True) if not fine]
    if broken:
        warnings.warn(
            f"rows of {view.name} start with NaN or infinity (init {record.name!r}): {shorten(broken)}",
            EmbedSurgeryWarning,
            stacklevel=2,
        )
    return RawArray.of(values)


def _ask(record: InitializerRecord, token: NewToken, argument: str | None) -> Ask | None:
    asked: object = call(f"{record.name}.ask", object, record.initializer.ask, token, argument)
    if asked is not None and not isinstance(asked, Ask):
        raise wrong(f"{record.name}.ask", "an Ask, or None", type(asked).__name__)
    return asked


def _check_parts(record: InitializerRecord, argument: str | None, view: TableView, tokens: Sequence[NewToken]) -> None:
    """Refuse tokens without the parts that were asked for, and parts that are no known rows of the table."""
    for token in tokens:
        ask = _ask(record, token, argument)
        if ask is None:
            continue
        if not token.parts:
            raise _no_parts(record, token, ask)
        bad = [part for part in token.parts if not 0 <= part < view.known]
        if bad:
            raise ConfigError(
                "sub-tokens that are no tokens of this table",
                where=f"{view.name}: {token.content!r}",
                expected=f"0 to {view.known - 1}",
                found=shorten(bad),
            )


def _no_parts(record: InitializerRecord, token: NewToken, ask: Ask) -> ConfigError:
    return ConfigError(
        f"the text that init {record.name!r} needs has no sub-tokens",
        where=f"token {token.content!r}",
        found=repr(ask.text)[:100],
        hint="choose another init, such as 'mean'",
    )


def _stream(seed: int, table: str, token: NewToken) -> np.random.Generator:
    """A token's own source of randomness for one table."""
    key = ascii((seed, table, token.content or token.id))
    digest = hashlib.sha256(key.encode("ascii")).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))

"""Runs an initialiser: parses the user's ``init``, tokenises the text that it asks for, and checks its rows.

Callers pass the known initialisers: they are in the plugin registry, which is in a higher layer. ``initializer.py`` has
the contract.
"""

from __future__ import annotations

import difflib
import hashlib
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from embedsurgery.errors import ConfigError, PluginError, warn
from embedsurgery.initializers.initializer import Ask, InitializerRecord, NewToken, TableView, find_finite_rows
from embedsurgery.plugin_calls import call_plugin, wrong_result
from embedsurgery.stores.store import shorten
from embedsurgery.tensors.raw import RawArray


def find_initializer(name: str, known: Mapping[str, InitializerRecord]) -> InitializerRecord:
    """Return the initialiser of this name.

    Raises:
        ConfigError: There is none. The error lists the known ones and suggests the nearest.
    """
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name.strip().lower(), known, n=1)
    raise ConfigError(
        "unknown initialiser",
        where=f"init {name[:100]!r}",
        expected=", ".join(record.usage for record in known.values()),
        hint=f"did you mean {known[near[0]].usage!r}?" if near else None,
    )


def parse_init(text: str, known: Mapping[str, InitializerRecord]) -> tuple[InitializerRecord, str | None]:
    """Parse NAME or NAME:ARGUMENT. Everything after the first colon is the argument, unchanged.

    Args:
        text: Such as "mean" or "copy:<s>".
        known: Name -> record, as in ``registry().initializers``.

    Returns:
        The initialiser, and its argument or None.

    Raises:
        ConfigError: ``text`` is empty or not a string, the initialiser is unknown, its argument is missing, or it does
            not accept one.
    """
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(
            "init must be NAME or NAME:ARGUMENT",
            where="init",
            found=repr(text)[:100],
            expected=", ".join(record.usage for record in known.values()),
        )
    name, colon, argument = text.partition(":")
    record = find_initializer(name, known)
    if record.argument is None:
        if colon:
            raise ConfigError(f"init {name!r} does not accept an argument", where=f"init {text[:100]!r}", expected=name)
        return record, None
    if not argument:
        raise ConfigError(f"init {name!r} needs an argument", where=f"init {text[:100]!r}", expected=record.usage)
    return record, argument


def add_parts(
    record: InitializerRecord,
    argument: str | None,
    tokens: Sequence[NewToken],
    encode: Callable[[str], Sequence[int]],
    find: Callable[[str], int | None],
    unknown: int | None = None,
) -> tuple[NewToken, ...]:
    """Return the tokens with the parts that the initialiser asks for.

    Args:
        record: The initialiser.
        argument: Its argument.
        tokens: The new tokens.
        encode: Returns the ids of a text without special tokens, by the tokenizer without the new tokens.
        find: Returns the id of the token with exactly this content, None if there is none.
        unknown: Id of the unknown token. Its row has nothing to do with the text, so it is left out.

    Raises:
        ConfigError: A text has no sub-tokens, or a token to copy does not exist.
    """
    parts: dict[Ask, tuple[int, ...]] = {}
    done = []
    for token in tokens:
        ask = _call_ask(record, token, argument)
        if ask is not None and ask not in parts:
            found = find(ask.text) if ask.single else None
            ids = tuple(encode(ask.text)) if found is None else (found,)
            parts[ask] = ids if ask.single else tuple(i for i in ids if i != unknown)
            if ask.single and found is None and (len(ids) != 1 or ids[0] == unknown):
                raise ConfigError(
                    "there is no such token",
                    where=f"init {record.name!r}",
                    found=repr(ask.text)[:100],
                    expected="a token's content, or a text that is one token",
                )
            if not parts[ask]:
                raise _no_parts_error(record, token, ask)
        done.append(token if ask is None else replace(token, parts=parts[ask]))
    return tuple(done)


def compute_initial_rows(
    record: InitializerRecord, argument: str | None, view: TableView, tokens: Sequence[NewToken], seed: int
) -> RawArray:
    """Compute the initial rows of new tokens in one table, or their entries in one vector.

    Deterministic: an equal seed, table name and table give equal rows, in every store and for every block size. A
    random row depends on its token's content (its id, if the content is empty), and not on the other tokens. The random
    numbers are those of numpy's PCG64, which may change between versions of numpy (NEP 19).

    Args:
        record: The initialiser.
        argument: Its argument, from `parse_init`.
        view: The table.
        tokens: The n new tokens, from `add_parts`.
        seed: Any integer.

    Returns:
        F32 (n, D), in the order of the tokens; (n, 1) for a vector.

    Raises:
        ConfigError: The initialiser does not apply to this table.
        PluginError: The initialiser returned something else.
    """
    try:
        seed = operator.index(seed)
    except TypeError:
        raise ConfigError("seed must be an integer", where="seed", found=repr(seed)[:100]) from None
    shape = (len(tokens), view.shape[1])
    if not tokens:
        return RawArray("F32", shape, b"")
    _check_parts(record, argument, view, tokens)
    streams = [_random_stream(seed, view.name, token) for token in tokens]
    rows: object = call_plugin(f"{record.name}.rows", object, record.initializer.rows, view, tokens, argument, streams)
    if not isinstance(rows, np.ndarray) or rows.dtype not in (np.float32, np.float64) or rows.shape != shape:
        found = f"{rows.dtype} {rows.shape}" if isinstance(rows, np.ndarray) else type(rows).__name__
        raise PluginError(
            "the initialiser returned the wrong thing",
            where=record.name,
            expected=f"float32 or float64 {shape}",
            found=found,
        )
    with np.errstate(over="ignore", invalid="ignore"):  # values that overflow fp32 are warned of below
        values = rows.astype(np.float32)
    broken = [token.id for token, finite in zip(tokens, find_finite_rows(values), strict=True) if not finite]
    if broken:
        warn(f"initial rows of {view.name} have NaN or infinity (init {record.name!r}): {shorten(broken)}")
    return RawArray.of(values)


def _call_ask(record: InitializerRecord, token: NewToken, argument: str | None) -> Ask | None:
    result: object = call_plugin(f"{record.name}.ask", object, record.initializer.ask, token, argument)
    if result is not None and not isinstance(result, Ask):
        raise wrong_result(f"{record.name}.ask", "an Ask, or None", type(result).__name__)
    return result


def _check_parts(record: InitializerRecord, argument: str | None, view: TableView, tokens: Sequence[NewToken]) -> None:
    """Refuse tokens without the parts that the initialiser asks for, and parts that are not known rows."""
    for token in tokens:
        ask = _call_ask(record, token, argument)
        if ask is None:
            continue
        if not token.parts:
            raise _no_parts_error(record, token, ask)
        bad = [part for part in token.parts if not 0 <= part < view.known]
        if bad:
            raise ConfigError(
                "sub-tokens are not known rows of this table",
                where=f"{view.name}: {token.content!r}",
                expected=f"0 to {view.known - 1}",
                found=shorten(bad),
            )


def _no_parts_error(record: InitializerRecord, token: NewToken, ask: Ask) -> ConfigError:
    return ConfigError(
        f"the text for init {record.name!r} has no sub-tokens",
        where=f"token {token.content!r}",
        found=repr(ask.text)[:100],
        hint="choose another init, such as 'mean'",
    )


def _random_stream(seed: int, table: str, token: NewToken) -> np.random.Generator:
    """Return the random stream of one token for one table."""
    # Not hash(), which differs between processes. Equal texts have equal streams, whatever tokens are added with them.
    key = ascii((seed, table, token.content or token.id))
    digest = hashlib.sha256(key.encode("ascii")).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))

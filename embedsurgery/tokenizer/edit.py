"""How tokens enter a tokenizer and leave it: the content of a ``tokenizer.json`` in, its new content out.

One implementation for the file on disk (``tokenizer_files.py``) and for a tokenizer in memory
(``live_tokenizer.py``); neither a file nor a tokenizer library is touched here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from embedsurgery.errors import CheckpointError, ConfigError, PlanError, UnsupportedError
from embedsurgery.plan import AddTokens, Token
from embedsurgery.tokenizer.content import TokenizerJson, flags

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "padding")
"""Parts of the file that may name tokens."""


def check_call(tokens: Sequence[Token]) -> None:
    """Refuse tokens that no tokenizer could take.

    Raises:
        ConfigError: A text that is empty, comes twice, or is no text; an id that comes twice or is no id.
    """
    texts: set[str] = set()
    ids: set[int] = set()
    for place, token in enumerate(tokens):
        if not token.content:
            raise ConfigError("an empty token", where=f"token {place} of {len(tokens)}", hint="leave it out")
        if token.content in texts:
            raise ConfigError("a token comes twice", where=repr(token.content), hint="name it once")
        if type(token.id) is not int or token.id < 0 or token.id in ids:
            raise ConfigError("an id that is no id, or comes twice", where=repr(token.content), found=token.id)
        if any("\ud800" <= character <= "\udfff" for character in token.content):
            raise ConfigError("half a surrogate pair is no text", where=repr(token.content))
        texts.add(token.content)
        ids.add(token.id)


def unsettled(content: TokenizerJson, tokens: Sequence[Token], remove: bool) -> list[Token]:
    """The tokens that are not yet there (or, to remove, not yet gone).

    Raises:
        ConfigError: As `check_call`.
    """
    check_call(tokens)
    return [token for token in tokens if not (content.lacks(token) if remove else content.has(token))]


def change(content: TokenizerJson, tokens: Sequence[Token], remove: bool = False) -> dict[str, Any]:
    """The tokenizer's content with tokens added or removed; those that are there (or gone) already change nothing.

    A token that replaces another takes its place: its entry in ``added_tokens`` if it has one, and its key in the
    model's vocabulary if it is there; it becomes an added token in either case, so that its text is found whole.

    Raises:
        ConfigError: As `check_call`.
        PlanError: An id or a text that is taken, or that the tokenizer would not give; a token to remove that is not
            there as it was added.
        UnsupportedError: The token to replace is in use.
        CheckpointError: The content is no tokenizer's.
    """
    tokens = unsettled(content, tokens, remove)
    expected = dict(content.ids)
    body = (_removed if remove else _added)(content, tokens, expected)
    after = content.with_body(body)
    if after.given != expected:
        wrong = next(t for t in {**expected, **after.given} if expected.get(t) != after.given.get(t))
        raise PlanError(
            "the change would give a token another id",
            where=f"{content.where}: {wrong!r}",
            expected=expected.get(wrong),
            found=after.given.get(wrong),
            hint="tokens leave in the reverse order of their coming",
        )
    return body


def undone(content: TokenizerJson, edit: AddTokens) -> tuple[AddTokens, ...]:
    """The edits that take this one back, in order; asked for before it is done.

    A reserved token that is in the model's vocabulary alone comes back by removing what replaced it; one that is an
    added token itself by replacing what replaced it.
    """
    tokens = unsettled(content, edit.tokens, edit.remove)
    if edit.remove:
        return (AddTokens(tuple(tokens)),) if tokens else ()
    leave, rename = [], []
    for token in tokens:
        entry = None if token.replaces is None else content.entry(token.replaces)
        if token.replaces is None or entry is None:
            leave.append(token)
        else:
            rename.append(Token(token.replaces, token.id, entry.get("special", False), token.content))
    edits = (AddTokens(tuple(leave), remove=True), AddTokens(tuple(rename)))
    return tuple(e for e in edits if e.tokens)


def _added(content: TokenizerJson, tokens: Sequence[Token], expected: dict[str, int]) -> dict[str, Any]:
    """The body with tokens that are not there; ``expected`` becomes the ids that it should then have."""
    entries = list(content.added)
    renamed: dict[str, str] = {}
    following = content.next_id
    replaced = [token.replaces for token in tokens if token.replaces is not None]
    uses = used(content, replaced) if replaced else {}
    for token in sorted(tokens, key=lambda t: t.id):
        if token.content in content.ids:
            _refuse_text(content, token)
        if token.replaces is None:
            if token.id != following or content.has_holes:
                _refuse_id(content, token, following)
            following += 1
            entries.append({"id": token.id, **flags(token)})  # ids follow each other: there is no higher one
        else:
            _check_there(content, token.replaces, token)
            refuse_used(uses.get(token.replaces, ()), content.where, token.replaces)
            renamed[token.replaces] = token.content
            del expected[token.replaces]
            place = next((n for n, e in enumerate(entries) if e["content"] == token.replaces), None)
            if place is None:
                _insert(entries, token)
            else:
                entries[place] = {**entries[place], "content": token.content, "special": token.special}
        expected[token.content] = token.id
    return _with(content, entries, renamed)


def _removed(content: TokenizerJson, tokens: Sequence[Token], expected: dict[str, int]) -> dict[str, Any]:
    """The body without tokens that were added; ``expected`` becomes the ids that it should then have."""
    entries = list(content.added)
    renamed: dict[str, str] = {}
    for token in tokens:
        entry = content.entry(token.content)
        within = token.content in content.vocabulary
        if entry != {"id": token.id, **flags(token)} or within != (token.replaces is not None):
            where = f"{content.where}: {token.content!r}"
            raise PlanError(
                "a token to remove is not there as it was added",
                where=where,
                expected={"id": token.id, **flags(token)},
                found=entry,
                hint="undo by the edits that were made when it was added",
            )
        entries.remove(entry)
        del expected[token.content]
        if token.replaces is not None:
            renamed[token.content] = token.replaces
            expected[token.replaces] = token.id
    return _with(content, entries, renamed)


def _insert(entries: list[dict[str, Any]], token: Token) -> None:
    """Put a token's entry where its id belongs, as the library sorts them."""
    place = next((n for n, e in enumerate(entries) if e["id"] > token.id), len(entries))
    entries.insert(place, {"id": token.id, **flags(token)})


def _with(content: TokenizerJson, entries: list[dict[str, Any]], renamed: Mapping[str, str]) -> dict[str, Any]:
    """The body with other entries, and with other names in the model's vocabulary."""
    body = {**content.body, "added_tokens": entries}
    if any(text in content.vocabulary for text in renamed):
        vocab = body["model"]["vocab"]
        if isinstance(vocab, dict):
            vocab = {renamed.get(text, text): index for text, index in vocab.items()}
        else:
            vocab = [[renamed[p[0]], *p[1:]] if p[0] in renamed else p for p in vocab]
        body["model"] = {**body["model"], "vocab": vocab}
    return body


def _refuse_text(content: TokenizerJson, token: Token) -> None:
    found = content.ids[token.content]
    where = f"{content.where}: {token.content!r}"
    if found != token.id:
        raise PlanError(
            "the tokenizer has this token under another id",
            where=where,
            expected=token.id,
            found=found,
            hint=f"use that id, {found}",
        )
    raise PlanError(
        "the tokenizer has this token, and it is not as special",
        where=where,
        expected=token.special,
        found=not token.special,
        hint=f"ask for it with special={not token.special}",
    )


def _refuse_id(content: TokenizerJson, token: Token, following: int) -> None:
    where = f"{content.where}: {token.content!r}"
    taken = content.texts.get(token.id)
    if taken is not None:
        raise PlanError(
            "the id of a new token is taken by another",
            where=where,
            expected=f"{token.id} to be free",
            found=repr(taken),
            hint="is it another tokenizer, or one with more tokens?",
        )
    if content.has_holes:
        raise UnsupportedError(
            "the tokenizer's vocabulary has holes, so that a new token's id is not certain",
            where=where,
            expected=f"{len(content.vocabulary)} ids without a gap",
            found=f"ids up to {max(content.vocabulary.values())}",
            hint="replace a reserved token",
        )
    raise PlanError(
        "the tokenizer cannot give a new token this id: ids follow each other",
        where=where,
        expected=following,
        found=token.id,
        hint="is it another tokenizer, or one with fewer tokens?",
    )


def _check_there(content: TokenizerJson, text: str, token: Token) -> None:
    """Refuse to replace a token that is not there."""
    if content.ids.get(text) != token.id:
        raise PlanError(
            "the token to be replaced does not have the id",
            where=f"{content.where}: {text!r}",
            expected=token.id,
            found=content.ids.get(text, "no such token"),
            hint="is it another tokenizer?",
        )


def used(content: TokenizerJson, texts: Collection[str]) -> dict[str, list[str]]:
    """Where else a tokenizer names tokens: text -> the parts of its file. Texts that it names nowhere are absent.

    Raises:
        CheckpointError: The merges are no pairs of texts.
    """
    model = content.body["model"]
    named = {part: set(_strings(content.body.get(part))) for part in _PARTS}
    named["merges"] = _merged(content, {text for text in texts if text in content.vocabulary})
    found = {text: [part for part, names in named.items() if text in names] for text in texts}
    for text, uses in found.items():
        if content.unknown == content.ids.get(text, -1) or (_BYTE.fullmatch(text) and model.get("byte_fallback")):
            uses.append("model")
    return {text: uses for text, uses in found.items() if uses}


def refuse_used(uses: Sequence[str], where: object, text: str) -> None:
    """Refuse to take away a token's name where something else names it.

    Raises:
        UnsupportedError: There is a use.
    """
    if uses:
        raise UnsupportedError(
            "the token is in use and cannot be taken away",
            where=f"{where}: {text!r}",
            found=f"it in {', '.join(dict.fromkeys(uses))}",
            hint="choose another, or give its role to another first",
        )


def _merged(content: TokenizerJson, texts: set[str]) -> set[str]:
    """Those texts that a BPE model merges, or merges into."""
    merges = content.body["model"].get("merges") if texts else None
    try:
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges or ()]

        def apart(some: set[str]) -> bool:
            return some.isdisjoint(chain.from_iterable(pairs)) and some.isdisjoint(map("".join, pairs))

        return set() if apart(texts) else {text for text in texts if not apart({text})}
    except TypeError as error:
        raise CheckpointError(
            "merges of the wrong kind", where=content.where, expected="pairs of texts", found=str(error)
        ) from error


def _strings(value: Any) -> Iterator[str]:
    """Every text in a part of the file, keys included."""
    rest = [value]
    while rest:
        item = rest.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            rest += [*item, *item.values()]
        elif isinstance(item, list):
            rest += item

"""Adds tokens to the content of a ``tokenizer.json`` and removes them: parsed JSON in, new JSON out.

``patching.py`` uses it for the file on disk and ``live.py`` for a tokenizer in memory. Nothing here reads a file or
imports the tokenizers library.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from embedsurgery.errors import CheckpointError, ConfigError, PlanError, UnsupportedError
from embedsurgery.plan import AddTokens, Token
from embedsurgery.tokenizer.content import TokenizerJson, added_token_fields

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_PARTS_WITH_TOKENS = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "padding")
"""Parts of the file that may refer to tokens."""


def check_token_list(tokens: Sequence[Token]) -> None:
    """Refuse a list of tokens that is invalid for every tokenizer.

    Raises:
        ConfigError: A text is empty, repeated or not valid Unicode, or an id is repeated or not an id.
    """
    texts: set[str] = set()
    ids: set[int] = set()
    for number, token in enumerate(tokens):
        if not token.content:
            raise ConfigError("a token is empty", where=f"token {number} of {len(tokens)}", hint="leave it out")
        if token.content in texts:
            raise ConfigError("a token is repeated", where=repr(token.content), hint="name it once")
        if type(token.id) is not int or token.id < 0 or token.id in ids:
            raise ConfigError("a token id is invalid or repeated", where=repr(token.content), found=token.id)
        if any("\ud800" <= character <= "\udfff" for character in token.content):
            where = repr(token.content)
            raise ConfigError("a token is not valid Unicode", where=where, found="half a surrogate pair")
        texts.add(token.content)
        ids.add(token.id)


def select_pending(content: TokenizerJson, tokens: Sequence[Token], remove: bool) -> list[Token]:
    """Return the tokens that the tokenizer does not have yet or, to remove them, still has.

    Raises:
        ConfigError: As `check_token_list`.
    """
    check_token_list(tokens)
    return [token for token in tokens if not (content.lacks(token) if remove else content.has(token))]


def edit_tokenizer_json(content: TokenizerJson, tokens: Sequence[Token], remove: bool = False) -> dict[str, Any]:
    """Return the tokenizer's content with tokens added or removed. Tokens that it has (or lacks) already are skipped.

    A token that replaces a reserved one takes over its entry in ``added_tokens`` and its key in the model's vocabulary.
    It always becomes an added token: the model alone would split its text.

    Raises:
        ConfigError: As `check_token_list`.
        PlanError: An id or a text is taken, the library would assign another id, or a token to remove is not as it was
            added.
        UnsupportedError: The token to replace is in use.
        CheckpointError: The content is not a tokenizer's.
    """
    tokens = select_pending(content, tokens, remove)
    expected = dict(content.ids)
    body = (_remove_from_body if remove else _add_to_body)(content, tokens, expected)
    # The library assigns ids by position, so removing a token before others would change theirs.
    after = content.with_body(body)
    if after.assigned_ids != expected:
        wrong = next(t for t in {**expected, **after.assigned_ids} if expected.get(t) != after.assigned_ids.get(t))
        raise PlanError(
            "the edit would change the id of a token",
            where=f"{content.where}: {wrong!r}",
            expected=expected.get(wrong),
            found=after.assigned_ids.get(wrong),
            hint="remove tokens in the reverse order",
        )
    return body


def plan_undo(content: TokenizerJson, edit: AddTokens) -> tuple[AddTokens, ...]:
    """Return the edits that undo this one, in order. Call it before the edit is done.

    Where a new token replaced a reserved one that was in the model's vocabulary only, removing it restores the reserved
    one. Where the reserved one was an added token too, it must replace the new one in turn.
    """
    tokens = select_pending(content, edit.tokens, edit.remove)
    if edit.remove:
        return (AddTokens(tuple(tokens)),) if tokens else ()
    added, renamed = [], []
    for token in tokens:
        entry = None if token.replaces is None else content.entry(token.replaces)
        if token.replaces is None or entry is None:
            added.append(token)
        else:
            renamed.append(Token(token.replaces, token.id, entry.get("special", False), token.content))
    edits = (AddTokens(tuple(added), remove=True), AddTokens(tuple(renamed)))
    return tuple(e for e in edits if e.tokens)


def _add_to_body(content: TokenizerJson, tokens: Sequence[Token], expected: dict[str, int]) -> dict[str, Any]:
    """Return the body with new tokens, and update ``expected`` to the ids that it should have."""
    entries = list(content.added)
    renamed: dict[str, str] = {}
    following = content.next_id
    replaced = [token.replaces for token in tokens if token.replaces is not None]
    uses = find_uses(content, replaced) if replaced else {}
    for token in sorted(tokens, key=lambda t: t.id):
        if token.content in content.ids:
            _refuse_known_text(content, token)
        if token.replaces is None:
            if token.id != following or content.has_gaps:
                _refuse_wrong_id(content, token, following)
            following += 1
            entries.append({"id": token.id, **added_token_fields(token)})  # the new id is the highest
        else:
            _check_replaced(content, token.replaces, token)
            refuse_used(uses.get(token.replaces, ()), content.where, token.replaces)
            renamed[token.replaces] = token.content
            del expected[token.replaces]
            position = next((n for n, e in enumerate(entries) if e["content"] == token.replaces), None)
            if position is None:
                _insert_entry(entries, token)
            else:
                entries[position] = {**entries[position], "content": token.content, "special": token.special}
        expected[token.content] = token.id
    return _build_body(content, entries, renamed)


def _remove_from_body(content: TokenizerJson, tokens: Sequence[Token], expected: dict[str, int]) -> dict[str, Any]:
    """Return the body without tokens that were added, and update ``expected`` to the ids that it should have."""
    entries = list(content.added)
    renamed: dict[str, str] = {}
    for token in tokens:
        entry = content.entry(token.content)
        in_model = token.content in content.vocabulary
        if entry != {"id": token.id, **added_token_fields(token)} or in_model != (token.replaces is not None):
            where = f"{content.where}: {token.content!r}"
            raise PlanError(
                "a token to remove differs from the one that was added",
                where=where,
                expected={"id": token.id, **added_token_fields(token)},
                found=entry,
                hint="remove it with the undo that adding it returned",
            )
        entries.remove(entry)
        del expected[token.content]
        if token.replaces is not None:
            renamed[token.content] = token.replaces
            expected[token.replaces] = token.id
    return _build_body(content, entries, renamed)


def _insert_entry(entries: list[dict[str, Any]], token: Token) -> None:
    """Insert a token's entry by its id, as the library sorts them."""
    position = next((n for n, e in enumerate(entries) if e["id"] > token.id), len(entries))
    entries.insert(position, {"id": token.id, **added_token_fields(token)})


def _build_body(content: TokenizerJson, entries: list[dict[str, Any]], renamed: Mapping[str, str]) -> dict[str, Any]:
    """Return the body with new entries, and with tokens of the model's vocabulary renamed."""
    body = {**content.body, "added_tokens": entries}
    if any(text in content.vocabulary for text in renamed):
        vocab = body["model"]["vocab"]
        if isinstance(vocab, dict):
            vocab = {renamed.get(text, text): index for text, index in vocab.items()}
        else:
            vocab = [[renamed[p[0]], *p[1:]] if p[0] in renamed else p for p in vocab]
        body["model"] = {**body["model"], "vocab": vocab}
    return body


def _refuse_known_text(content: TokenizerJson, token: Token) -> None:
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
        "the tokenizer has this token, but not with this value of special",
        where=where,
        expected=token.special,
        found=not token.special,
        hint=f"use special={not token.special}",
    )


def _refuse_wrong_id(content: TokenizerJson, token: Token, following: int) -> None:
    where = f"{content.where}: {token.content!r}"
    taken = content.texts.get(token.id)
    if taken is not None:
        raise PlanError(
            "the id of a new token is taken",
            where=where,
            expected=f"no token with id {token.id}",
            found=repr(taken),
            hint="check that it is the right tokenizer: it has other or more tokens",
        )
    if content.has_gaps:
        raise UnsupportedError(
            "the tokenizer's vocabulary has gaps, so the id of a new token depends on the library's version",
            where=where,
            expected=f"{len(content.vocabulary)} consecutive ids",
            found=f"ids up to {max(content.vocabulary.values())}",
            hint="replace a reserved token",
        )
    raise PlanError(
        "a new token can only have the next id",
        where=where,
        expected=following,
        found=token.id,
        hint="check that it is the right tokenizer: it has other or fewer tokens",
    )


def _check_replaced(content: TokenizerJson, text: str, token: Token) -> None:
    """Refuse to replace a token that the tokenizer does not have, or has with another id."""
    if content.ids.get(text) != token.id:
        raise PlanError(
            "the token to replace does not have this id",
            where=f"{content.where}: {text!r}",
            expected=token.id,
            found=content.ids.get(text, "no such token"),
            hint="check that it is the right tokenizer",
        )


def find_uses(content: TokenizerJson, texts: Collection[str]) -> dict[str, list[str]]:
    """Return text -> the other parts of a tokenizer's file that refer to it. Texts without any are absent.

    Raises:
        CheckpointError: The merges are not pairs of texts.
    """
    model = content.body["model"]
    named = {part: set(_iterate_strings(content.body.get(part))) for part in _PARTS_WITH_TOKENS}
    named["merges"] = _find_merged(content, {text for text in texts if text in content.vocabulary})
    found = {text: [part for part, names in named.items() if text in names] for text in texts}
    for text, uses in found.items():
        if content.unknown == content.ids.get(text, -1) or (_BYTE_TOKEN.fullmatch(text) and model.get("byte_fallback")):
            uses.append("model")
    return {text: uses for text, uses in found.items() if uses}


def refuse_used(uses: Sequence[str], where: object, text: str) -> None:
    """Refuse to rename or remove a token that something else refers to.

    Raises:
        UnsupportedError: There is a use.
    """
    if uses:
        raise UnsupportedError(
            "the token is in use and cannot be replaced or removed",
            where=f"{where}: {text!r}",
            found=", ".join(dict.fromkeys(uses)),
            hint="choose another token, or first give its role to another",
        )


def _find_merged(content: TokenizerJson, texts: set[str]) -> set[str]:
    """Return those texts that a BPE model merges, or merges other texts into."""
    merges = content.body["model"].get("merges") if texts else None
    try:
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges or ()]

        def are_unused(some: set[str]) -> bool:
            return some.isdisjoint(chain.from_iterable(pairs)) and some.isdisjoint(map("".join, pairs))

        # There are many merges. One pass over them shows that none of the texts is used, the usual case.
        return set() if are_unused(texts) else {text for text in texts if not are_unused({text})}
    except TypeError as error:
        raise CheckpointError(
            "the merges are invalid", where=content.where, expected="pairs of texts", found=str(error)
        ) from error


def _iterate_strings(value: Any) -> Iterator[str]:
    """Iterate every text in a part of the file, keys included."""
    rest = [value]
    while rest:
        item = rest.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            rest += [*item, *item.values()]
        elif isinstance(item, list):
            rest += item

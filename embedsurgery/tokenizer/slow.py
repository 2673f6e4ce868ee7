"""Tokens that enter or leave a tokenizer that is written in Python: transformers' slow ones, without a backend.

They are added by the tokenizer's own ``add_tokens`` and taken out of the dictionaries that it keeps (transformers 5,
``PythonBackend``). Its vocabulary is its subclass's affair, so no reserved token can be renamed here.
"""

from __future__ import annotations

from copy import copy
from typing import Any

from embedsurgery.errors import ConfigError, PlanError, UnsupportedError
from embedsurgery.plan import AddTokens
from embedsurgery.tokenizer.content import TokenizerJson, flags
from embedsurgery.tokenizer.edit import change, unsettled
from embedsurgery.tokenizer.encoding import check_encodings
from embedsurgery.tokenizer.sidecars import refuse_roles

_STATE = ("_added_tokens_decoder", "_added_tokens_encoder", "_extra_special_tokens", "total_vocab_size")
_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


def slow_content(tokenizer: Any) -> TokenizerJson:
    """What the tokenizer knows, as a ``tokenizer.json`` would say it: all texts are of the model's vocabulary.

    Raises:
        UnsupportedError: It is not built as transformers' slow tokenizers are.
    """
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if not all(attribute in vars(tokenizer) for attribute in ("tokens_trie", *_STATE)):
        raise UnsupportedError(
            "a tokenizer of an unknown kind",
            where=name,
            found=type(tokenizer).__name__,
            hint="use a fast tokenizer, one with a tokenizer.json",
        )
    added = tokenizer.added_tokens_decoder.items()
    entries = [{"id": index, **{field: getattr(t, field) for field in _FIELDS}} for index, t in added]
    unknown = getattr(tokenizer, "unk_token", None)
    model = {"vocab": tokenizer.get_vocab(), "unk_token": unknown}
    return TokenizerJson({"model": model, "added_tokens": entries}, name)


def roles_of(tokenizer: Any) -> dict[str, str]:
    """Role -> text of the tokens that have one."""
    return {role: text for role, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}


def change_slow(tokenizer: Any, edit: AddTokens) -> None:
    """As ``live_tokenizer.change_tokens``, of a slow tokenizer."""
    content = slow_content(tokenizer)
    tokens = unsettled(content, edit.tokens, edit.remove)
    replaced = [token.replaces for token in tokens if token.replaces is not None]
    if replaced:
        raise UnsupportedError(
            "a slow tokenizer cannot rename its tokens",
            where=f"{content.where}: {replaced[0]!r}",
            hint="use the model's fast tokenizer, or add the token at a new id",
        )
    refuse_roles(roles_of(tokenizer), (), tokens, edit.remove, content.where)
    if edit.remove:
        _remove(tokenizer, content, AddTokens(tuple(tokens), remove=True))
    elif tokens:
        change(content, tokens)  # for what it refuses
        _add(tokenizer, content, AddTokens(tuple(tokens)))


def _add(tokenizer: Any, content: TokenizerJson, edit: AddTokens) -> None:
    from tokenizers import AddedToken  # transformers has it

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))

    tokens = sorted(edit.tokens, key=lambda token: token.id)
    asked = [token.content for token in tokens] + [entry["content"] for entry in content.added]
    was = {text: encode(text) for text in asked}
    saved, known = {name: copy(vars(tokenizer)[name]) for name in _STATE}, set(tokenizer.tokens_trie._tokens)
    try:
        for token in tokens:
            tokenizer.add_tokens([AddedToken(**flags(token))], special_tokens=token.special)
            found = tokenizer.added_tokens_encoder.get(token.content, "another text")
            if found != token.id:
                raise ConfigError(
                    "the tokenizer takes this text for another, or gives it another id",
                    where=f"{content.where}: {token.content!r}",
                    expected=token.id,
                    found=found,
                    hint="write it as the tokenizer normalises it, or make it special",
                )
        check_encodings(tokens, content, lambda: was.__getitem__, lambda: encode)
    except BaseException:
        _restore(tokenizer, saved, known)
        raise


def _remove(tokenizer: Any, content: TokenizerJson, edit: AddTokens) -> None:
    last = len(content.ids) - len(edit.tokens)
    for token in edit.tokens:
        entry, expected = content.entry(token.content), {"id": token.id, **flags(token)}
        if entry != expected or token.id < last:
            raise PlanError(
                "a token to remove is not there as it was added, or not at the end",
                where=f"{content.where}: {token.content!r}",
                expected=expected,
                found=entry,
                hint="tokens leave in the reverse order of their coming",
            )
    gone = {token.content for token in edit.tokens}
    decoder = {index: t for index, t in tokenizer._added_tokens_decoder.items() if t.content not in gone}
    encoder = {text: index for text, index in tokenizer._added_tokens_encoder.items() if text not in gone}
    extra = [token for token in tokenizer._extra_special_tokens if str(token) not in gone]
    state = dict(zip(_STATE, (decoder, encoder, extra, len(content.ids) - len(gone)), strict=True))
    _restore(tokenizer, state, set(tokenizer.tokens_trie._tokens) - gone)


def _restore(tokenizer: Any, state: dict[str, Any], known: set[str]) -> None:
    """Set the tokenizer's dictionaries, and make the trie that finds ``known`` texts."""
    vars(tokenizer).update(state)
    trie = type(tokenizer.tokens_trie)()
    for text in sorted(known):
        trie.add(text)
    tokenizer.tokens_trie = trie

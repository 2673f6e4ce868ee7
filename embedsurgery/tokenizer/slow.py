"""Edits slow tokenizers in memory: transformers' tokenizers that are written in Python and have no backend.

Tokens are added with the tokenizer's ``add_tokens``. transformers has no method that removes them, so they are removed
from the tokenizer's private dictionaries (``PythonBackend`` of transformers 5). A reserved token cannot be renamed,
since each subclass stores its vocabulary in its own way. ``live.py`` edits fast tokenizers.
"""

from __future__ import annotations

from copy import copy
from typing import Any

from embedsurgery.errors import ConfigError, PlanError, UnsupportedError
from embedsurgery.plan import AddTokens
from embedsurgery.tokenizer.content import TokenizerJson, added_token_fields
from embedsurgery.tokenizer.edit import edit_tokenizer_json, select_pending
from embedsurgery.tokenizer.encoding import check_encodings
from embedsurgery.tokenizer.sidecars import refuse_roles

_STATE = ("_added_tokens_decoder", "_added_tokens_encoder", "_extra_special_tokens", "total_vocab_size")
_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


def slow_content_of(tokenizer: Any) -> TokenizerJson:
    """Return a slow tokenizer's tokens as the content of a ``tokenizer.json``, so that the same checks apply.

    All texts are in the model's vocabulary there.

    Raises:
        UnsupportedError: The tokenizer does not have the private attributes of transformers' slow tokenizers.
    """
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if not all(attribute in vars(tokenizer) for attribute in ("tokens_trie", *_STATE)):
        raise UnsupportedError(
            "this kind of tokenizer is not supported",
            where=name,
            found=type(tokenizer).__name__,
            hint="use a fast tokenizer, which has a tokenizer.json",
        )
    added = tokenizer.added_tokens_decoder.items()
    entries = [{"id": index, **{field: getattr(t, field) for field in _FIELDS}} for index, t in added]
    unknown = getattr(tokenizer, "unk_token", None)
    model = {"vocab": tokenizer.get_vocab(), "unk_token": unknown}
    return TokenizerJson({"model": model, "added_tokens": entries}, name)


def roles_of(tokenizer: Any) -> dict[str, str]:
    """Return role -> text of the tokens that have a role."""
    return {role: text for role, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}


def change_slow(tokenizer: Any, edit: AddTokens) -> None:
    """Edit a slow tokenizer in place, with the errors of `live.change_tokens`."""
    content = slow_content_of(tokenizer)
    tokens = select_pending(content, edit.tokens, edit.remove)
    replaced = [token.replaces for token in tokens if token.replaces is not None]
    if replaced:
        raise UnsupportedError(
            "a slow tokenizer cannot rename its tokens",
            where=f"{content.where}: {replaced[0]!r}",
            hint="use the model's fast tokenizer, or add the token at a new id",
        )
    refuse_roles(roles_of(tokenizer), (), tokens, edit.remove, content.where)
    if edit.remove:
        _remove_slow(tokenizer, content, AddTokens(tuple(tokens), remove=True))
    elif tokens:
        edit_tokenizer_json(content, tokens)  # for its checks only
        _add_slow(tokenizer, content, AddTokens(tuple(tokens)))


def _add_slow(tokenizer: Any, content: TokenizerJson, edit: AddTokens) -> None:
    from tokenizers import AddedToken  # transformers depends on it

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))

    tokens = sorted(edit.tokens, key=lambda token: token.id)
    texts = [token.content for token in tokens] + [entry["content"] for entry in content.added]
    # Encoded now: there is only one tokenizer, and it is edited in place.
    old = {text: encode(text) for text in texts}
    saved, trie_texts = {name: copy(vars(tokenizer)[name]) for name in _STATE}, set(tokenizer.tokens_trie._tokens)
    try:
        for token in tokens:
            tokenizer.add_tokens([AddedToken(**added_token_fields(token))], special_tokens=token.special)
            found = tokenizer.added_tokens_encoder.get(token.content, "another text")
            if found != token.id:
                raise ConfigError(
                    "the tokenizer changes this text, or assigns another id to it",
                    where=f"{content.where}: {token.content!r}",
                    expected=token.id,
                    found=found,
                    hint="write it as the tokenizer normalises it, or make it special",
                )
        check_encodings(tokens, content, lambda: old.__getitem__, lambda: encode)
    except BaseException:  # an interrupt too
        _set_state(tokenizer, saved, trie_texts)
        raise


def _remove_slow(tokenizer: Any, content: TokenizerJson, edit: AddTokens) -> None:
    # The tokenizer's next id is the number of its tokens, so a gap would give that of an existing token.
    last = len(content.ids) - len(edit.tokens)
    for token in edit.tokens:
        entry, expected = content.entry(token.content), {"id": token.id, **added_token_fields(token)}
        if entry != expected or token.id < last:
            raise PlanError(
                "a token to remove differs from the one that was added, or is not among the last",
                where=f"{content.where}: {token.content!r}",
                expected=expected,
                found=entry,
                hint="remove tokens in the reverse order",
            )
    removed = {token.content for token in edit.tokens}
    decoder = {index: t for index, t in tokenizer._added_tokens_decoder.items() if t.content not in removed}
    encoder = {text: index for text, index in tokenizer._added_tokens_encoder.items() if text not in removed}
    extra = [token for token in tokenizer._extra_special_tokens if str(token) not in removed]
    state = dict(zip(_STATE, (decoder, encoder, extra, len(content.ids) - len(removed)), strict=True))
    _set_state(tokenizer, state, set(tokenizer.tokens_trie._tokens) - removed)


def _set_state(tokenizer: Any, state: dict[str, Any], texts: set[str]) -> None:
    """Set the tokenizer's dictionaries, and rebuild the trie that finds ``texts``: it cannot remove a text."""
    vars(tokenizer).update(state)
    trie = type(tokenizer.tokens_trie)()
    for text in sorted(texts):
        trie.add(text)
    tokenizer.tokens_trie = trie

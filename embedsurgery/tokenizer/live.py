"""Reads a transformers tokenizer in memory, adds tokens to it and removes them.

A fast tokenizer is edited as its ``tokenizer.json`` would be (``edit.py``): the backend is serialised, edited, loaded
and checked before it replaces the old one, so that an error leaves the tokenizer as it was. ``slow.py`` edits slow
tokenizers, and ``patching.py`` the files of a checkpoint. Nothing here imports transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from embedsurgery.errors import ConfigError, UnsupportedError
from embedsurgery.plan import AddTokens
from embedsurgery.tokenizer.classes import DYNAMIC_CLASSES, dynamic_class_error, short_name
from embedsurgery.tokenizer.content import TokenizerJson
from embedsurgery.tokenizer.edit import edit_tokenizer_json, plan_undo, select_pending
from embedsurgery.tokenizer.encoding import check_encodings, load_backend, make_encode
from embedsurgery.tokenizer.prefix import add_to_chat_template, add_to_post_processor, refuse_existing_prefix
from embedsurgery.tokenizer.sidecars import edit_extra_items, edit_extra_tokens, find_replaceable_ids, refuse_roles
from embedsurgery.tokenizer.slow import change_slow, roles_of, slow_content_of

if TYPE_CHECKING:
    from embedsurgery.tokenizer.known import KnownTokens

PROCESSOR, TEMPLATE = "post_processor", "chat_template"
"""The parts of a tokenizer that a prefix changes: a key of its ``tokenizer.json``, and its attribute."""


def token_texts_of(tokenizer: Any) -> dict[int, str]:
    """Return id -> text of every token, added ones included."""
    return {index: text for text, index in _unwrap(tokenizer).get_vocab().items()}


def next_id_of(tokenizer: Any) -> int:
    """Return the id of the next added token."""
    tokenizer = _unwrap(tokenizer)
    if not _is_fast(tokenizer):
        return len(tokenizer)
    inner = tokenizer.backend_tokenizer
    added = (index + 1 for index in inner.get_added_tokens_decoder())
    return int(max([inner.get_vocab_size(with_added_tokens=False), *added]))


def fits_table(tokenizer: Any, rows: int) -> bool:
    """Whether a table of ``rows`` rows has one for each of the tokenizer's ids."""
    return max(token_texts_of(tokenizer), default=-1) < rows


def encode_plain(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text, without special tokens around it, truncation and padding."""
    tokenizer = _unwrap(tokenizer)
    if not _is_fast(tokenizer):
        return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))
    with _without_padding(tokenizer.backend_tokenizer) as inner:
        return make_encode(inner)(text)


def known_tokens_of(tokenizer: Any) -> KnownTokens:
    """Return what planning new tokens must know of a tokenizer."""
    from embedsurgery.tokenizer.known import KnownTokens

    texts = token_texts_of(tokenizer)
    unknown = _unwrap(tokenizer).unk_token_id
    return KnownTokens(
        texts,
        next_id_of(tokenizer),
        lambda text: encode_plain(tokenizer, text),
        unknown,
        _name_of(tokenizer),
        lambda: replaceable_ids_of(tokenizer),
        lambda: _special_ids_of(tokenizer),
    )


def _special_ids_of(tokenizer: Any) -> set[int]:
    """Return the ids of the added tokens that are special."""
    return {index for index, token in _unwrap(tokenizer).added_tokens_decoder.items() if token.special}


def replaceable_ids_of(tokenizer: Any) -> tuple[int, ...]:
    """Return the ids of the reserved tokens ("[unused7]") that a new token may replace, ascending."""
    tokenizer = _unwrap(tokenizer)
    if not _is_fast(tokenizer):
        return ()
    return find_replaceable_ids(_content_of(tokenizer), roles_of(tokenizer).values(), _templates_of(tokenizer))


def undo_of(tokenizer: Any, edit: AddTokens) -> tuple[AddTokens, ...]:
    """Return the edits that undo this one, in order. Call it before the edit is done.

    Raises:
        EmbedSurgeryError: As `change_tokens`, if the tokenizer cannot be read.
    """
    tokenizer = _unwrap(tokenizer)
    if not _is_fast(tokenizer):
        return plan_undo(slow_content_of(tokenizer), edit)
    content = _content_of(tokenizer)
    edits = plan_undo(content, edit)
    if edit.prefix is None and not edit.restore_parts:
        return edits
    parts = {PROCESSOR: content.body.get(PROCESSOR), TEMPLATE: getattr(tokenizer, TEMPLATE, None)}
    first = edits[0] if edits else AddTokens((), remove=not edit.remove)
    return (replace(first, restore_parts=parts), *edits[1:])


def change_tokens(tokenizer: Any, edit: AddTokens) -> None:
    """Edit a tokenizer in place. Tokens that it has already (or, to remove, lacks already) are skipped.

    Args:
        tokenizer: A transformers tokenizer, or a processor that has one.
        edit: The tokens to add or remove, with their ids.

    Raises:
        ConfigError: A text is empty, repeated or one token already, or would not become its one id.
        PlanError: An id or a text is taken, or the tokenizer would assign another id.
        UnsupportedError: A token to replace or remove is in use, or this tokenizer does not support the edit.
    """
    tokenizer = _unwrap(tokenizer)
    if not _is_fast(tokenizer):
        if edit.prefix is not None and edit.prefix.texts:
            raise UnsupportedError(
                "a slow tokenizer has no post-processor, so it cannot prepend a prefix",
                where=_name_of(tokenizer),
                found=type(tokenizer).__name__,
                hint="use the model's fast tokenizer, or bake without a prefix and write the markers into the text",
            )
        change_slow(tokenizer, edit)
        return
    content = _content_of(tokenizer)
    tokens = select_pending(content, edit.tokens, edit.remove)
    if not tokens and edit.prefix is None and not edit.restore_parts:
        return
    refuse_roles(roles_of(tokenizer), _templates_of(tokenizer), tokens, edit.remove, content.where)
    extra = _extra_tokens_of(tokenizer)
    texts = [str(token) for token in extra]
    texts_after = edit_extra_tokens(texts, tokens, content, edit.remove)
    extra_after = edit_extra_items(extra, texts, texts_after, _rename_extra_token)
    old = tokenizer.backend_tokenizer
    body = edit_tokenizer_json(content, tokens, edit.remove)
    template = _edit_prefix(tokenizer, content, body, edit)
    new = _rebuild_backend(old, content, body)
    if not edit.remove:
        with _without_padding(old):
            check_encodings(tokens, content, lambda: make_encode(old), lambda: make_encode(new))
    _set_encoding_options(new, old.truncation, old.padding, old.encode_special_tokens)
    tokenizer._tokenizer = new  # backend_tokenizer is read-only
    extra[:] = extra_after  # in place: transformers holds the list
    if edit.prefix is not None or edit.restore_parts:
        setattr(tokenizer, TEMPLATE, template)


def _edit_prefix(tokenizer: Any, content: TokenizerJson, body: dict[str, Any], edit: AddTokens) -> Any:
    """Edit the post-processor in ``body`` as the edit's prefix requires, and return the new chat templates."""
    if edit.restore_parts:
        body[PROCESSOR] = edit.restore_parts.get(PROCESSOR)
        return edit.restore_parts.get(TEMPLATE)
    template, prefix = getattr(tokenizer, TEMPLATE, None), edit.prefix
    if prefix is None:
        return template
    refuse_existing_prefix(content.body.get(PROCESSOR), _templates_of(tokenizer), prefix.contents, content.where)
    if not prefix.texts and not template:
        raise UnsupportedError(
            "this tokenizer has no chat template to add the prompt to",
            where=content.where,
            hint="prepend the prompt to every text, or write the markers into the text",
        )
    if prefix.texts:
        if short_name(type(tokenizer).__name__) in DYNAMIC_CLASSES:
            raise dynamic_class_error(type(tokenizer).__name__, content.where)
        body[PROCESSOR] = add_to_post_processor(content.body.get(PROCESSOR), prefix, content.where)
    if not prefix.chats or not template:
        return template
    bos = roles_of(tokenizer).get("bos_token")
    if isinstance(template, dict):
        return {name: add_to_chat_template(text, prefix, bos, content.where) for name, text in template.items()}
    return add_to_chat_template(template, prefix, bos, content.where)


def _unwrap(tokenizer: Any) -> Any:
    """Return the tokenizer itself, or the one inside a processor.

    Raises:
        ConfigError: It is neither a tokenizer of transformers nor a processor with one.
    """
    # A tokenizer of the tokenizers library has get_vocab too, but no roles: only transformers' are supported.
    inner = tokenizer if hasattr(tokenizer, "get_vocab") else getattr(tokenizer, "tokenizer", None)
    if not hasattr(inner, "get_vocab") or not hasattr(inner, "special_tokens_map"):
        raise ConfigError(
            "this is not a tokenizer of transformers",
            found=type(tokenizer).__name__,
            expected="a tokenizer, or a processor that has one",
            hint="load one with AutoTokenizer.from_pretrained(...)",
        )
    return inner


def _is_fast(tokenizer: Any) -> bool:
    return hasattr(getattr(tokenizer, "backend_tokenizer", None), "to_str")


def _name_of(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__


def _content_of(tokenizer: Any) -> TokenizerJson:
    """Return the content that a fast tokenizer's ``tokenizer.json`` would have.

    Raises:
        UnsupportedError: A part of it is written in Python and cannot be serialised.
    """
    try:
        text = tokenizer.backend_tokenizer.to_str()
    except Exception as error:  # the library raises plain Exceptions
        raise UnsupportedError(
            "this tokenizer cannot be serialised as tokenizer.json", where=_name_of(tokenizer), found=str(error)[:200]
        ) from error
    return TokenizerJson(json.loads(text), _name_of(tokenizer))


def _rebuild_backend(old: Any, content: TokenizerJson, body: Mapping[str, Any]) -> Any:
    """Load a backend with new content, without truncation and padding.

    The old model object is kept if its vocabulary does not change, and a Unigram model is rebuilt from the parsed
    scores if it does. Loading alone would lose what the JSON does not have (how a model samples), and the library does
    not read back every float that it writes: some scores of a Unigram model would change in their last bit.
    """
    new = load_backend(json.dumps(body, ensure_ascii=False), content.where)
    model = body["model"]
    if model is content.body["model"]:
        new.model = old.model
    elif isinstance(model["vocab"], list):
        scores = [(piece[0], piece[1]) for piece in model["vocab"]]
        new.model = type(old.model)(scores, model.get("unk_id"), model.get("byte_fallback", False))
        for name in ("alpha", "nbest_size"):
            if hasattr(old.model, name):
                setattr(new.model, name, getattr(old.model, name))
    return new


def _templates_of(tokenizer: Any) -> list[str]:
    """Return the chat templates of a tokenizer, which has none, one, or several by name."""
    template = getattr(tokenizer, "chat_template", None)
    return list(template.values()) if isinstance(template, dict) else [template] if template else []


def _extra_tokens_of(tokenizer: Any) -> list[Any]:
    """Return the tokenizer's list of extra special tokens, each a string or the library's AddedToken."""
    state = vars(tokenizer)
    in_version_4 = state.get("_special_tokens_map", {}).get("additional_special_tokens")
    found = state.get("_extra_special_tokens", in_version_4)
    return found if isinstance(found, list) else []


def _rename_extra_token(item: Any, text: str) -> Any:
    """Return an extra token with another text."""
    return text if isinstance(item, str) else type(item)(**{**item.__getstate__(), "content": text})


@contextmanager
def _without_padding(inner: Any) -> Iterator[Any]:
    """Within the context, a backend does not pad, truncate or split special tokens."""
    truncation, padding, split = inner.truncation, inner.padding, inner.encode_special_tokens
    inner.no_truncation()
    inner.no_padding()
    inner.encode_special_tokens = False
    try:
        yield inner
    finally:
        _set_encoding_options(inner, truncation, padding, split)


def _set_encoding_options(inner: Any, truncation: Any, padding: Any, split: bool) -> None:
    if truncation is not None:
        inner.enable_truncation(**truncation)
    if padding is not None:
        inner.enable_padding(**padding)
    inner.encode_special_tokens = split

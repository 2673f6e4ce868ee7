"""A transformers tokenizer in memory: what it knows, and tokens that enter it and leave it again.

A fast tokenizer is changed as its ``tokenizer.json`` would be (``tokenizer_edit.py``): the backend is written out,
changed, loaded and tried before it takes the old one's place, so that nothing has to be taken back. A slow one is
changed through its own ``add_tokens`` and its dictionaries (``slow_tokenizer.py``). Nothing here imports transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from embedsurgery.errors import ConfigError, UnsupportedError
from embedsurgery.plan import AddTokens
from embedsurgery.tokenizer.classes import AS_THEY_RUN, as_it_runs, short_name
from embedsurgery.tokenizer.content import TokenizerJson
from embedsurgery.tokenizer.edit import change, undone, unsettled
from embedsurgery.tokenizer.encoding import backend, check_encodings, encoder
from embedsurgery.tokenizer.prefix import put_first, put_first_in_chat, refuse_held
from embedsurgery.tokenizer.sidecars import free_reserved, refuse_roles, relisted, relisted_items
from embedsurgery.tokenizer.slow import change_slow, roles_of, slow_content

if TYPE_CHECKING:
    from embedsurgery.tokenizer.known import KnownTokens

PROCESSOR, TEMPLATE = "post_processor", "chat_template"
"""Parts of a tokenizer that change where tokens are put before every text: as in its file, and its attribute."""


def texts(tokenizer: Any) -> dict[int, str]:
    """Id -> text of every token, added ones included."""
    return {index: text for text, index in _plain(tokenizer).get_vocab().items()}


def next_id(tokenizer: Any) -> int:
    """The id that the next added token gets."""
    tokenizer = _plain(tokenizer)
    if not _is_fast(tokenizer):
        return len(tokenizer)
    inner = tokenizer.backend_tokenizer
    added = (index + 1 for index in inner.get_added_tokens_decoder())
    return int(max([inner.get_vocab_size(with_added_tokens=False), *added]))


def fits(tokenizer: Any, rows: int) -> bool:
    """Whether a table with so many rows has one for each of the tokenizer's ids."""
    return max(texts(tokenizer), default=-1) < rows


def encode_plain(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text, without special tokens around it, truncation and padding."""
    tokenizer = _plain(tokenizer)
    if not _is_fast(tokenizer):
        return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))
    with _unpadded(tokenizer.backend_tokenizer) as inner:
        return encoder(inner)(text)


def known_tokens(tokenizer: Any) -> KnownTokens:
    """What planning new tokens needs of a tokenizer."""
    from embedsurgery.tokenizer.known import KnownTokens

    known = texts(tokenizer)
    unknown = _plain(tokenizer).unk_token_id
    return KnownTokens(
        known,
        next_id(tokenizer),
        lambda text: encode_plain(tokenizer, text),
        unknown,
        _name(tokenizer),
        lambda: replaceable(tokenizer),
        lambda: _specials(tokenizer),
    )


def _specials(tokenizer: Any) -> set[int]:
    """Ids of the added tokens that are special."""
    return {index for index, token in _plain(tokenizer).added_tokens_decoder.items() if token.special}


def replaceable(tokenizer: Any) -> tuple[int, ...]:
    """Ids of the reserved tokens ("[unused7]") that nothing names and a new token may replace, ascending."""
    tokenizer = _plain(tokenizer)
    if not _is_fast(tokenizer):
        return ()
    return free_reserved(_content(tokenizer), roles_of(tokenizer).values(), _templates(tokenizer))


def undo_of(tokenizer: Any, edit: AddTokens) -> tuple[AddTokens, ...]:
    """The edits that take this one back, in order; asked for before it is done.

    Raises:
        EmbedSurgeryError: As `change_tokens`, where the tokenizer cannot be read.
    """
    tokenizer = _plain(tokenizer)
    if not _is_fast(tokenizer):
        return undone(slow_content(tokenizer), edit)
    content = _content(tokenizer)
    edits = undone(content, edit)
    if edit.prefix is None and not edit.restore_parts:
        return edits
    parts = {PROCESSOR: content.body.get(PROCESSOR), TEMPLATE: getattr(tokenizer, TEMPLATE, None)}
    first = edits[0] if edits else AddTokens((), remove=not edit.remove)
    return (replace(first, restore_parts=parts), *edits[1:])


def change_tokens(tokenizer: Any, edit: AddTokens) -> None:
    """Tokens enter a tokenizer, or leave it, in place; those that are there (or gone) already change nothing.

    Args:
        tokenizer: A transformers tokenizer, or a processor that has one.
        edit: The tokens, with the ids that they are to have.

    Raises:
        ConfigError: A text that is empty, comes twice, is one token already, or would not become its one id.
        PlanError: An id or a text that is taken, or that the tokenizer would not give.
        UnsupportedError: A token to be replaced or to leave that is in use; a tokenizer that cannot be changed so.
    """
    tokenizer = _plain(tokenizer)
    if not _is_fast(tokenizer):
        if edit.prefix is not None and edit.prefix.texts:
            raise UnsupportedError(
                "a slow tokenizer has no post-processor that tokens could be put into",
                where=_name(tokenizer),
                found=type(tokenizer).__name__,
                hint="use the model's fast tokenizer, or bake without a prefix and write the markers into the text",
            )
        change_slow(tokenizer, edit)
        return
    content = _content(tokenizer)
    tokens = unsettled(content, edit.tokens, edit.remove)
    if not tokens and edit.prefix is None and not edit.restore_parts:
        return
    refuse_roles(roles_of(tokenizer), _templates(tokenizer), tokens, edit.remove, content.where)
    listed = _listed(tokenizer)
    names = [str(token) for token in listed]
    relist = relisted_items(listed, names, relisted(names, tokens, content, edit.remove), _renamed)
    old = tokenizer.backend_tokenizer
    body = change(content, tokens, edit.remove)
    template = _with_parts(tokenizer, content, body, edit)
    new = _rebuilt(old, content, body)
    if not edit.remove:
        with _unpadded(old):
            check_encodings(tokens, content, lambda: encoder(old), lambda: encoder(new))
    _set(new, old.truncation, old.padding, old.encode_special_tokens)
    tokenizer._tokenizer = new
    listed[:] = relist
    if edit.prefix is not None or edit.restore_parts:
        setattr(tokenizer, TEMPLATE, template)


def _with_parts(tokenizer: Any, content: TokenizerJson, body: dict[str, Any], edit: AddTokens) -> Any:
    """Put another post-processor into the body, where the edit says so; returns the chat templates as they become."""
    if edit.restore_parts:
        body[PROCESSOR] = edit.restore_parts.get(PROCESSOR)
        return edit.restore_parts.get(TEMPLATE)
    template, prefix = getattr(tokenizer, TEMPLATE, None), edit.prefix
    if prefix is None:
        return template
    refuse_held(content.body.get(PROCESSOR), _templates(tokenizer), prefix.contents, content.where)
    if not prefix.texts and not template:
        raise UnsupportedError(
            "this tokenizer has no chat template to put the prompt into",
            where=content.where,
            hint="put it before every text, or write the markers into the text",
        )
    if prefix.texts:
        if short_name(type(tokenizer).__name__) in AS_THEY_RUN:
            raise as_it_runs(type(tokenizer).__name__, content.where)
        body[PROCESSOR] = put_first(content.body.get(PROCESSOR), prefix, content.where)
    if not prefix.chats or not template:
        return template
    bos = roles_of(tokenizer).get("bos_token")
    if isinstance(template, dict):
        return {name: put_first_in_chat(text, prefix, bos, content.where) for name, text in template.items()}
    return put_first_in_chat(template, prefix, bos, content.where)


def _plain(tokenizer: Any) -> Any:
    """The tokenizer itself, or the one that a processor has."""
    inner = tokenizer if hasattr(tokenizer, "get_vocab") else getattr(tokenizer, "tokenizer", None)
    if not hasattr(inner, "get_vocab") or not hasattr(inner, "special_tokens_map"):
        raise ConfigError(
            "no tokenizer of transformers",
            found=type(tokenizer).__name__,
            expected="a tokenizer, or a processor that has one",
            hint="AutoTokenizer.from_pretrained(...) gives one",
        )
    return inner


def _is_fast(tokenizer: Any) -> bool:
    return hasattr(getattr(tokenizer, "backend_tokenizer", None), "to_str")


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__


def _content(tokenizer: Any) -> TokenizerJson:
    """What a fast tokenizer's file would say.

    Raises:
        UnsupportedError: A part of it is written in Python and cannot be written out.
    """
    try:
        text = tokenizer.backend_tokenizer.to_str()
    except Exception as error:  # the library raises nothing narrower
        raise UnsupportedError(
            "a tokenizer that cannot be written out as tokenizer.json", where=_name(tokenizer), found=str(error)[:200]
        ) from error
    return TokenizerJson(json.loads(text), _name(tokenizer))


def _rebuilt(old: Any, content: TokenizerJson, body: Mapping[str, Any]) -> Any:
    """A backend with another content, without truncation and padding.

    The old model is taken over unless its vocabulary changes: what it does not write out (how it samples) is kept, and
    the library reads the scores of a Unigram model back with their last bit off.
    """
    new = backend(json.dumps(body, ensure_ascii=False), content.where)
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


def _templates(tokenizer: Any) -> list[str]:
    """The chat templates of a tokenizer: none, one, or several by name."""
    template = getattr(tokenizer, "chat_template", None)
    return list(template.values()) if isinstance(template, dict) else [template] if template else []


def _listed(tokenizer: Any) -> list[Any]:
    """The tokenizer's own list of extra special tokens, each a text or the library's AddedToken."""
    state = vars(tokenizer)
    old_name = state.get("_special_tokens_map", {}).get("additional_special_tokens")  # before transformers 5
    found = state.get("_extra_special_tokens", old_name)
    return found if isinstance(found, list) else []


def _renamed(item: Any, text: str) -> Any:
    """A listed token under another text."""
    return text if isinstance(item, str) else type(item)(**{**item.__getstate__(), "content": text})


@contextmanager
def _unpadded(inner: Any) -> Iterator[Any]:
    """A backend that neither pads nor truncates nor takes special tokens apart, for a while."""
    truncation, padding, apart = inner.truncation, inner.padding, inner.encode_special_tokens
    inner.no_truncation()
    inner.no_padding()
    inner.encode_special_tokens = False
    try:
        yield inner
    finally:
        _set(inner, truncation, padding, apart)


def _set(inner: Any, truncation: Any, padding: Any, apart: bool) -> None:
    if truncation is not None:
        inner.enable_truncation(**truncation)
    if padding is not None:
        inner.enable_padding(**padding)
    inner.encode_special_tokens = apart

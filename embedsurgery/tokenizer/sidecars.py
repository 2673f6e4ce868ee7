"""Edits what refers to tokens outside ``tokenizer.json``: the files beside it, and lists and roles in memory.

Parsed JSON in, new JSON out. ``patching.py`` decides which file is edited and makes its bytes. ``live.py`` applies the
rules for the extra special tokens and the roles that transformers keeps for a tokenizer in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedsurgery.errors import CheckpointError, UnsupportedError
from embedsurgery.plan import Token
from embedsurgery.tokenizer.content import TokenizerJson
from embedsurgery.tokenizer.edit import find_uses, refuse_used

_EXTRA_KEYS = ("extra_special_tokens", "additional_special_tokens")


@dataclass(frozen=True)
class SidecarEdit:
    """An edit of a tokenizer, for the files beside its ``tokenizer.json``.

    Attributes:
        content: The old content of ``tokenizer.json``.
        tokens: The tokens, without those that it has (or, to remove, lacks) already.
        remove: Whether to remove them.
        entries: Text -> entry of the new ``added_tokens``.
    """

    content: TokenizerJson
    tokens: Sequence[Token]
    remove: bool
    entries: Mapping[str, dict[str, Any]]

    def edit_config(self, body: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """Return the new content of ``tokenizer_config.json`` or ``special_tokens_map.json``.

        Raises:
            CheckpointError: It contradicts ``tokenizer.json``.
            UnsupportedError: It gives a role to a token to replace or remove.
        """
        refuse_roles(roles_in(body), templates_in(body.get("chat_template")), self.tokens, self.remove, path)
        after = dict(body)
        for key in _EXTRA_KEYS:
            if isinstance(body.get(key), list):
                after[key] = self._edit_list(body[key])
        if isinstance(body.get("added_tokens_decoder"), dict):
            after["added_tokens_decoder"] = self._edit_decoder(body["added_tokens_decoder"], path)
        return after

    def edit_added_tokens(self, body: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """Return the new content of ``added_tokens.json``, {text: id}, which omits tokens of the model's vocabulary.

        Raises:
            CheckpointError: It contradicts ``tokenizer.json``.
        """
        after = dict(body)
        for token in self.tokens:
            if self.remove:
                after.pop(token.content, None)
                continue
            if token.replaces in after:
                after = {token.content if text == token.replaces else text: index for text, index in after.items()}
            elif token.replaces is None:
                after.setdefault(token.content, token.id)
            if after.get(token.content, token.id) != token.id:
                raise _contradiction_error(path, token, after[token.content])
        return after

    def _edit_list(self, items: list[Any]) -> list[Any]:
        """Return the new list of extra special tokens, each a string or an object with a content."""
        texts = [str(_text_of(item)) for item in items]
        after = edit_extra_tokens(texts, self.tokens, self.content, self.remove)
        return edit_extra_items(items, texts, after, _rename_item)

    def _edit_decoder(self, decoder: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """Return the new ``added_tokens_decoder``, ordered by id: {"7": {"content": "<tool>", ...}}."""
        after = dict(decoder)
        for token in self.tokens:
            key = str(token.id)
            entry = after.get(key)
            found = _text_of(entry)
            if entry is not None and found not in (token.content, token.replaces):
                raise _contradiction_error(path, token, found)
            if self.remove:
                after.pop(key, None)
            elif entry is None:
                new = {name: value for name, value in self.entries[token.content].items() if name != "id"}
                after = _insert_by_id({**after, key: new}, key)
            elif isinstance(entry, dict):
                after[key] = {**entry, "content": token.content, "special": token.special}
        return after


def edit_extra_tokens(
    texts: Sequence[str], tokens: Sequence[Token], content: TokenizerJson, remove: bool = False
) -> list[str]:
    """Return the new texts of a list of extra special tokens, which transformers keeps beside the tokenizer.

    A new special token is appended if the list is not empty. A token that replaces a listed one takes its position.

    Args:
        texts: The texts in the list.
        tokens: The tokens to add or remove.
        content: The old content of ``tokenizer.json``.
        remove: Whether to remove them.

    Raises:
        UnsupportedError: A token that is not special would replace a listed one: transformers would make it special.
    """
    after = list(texts)
    for token in tokens:
        if remove:
            after = [text for text in after if text != token.content]
        elif token.replaces in after:
            if not token.special:
                raise UnsupportedError(
                    "a token that is not special cannot replace an extra special token",
                    where=f"{content.where}: {token.replaces!r}",
                    found=repr(token.content),
                    hint=f"add {token.content!r} as a special token, or with another id",
                )
            after = [token.content if text == token.replaces else text for text in after]
        elif after and token.special and token.content not in after:
            # If an added token was not listed, the one that replaces it is not either.
            unlisted = token.replaces is not None and content.entry(token.replaces) is not None
            after += [] if unlisted else [token.content]
    return after


def edit_extra_items(
    items: Sequence[Any], old: Sequence[str], new: Sequence[str], rename: Callable[[Any, str], Any]
) -> list[Any]:
    """Return a list of extra special tokens, in whatever form, with the texts that `edit_extra_tokens` returned.

    Args:
        items: The items of the old list.
        old: Their texts.
        new: The new texts.
        rename: Returns an item with another text.
    """
    if len(new) < len(old):
        return [item for item, text in zip(items, old, strict=True) if text in new]
    kept = (
        item if before == after else rename(item, after) for item, before, after in zip(items, old, new, strict=False)
    )
    return [*kept, *new[len(old) :]]


def refuse_roles(
    roles: Mapping[str, str], templates: Sequence[str], tokens: Sequence[Token], remove: bool, where: object
) -> None:
    """Refuse to remove or replace a token that has a role, or to replace one that a chat template writes.

    Args:
        roles: Role -> text: {"pad_token": "[PAD]"}.
        templates: Chat templates.
        tokens: The tokens to add or remove.
        remove: Whether to remove them.
        where: Name or path of the tokenizer, for messages.

    Raises:
        UnsupportedError: A token is in use. The error has its roles.
    """
    for token in tokens:
        text = token.content if remove else token.replaces
        if text is not None:
            uses = [role for role, name in roles.items() if name == text]
            uses += ["chat_template" for template in templates if text in template and not remove]
            refuse_used(uses, where, text)


def find_replaceable_ids(content: TokenizerJson, roles: Iterable[str], templates: Sequence[str]) -> tuple[int, ...]:
    """Return the ids of the reserved tokens that nothing refers to, so that a new token may replace them, ascending.

    Args:
        content: The content of ``tokenizer.json``.
        roles: Texts that have a role.
        templates: Chat templates.
    """
    texts = {content.texts[index]: index for index in content.reserved}
    in_use = {*find_uses(content, texts), *roles, *(text for text in texts if any(text in t for t in templates))}
    return tuple(index for text, index in texts.items() if text not in in_use)


def _rename_item(item: Any, text: str) -> Any:
    return {**item, "content": text} if isinstance(item, dict) else text


def _insert_by_id(decoder: dict[str, Any], new: str) -> dict[str, Any]:
    """Return the decoder with its new key moved before the first higher id."""
    # Compared as strings, the shorter first: a broken file may have keys of thousands of digits, which int() refuses.
    above = next((key for key in decoder if key.isdecimal() and (len(key), key) > (len(new), new)), None)
    if above is None:
        return decoder
    ordered = {}
    for key, entry in decoder.items():
        if key == above:
            ordered[new] = decoder[new]
        if key != new:
            ordered[key] = entry
    return ordered


def _contradiction_error(path: Path, token: Token, found: object) -> CheckpointError:
    return CheckpointError(
        "this file contradicts tokenizer.json",
        where=f"{path}: {token.content!r}",
        expected=f"{token.replaces!r} or no token with id {token.id}" if token.replaces else token.id,
        found=repr(found),
        hint="load and save the tokenizer with transformers",
    )


def _text_of(item: Any) -> Any:
    """Return the text of a token that is a string or an object."""
    return item.get("content") if isinstance(item, dict) else item


def roles_in(body: Mapping[str, Any]) -> dict[str, str]:
    """Return role -> text of the tokens that have a role in a config."""
    roles = {key: _text_of(value) for key, value in body.items() if key.endswith("_token")}
    for key in (*_EXTRA_KEYS, "model_specific_special_tokens"):
        if isinstance(body.get(key), dict):
            roles.update({role: _text_of(value) for role, value in body[key].items()})
    if body.get("extra_ids") and isinstance(body.get("additional_special_tokens"), list):
        # transformers 4 counts T5's sentinel tokens when it loads them, and fails if one is missing
        listed = map(_text_of, body["additional_special_tokens"])
        roles.update({f"extra_ids: {text}": text for text in listed if "<extra_id_" in str(text)})
    return {role: text for role, text in roles.items() if isinstance(text, str)}


def templates_in(value: Any) -> list[str]:
    """Return the chat templates of a config, which has one string or a list of {"name", "template"}."""
    if isinstance(value, list):
        return [text for item in value if isinstance(item, dict) for text in templates_in(item.get("template"))]
    return [value] if isinstance(value, str) else []


def map_templates(value: Any, change: Callable[[str], str]) -> Any:
    """Apply a function to each chat template of a config."""
    if isinstance(value, list):
        return [
            {**item, "template": map_templates(item.get("template"), change)} if isinstance(item, dict) else item
            for item in value
        ]
    return change(value) if isinstance(value, str) else value

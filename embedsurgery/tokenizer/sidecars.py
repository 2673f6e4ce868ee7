"""What lies beside ``tokenizer.json`` and names tokens too: the new content of those files when tokens come or go.

Also the roles and lists that transformers keeps beside a tokenizer in memory. Parsed JSON in, parsed JSON out; which
file is there, and its bytes, is ``tokenizer_files.py``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedsurgery.errors import CheckpointError, UnsupportedError
from embedsurgery.plan import Token
from embedsurgery.tokenizer.content import TokenizerJson
from embedsurgery.tokenizer.edit import refuse_used, used

_LISTS = ("extra_special_tokens", "additional_special_tokens")


@dataclass(frozen=True)
class Beside:
    """A change of the tokenizer, for the files beside it.

    Attributes:
        content: Of ``tokenizer.json``, from before.
        tokens: What comes or goes, and is not there (or gone) already.
        remove: They leave.
        entries: Text -> entry of ``added_tokens``, from afterwards.
    """

    content: TokenizerJson
    tokens: Sequence[Token]
    remove: bool
    entries: Mapping[str, dict[str, Any]]

    def config(self, body: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """``tokenizer_config.json`` or ``special_tokens_map.json`` afterwards.

        Raises:
            CheckpointError: It contradicts ``tokenizer.json``.
            UnsupportedError: It gives a role to a token that is to be replaced or to leave.
        """
        refuse_roles(roles_in(body), templates_in(body.get("chat_template")), self.tokens, self.remove, path)
        after = dict(body)
        for key in _LISTS:
            if isinstance(body.get(key), list):
                after[key] = self._list(body[key])
        if isinstance(body.get("added_tokens_decoder"), dict):
            after["added_tokens_decoder"] = self._decoder(body["added_tokens_decoder"], path)
        return after

    def added_ids(self, body: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """``added_tokens.json`` afterwards, {text: id}: it lists only tokens beyond the model's vocabulary.

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
                raise _contradiction(path, token, after[token.content])
        return after

    def _list(self, listed: list[Any]) -> list[Any]:
        """A list of extra special tokens, each a text or an object with a content."""
        texts = [str(_content(item)) for item in listed]
        after = relisted(texts, self.tokens, self.content, self.remove)
        return relisted_items(listed, texts, after, _renamed)

    def _decoder(self, decoder: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """``added_tokens_decoder``: {"7": {"content": "<tool>", ...}}, by ids."""
        after = dict(decoder)
        for token in self.tokens:
            key = str(token.id)
            entry = after.get(key)
            found = _content(entry)
            if entry is not None and found not in (token.content, token.replaces):
                raise _contradiction(path, token, found)
            if self.remove:
                after.pop(key, None)
            elif entry is None:
                new = {name: value for name, value in self.entries[token.content].items() if name != "id"}
                after = _by_id({**after, key: new}, key)
            elif isinstance(entry, dict):
                after[key] = {**entry, "content": token.content, "special": token.special}
        return after


def relisted(listed: Sequence[str], tokens: Sequence[Token], content: TokenizerJson, remove: bool = False) -> list[str]:
    """The texts of a list of extra special tokens, as transformers keeps it beside the tokenizer, after a change.

    A list that is there gets each new special token; a token that replaces a listed one takes its place.

    Args:
        listed: The texts as they are; an empty list stays empty.
        tokens: What comes or goes.
        content: The tokenizer's content from before.
        remove: They leave.

    Raises:
        UnsupportedError: A token that is not special would replace a listed one: transformers would make it special.
    """
    texts = list(listed)
    for token in tokens:
        if remove:
            texts = [text for text in texts if text != token.content]
        elif token.replaces in texts:
            if not token.special:
                raise UnsupportedError(
                    "the token to be replaced is listed as a special one, and the new one is none",
                    where=f"{content.where}: {token.replaces!r}",
                    hint=f"add {token.content!r} as a special token, or at another id",
                )
            texts = [token.content if text == token.replaces else text for text in texts]
        elif texts and token.special and token.content not in texts:
            known = token.replaces is not None and content.entry(token.replaces) is not None
            texts += [] if known else [token.content]
    return texts


def relisted_items(
    items: Sequence[Any], old: Sequence[str], new: Sequence[str], rename: Callable[[Any, str], Any]
) -> list[Any]:
    """A list of extra special tokens, whatever they are written as, with the texts that `relisted` gives.

    Args:
        items: The tokens.
        old: Their texts.
        new: The texts from afterwards.
        rename: Gives a token of the list another text.
    """
    if len(new) < len(old):
        return [item for item, text in zip(items, old, strict=True) if text in new]
    kept = (
        item if text == becomes else rename(item, becomes) for item, text, becomes in zip(items, old, new, strict=False)
    )
    return [*kept, *new[len(old) :]]


def refuse_roles(
    roles: Mapping[str, str], templates: Sequence[str], tokens: Sequence[Token], remove: bool, where: object
) -> None:
    """Refuse to take away a token that has a role, or to replace one that a chat template writes.

    Args:
        roles: Role -> text: {"pad_token": "[PAD]"}.
        templates: Chat templates.
        tokens: What comes or goes.
        remove: They leave.
        where: For messages.

    Raises:
        UnsupportedError: With the role.
    """
    for token in tokens:
        text = token.content if remove else token.replaces
        if text is not None:
            uses = [role for role, name in roles.items() if name == text]
            uses += ["chat_template" for template in templates if text in template and not remove]
            refuse_used(uses, where, text)


def free_reserved(content: TokenizerJson, roles: Iterable[str], templates: Sequence[str]) -> tuple[int, ...]:
    """Ids of the reserved tokens that nothing names and a new token may replace, ascending.

    Args:
        content: The tokenizer's.
        roles: Texts that have a role.
        templates: Chat templates.
    """
    texts = {content.texts[index]: index for index in content.reserved}
    busy = {*used(content, texts), *roles, *(text for text in texts if any(text in t for t in templates))}
    return tuple(index for text, index in texts.items() if text not in busy)


def _renamed(item: Any, text: str) -> Any:
    return {**item, "content": text} if isinstance(item, dict) else text


def _by_id(decoder: dict[str, Any], new: str) -> dict[str, Any]:
    """The decoder with its new key before the first higher id."""
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


def _contradiction(path: Path, token: Token, found: object) -> CheckpointError:
    return CheckpointError(
        "a file beside tokenizer.json contradicts it",
        where=f"{path}: {token.content!r}",
        expected=f"{token.replaces!r} or nothing at id {token.id}" if token.replaces else token.id,
        found=repr(found),
        hint="save the tokenizer again with transformers",
    )


def _content(item: Any) -> Any:
    """The text of a token that is written as a text or as an object."""
    return item.get("content") if isinstance(item, dict) else item


def roles_in(body: Mapping[str, Any]) -> dict[str, str]:
    """Role -> text of the tokens that have one."""
    roles = {key: _content(value) for key, value in body.items() if key.endswith("_token")}
    for key in (*_LISTS, "model_specific_special_tokens"):
        if isinstance(body.get(key), dict):
            roles.update({role: _content(value) for role, value in body[key].items()})
    if body.get("extra_ids") and isinstance(body.get("additional_special_tokens"), list):
        # transformers 4 counts T5's sentinels when it loads them, and fails when one is missing
        listed = map(_content, body["additional_special_tokens"])
        roles.update({f"extra_ids: {text}": text for text in listed if "<extra_id_" in str(text)})
    return {role: text for role, text in roles.items() if isinstance(text, str)}


def templates_in(value: Any) -> list[str]:
    """The chat templates of a config: one text, or a list of {"name", "template"}."""
    if isinstance(value, list):
        return [text for item in value if isinstance(item, dict) for text in templates_in(item.get("template"))]
    return [value] if isinstance(value, str) else []


def in_templates(value: Any, change: Callable[[str], str]) -> Any:
    """The chat templates of a config, each changed."""
    if isinstance(value, list):
        return [
            {**item, "template": in_templates(item.get("template"), change)} if isinstance(item, dict) else item
            for item in value
        ]
    return change(value) if isinstance(value, str) else value

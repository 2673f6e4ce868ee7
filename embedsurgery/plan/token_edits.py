"""Edits of a tokenizer, and of the tokens that generation suppresses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from embedsurgery.plan.edit import Edit
from embedsurgery.plan.serial import string_or_none
from embedsurgery.plan.tokens import Prefix, Token, format_tokens

if TYPE_CHECKING:
    from embedsurgery.files.safetensors import TensorSource
    from embedsurgery.plan.serial import PlanFile


@dataclass(frozen=True)
class AddTokens(Edit):
    """Add tokens to the tokenizer at given ids or, with ``remove``, remove them: the undo of adding.

    Attributes:
        tokens: The tokens.
        remove: Whether to remove them.
        prefix: Tokens that the tokenizer will prepend to every text; None if that does not change.
        restore_parts: In an undo in memory, the original state of other parts of the tokenizer, by name.
    """

    tokens: tuple[Token, ...]
    remove: bool = False
    prefix: Prefix | None = None
    restore_parts: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> str:
        verb = "remove" if self.remove else "add"
        last = f", and prepend {self.prefix.label} to every text" if self.prefix is not None else ""
        return f"{verb} tokens " + format_tokens([(t.content, t.id) for t in self.tokens]) + last

    def changed_tokens(self) -> tuple[Token, ...]:
        return self.tokens

    def new_prefix(self) -> Prefix | None:
        return self.prefix

    def encode(self, prefix: str, tensors: dict[str, TensorSource]) -> dict[str, Any]:
        added = {} if self.prefix is None else {"prefix": asdict(self.prefix)}
        parts = {"parts": dict(self.restore_parts)} if self.restore_parts else {}
        return {"tokens": [asdict(token) for token in self.tokens], "remove": self.remove, **added, **parts}

    @classmethod
    def decode(cls, body: Mapping[str, Any], prefix: str, file: PlanFile) -> AddTokens:
        added = None if body.get("prefix") is None else _decode_prefix(body["prefix"])
        tokens = tuple(map(_decode_token, body["tokens"]))
        return cls(tokens, bool(body["remove"]), added, dict(body.get("parts", {})))


@dataclass(frozen=True)
class Suppress(Edit):
    """Suppress tokens in the generation config, so that they are never generated.

    Attributes:
        ids: The tokens.
        restore: In an undo in memory, the ids that were suppressed before, None if the config had no list. Otherwise
            ``()``.
        undo: Whether this is an undo.
    """

    ids: tuple[int, ...]
    restore: tuple[int, ...] | None = ()
    undo: bool = False

    def describe(self) -> str:
        verb = "no longer suppress" if self.undo else "suppress"
        return f"{verb} {len(self.ids)} tokens in the generation config"

    def encode(self, prefix: str, tensors: dict[str, TensorSource]) -> dict[str, Any]:
        restore = None if self.restore is None else list(self.restore)
        return {"ids": list(self.ids), "restore": restore, "undo": self.undo}

    @classmethod
    def decode(cls, body: Mapping[str, Any], prefix: str, file: PlanFile) -> Suppress:
        restore = None if body["restore"] is None else tuple(map(int, body["restore"]))
        return cls(tuple(map(int, body["ids"])), restore, bool(body["undo"]))


def _decode_token(body: Mapping[str, Any]) -> Token:
    return Token(str(body["content"]), int(body["id"]), bool(body["special"]), string_or_none(body["replaces"]))


def _decode_prefix(body: Mapping[str, Any]) -> Prefix:
    contents, ids = tuple(map(str, body["contents"])), tuple(map(int, body["ids"]))
    if len(contents) != len(ids) or not ids:
        raise ValueError(f"prefix must have as many contents as ids, got {len(contents)} and {len(ids)}")
    flags = (bool(body[key]) for key in ("texts", "chats", "after_bos"))
    return Prefix(str(body["label"]), contents, ids, *flags)

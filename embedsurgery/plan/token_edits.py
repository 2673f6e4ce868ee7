"""Edits of a tokenizer, and of which tokens may be generated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from embedsurgery.plan.edit import Edit
from embedsurgery.plan.serial import string_or_none
from embedsurgery.plan.tokens import Prefix, Token, listed_tokens

if TYPE_CHECKING:
    from embedsurgery.files.safetensors import TensorSource
    from embedsurgery.plan.serial import PlanFile


@dataclass(frozen=True)
class AddTokens(Edit):
    """Add tokens to the tokenizer at given ids or, with ``remove``, take them out: the undo of adding.

    Attributes:
        tokens: The tokens.
        remove: Whether they leave.
        prefix: Those that the tokenizer puts before every text from then on.
        restore_parts: In an undo in memory: what other parts of the tokenizer become again, by their names.
    """

    tokens: tuple[Token, ...]
    remove: bool = False
    prefix: Prefix | None = None
    restore_parts: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> str:
        verb = "remove" if self.remove else "add"
        last = f", and put {self.prefix.label} before every text" if self.prefix is not None else ""
        return f"{verb} tokens " + listed_tokens([(t.content, t.id) for t in self.tokens]) + last

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
    """Have the generation config keep tokens from being generated.

    Attributes:
        ids: The tokens.
        restore: In an undo in memory: the ids that were suppressed before, None where the config said nothing.
            Otherwise ``()``.
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
        raise ValueError("a prefix needs as many texts as ids, and at least one")
    places = (bool(body[key]) for key in ("texts", "chats", "after_bos"))
    return Prefix(str(body["label"]), contents, ids, *places)

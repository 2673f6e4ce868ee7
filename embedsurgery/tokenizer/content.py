"""Interprets the content of a ``tokenizer.json``: the id of each text, and the next free id.

Works on parsed JSON, from a file or from a tokenizer in memory. ``edit.py`` adds and removes tokens.

The ids in ``added_tokens`` are not binding. When the tokenizers library (0.23) loads the file, a text of the model's
vocabulary keeps its id there, and the other texts get consecutive ids from the vocabulary's size on, in the order of
the entries. So a new token can only have the next id. Source: ``AddedVocabulary::add_tokens``,
https://github.com/huggingface/tokenizers/blob/main/tokenizers/src/tokenizer/added_vocabulary.rs
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any

from embedsurgery.errors import CheckpointError
from embedsurgery.plan import Token

RESERVED = re.compile(
    r"\[unused\d+\]|<unused_?\d+>|<\|?reserved[\w ]*?\d+\|?>|<\|?extra_?\d+\|?>|madeupword\d+|\[PAD\d+\]"
)
"""Texts of tokens that model makers reserve for later use."""

_FIRST_CHARACTERS = ("[", "<", "m")
"""First characters of all reserved tokens: most texts are ruled out by them, without the slow pattern."""


def is_reserved(text: str) -> bool:
    """Whether a token is reserved for later use: "[unused7]", "<|reserved_special_token_3|>"."""
    return RESERVED.fullmatch(text) is not None


def find_reserved_ids(texts: Mapping[int, str]) -> tuple[int, ...]:
    """Return the ids of reserved tokens, ascending."""
    return tuple(sorted(index for index, text in texts.items() if text[:1] in _FIRST_CHARACTERS and is_reserved(text)))


def added_token_fields(token: Token) -> dict[str, Any]:
    """Return an added token's content and matching options, in the library's order of fields.

    The options are those of transformers' ``add_tokens``. A token matches anywhere, also within a word. A special token
    matches the text as it is, any other token the normalised text: a lowercasing tokenizer finds "<tool>" in "<TOOL>".
    """
    matched = {"single_word": False, "lstrip": False, "rstrip": False}
    return {"content": token.content, **matched, "normalized": not token.special, "special": token.special}


@dataclass(frozen=True)
class TokenizerJson:
    """The content of a ``tokenizer.json``.

    Attributes:
        body: The parsed file, for reading only.
        where: The file or tokenizer, for messages.
    """

    body: Mapping[str, Any]
    where: object

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Text -> id of the model's vocabulary, without added tokens.

        Raises:
            CheckpointError: It is neither an object of ids nor a list of pieces.
        """
        model = self.body.get("model")
        vocab = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocab, list) and all(isinstance(p, list) and p and isinstance(p[0], str) for p in vocab):
            return {piece[0]: index for index, piece in enumerate(vocab)}  # Unigram: [[piece, score], ...]
        if not isinstance(vocab, dict) or set(map(type, vocab.values())) - {int} or min(vocab.values(), default=0) < 0:
            raise CheckpointError(
                "the tokenizer's model has no valid vocabulary",
                where=self.where,
                expected="an object of ids, or a list of pieces",
            )
        return vocab

    @cached_property
    def added(self) -> list[dict[str, Any]]:
        """The entries of ``added_tokens``.

        Raises:
            CheckpointError: They are not a list of objects with a text and an id.
        """
        entries = self.body.get("added_tokens", [])
        valid = isinstance(entries, list) and all(
            isinstance(e, dict) and isinstance(e.get("content"), str) and type(e.get("id")) is int  # a bool is an int
            for e in entries
        )
        if not valid:
            raise CheckpointError(
                "added_tokens is invalid",
                where=self.where,
                expected="a list of objects with an id and a content",
            )
        return list(entries)

    @cached_property
    def assigned_ids(self) -> dict[str, int]:
        """Text -> id of all tokens, as the tokenizers library assigns them, whatever the ids in ``added_tokens``."""
        ids = dict(self.vocabulary)
        following = count(len(ids))
        for entry in self.added:
            if entry["content"] and entry["content"] not in ids:  # the library skips empty texts
                ids[entry["content"]] = next(following)
        return ids

    @cached_property
    def has_gaps(self) -> bool:
        """Whether the model's vocabulary leaves ids out, so that added tokens get ids that are taken.

        Versions of the library assign different ids then.
        """
        return set(self.vocabulary.values()) != set(range(len(self.vocabulary)))

    @cached_property
    def ids(self) -> dict[str, int]:
        """As `assigned_ids`, checked against the file.

        Raises:
            CheckpointError: An entry of ``added_tokens`` has another id than the library assigns.
        """
        for entry in self.added:
            found = self.assigned_ids.get(entry["content"], entry["id"])
            if found != entry["id"]:
                raise CheckpointError(
                    "an added token has another id than the tokenizers library assigns",
                    where=f"{self.where}: {entry['content']!r}",
                    expected=entry["id"],
                    found=found,
                    hint="load and save the file with the library",
                )
        return self.assigned_ids

    @cached_property
    def texts(self) -> dict[int, str]:
        """The inverse of `ids`."""
        return {index: text for text, index in self.ids.items()}

    @property
    def next_id(self) -> int:
        """The id of the next added token."""
        return len(self.vocabulary) + sum(1 for text in self.ids if text not in self.vocabulary)

    @property
    def reserved(self) -> tuple[int, ...]:
        """The ids of reserved tokens, ascending. `sidecars.find_replaceable_ids` excludes those that are in use."""
        return find_reserved_ids(self.texts)

    @property
    def unknown(self) -> int | None:
        """The id of the unknown token, None without one."""
        model = self.body["model"]
        if isinstance(model.get("unk_id"), int):
            return int(model["unk_id"])
        return self.ids.get(model["unk_token"]) if isinstance(model.get("unk_token"), str) else None

    def with_where(self, where: object) -> TokenizerJson:
        """Return the same content for another file. What was computed is kept."""
        if where == self.where:
            return self
        other = TokenizerJson(self.body, where)
        vars(other).update({name: value for name, value in vars(self).items() if name != "where"})
        return other

    def with_body(self, body: Mapping[str, Any]) -> TokenizerJson:
        """Return the tokenizer with another content. Its vocabulary is kept if the model is the same object."""
        other = TokenizerJson(body, self.where)
        if body["model"] is self.body["model"]:
            vars(other)["vocabulary"] = self.vocabulary
        return other

    def entry(self, text: str) -> dict[str, Any] | None:
        """Return the entry of ``added_tokens`` with this text, None if there is none."""
        return self._entries.get(text)

    @cached_property
    def _entries(self) -> dict[str, dict[str, Any]]:
        return {entry["content"]: entry for entry in self.added}

    def has(self, token: Token) -> bool:
        """Whether the tokenizer has the token, with its id and its ``special``."""
        entry = self.entry(token.content)
        special = False if entry is None else entry.get("special", False)
        return self.ids.get(token.content) == token.id and special == token.special

    def lacks(self, token: Token) -> bool:
        """Whether the tokenizer does not have the token, but has the one that it replaces."""
        missing = token.content not in self.ids
        return missing and (token.replaces is None or self.ids.get(token.replaces) == token.id)

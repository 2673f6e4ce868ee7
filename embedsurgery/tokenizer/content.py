"""What the content of a ``tokenizer.json`` says: which text has which id, and which id comes next.

Reads parsed JSON, from a file or from a tokenizer in memory; how tokens enter it and leave it is
``tokenizer_edit.py``'s.

How the tokenizers library gives ids to ``added_tokens`` when it loads the file (0.23, ``AddedVocabulary::add_tokens``;
https://github.com/huggingface/tokenizers/blob/main/tokenizers/src/tokenizer/added_vocabulary.rs): a text that the
model's vocabulary has keeps that id; the others follow each other from the vocabulary's size on, whatever the entries
say, in their order. So a new token can only have the next id.
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
"""Texts of tokens that model makers put aside for later."""

_STARTS = ("[", "<", "m")
"""How all of them begin, which is seen sooner."""


def is_reserved(text: str) -> bool:
    """Whether a token stands for nothing yet and waits for a use: "[unused7]", "<|reserved_special_token_3|>"."""
    return RESERVED.fullmatch(text) is not None


def reserved_ids(texts: Mapping[int, str]) -> tuple[int, ...]:
    """The ids of reserved tokens, ascending."""
    return tuple(sorted(index for index, text in texts.items() if text[:1] in _STARTS and is_reserved(text)))


def flags(token: Token) -> dict[str, Any]:
    """How an added token is matched, in the library's order of fields.

    As transformers' ``add_tokens`` has it for a text: matched anywhere, also within a word; a token that is not
    special is matched in the normalised text ("<TOOL>" finds "<tool>" where the tokenizer lowers), a special one as is.
    """
    matched = {"single_word": False, "lstrip": False, "rstrip": False}
    return {"content": token.content, **matched, "normalized": not token.special, "special": token.special}


@dataclass(frozen=True)
class TokenizerJson:
    """The content of a ``tokenizer.json``.

    Attributes:
        body: The parsed file; never changed.
        where: The file or tokenizer, for messages.
    """

    body: Mapping[str, Any]
    where: object

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Text -> id of the model's own vocabulary.

        Raises:
            CheckpointError: It is neither an object of ids nor a list of pieces.
        """
        model = self.body.get("model")
        vocab = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocab, list) and all(isinstance(p, list) and p and isinstance(p[0], str) for p in vocab):
            return {piece[0]: index for index, piece in enumerate(vocab)}  # Unigram: [[piece, score], ...]
        if not isinstance(vocab, dict) or set(map(type, vocab.values())) - {int} or min(vocab.values(), default=0) < 0:
            raise CheckpointError(
                "no vocabulary in the tokenizer's model",
                where=self.where,
                expected="an object of ids, or a list of pieces",
            )
        return vocab

    @cached_property
    def added(self) -> list[dict[str, Any]]:
        """The entries of ``added_tokens``.

        Raises:
            CheckpointError: They are no list of objects with a text and an id.
        """
        entries = self.body.get("added_tokens", [])
        sound = isinstance(entries, list) and all(
            isinstance(e, dict) and isinstance(e.get("content"), str) and type(e.get("id")) is int for e in entries
        )
        if not sound:
            raise CheckpointError(
                "added_tokens of the wrong kind",
                where=self.where,
                expected="a list of objects with an id and a content",
            )
        return list(entries)

    @cached_property
    def given(self) -> dict[str, int]:
        """Text -> id of all tokens, as the tokenizers library gives them, whatever ``added_tokens`` says."""
        ids = dict(self.vocabulary)
        following = count(len(ids))
        for entry in self.added:
            if entry["content"] and entry["content"] not in ids:  # the library skips an empty one
                ids[entry["content"]] = next(following)
        return ids

    @cached_property
    def has_holes(self) -> bool:
        """Whether the model's vocabulary leaves ids out, so that what follows it gets ids that are taken.

        Versions of the library then differ in the ids that they give.
        """
        return set(self.vocabulary.values()) != set(range(len(self.vocabulary)))

    @cached_property
    def ids(self) -> dict[str, int]:
        """As `given`, where the file says the same.

        Raises:
            CheckpointError: An entry of ``added_tokens`` has an id that it will not get.
        """
        for entry in self.added:
            found = self.given.get(entry["content"], entry["id"])
            if found != entry["id"]:
                raise CheckpointError(
                    "an added token does not get the id that the file gives it",
                    where=f"{self.where}: {entry['content']!r}",
                    expected=entry["id"],
                    found=found,
                    hint="the tokenizers library loads it so; write the file again with the library",
                )
        return self.given

    @cached_property
    def texts(self) -> dict[int, str]:
        """The inverse of `ids`."""
        return {index: text for text, index in self.ids.items()}

    @property
    def next_id(self) -> int:
        """The id that the next added token gets."""
        return len(self.vocabulary) + sum(1 for text in self.ids if text not in self.vocabulary)

    @property
    def reserved(self) -> tuple[int, ...]:
        """The ids of reserved tokens, ascending; whether one can be replaced, a change says."""
        return reserved_ids(self.texts)

    @property
    def unknown(self) -> int | None:
        """The id of the token for what the vocabulary cannot say."""
        model = self.body["model"]
        if isinstance(model.get("unk_id"), int):
            return int(model["unk_id"])
        return self.ids.get(model["unk_token"]) if isinstance(model.get("unk_token"), str) else None

    def at(self, where: object) -> TokenizerJson:
        """The same content in another place, of which nothing is read again."""
        if where == self.where:
            return self
        other = TokenizerJson(self.body, where)
        vars(other).update({name: value for name, value in vars(self).items() if name != "where"})
        return other

    def with_body(self, body: Mapping[str, Any]) -> TokenizerJson:
        """The same tokenizer with another content; what the two share is not read again."""
        other = TokenizerJson(body, self.where)
        if body["model"] is self.body["model"]:
            vars(other)["vocabulary"] = self.vocabulary
        return other

    def entry(self, text: str) -> dict[str, Any] | None:
        """The entry of ``added_tokens`` with this text."""
        return self._entries.get(text)

    @cached_property
    def _entries(self) -> dict[str, dict[str, Any]]:
        return {entry["content"]: entry for entry in self.added}

    def has(self, token: Token) -> bool:
        """Whether the token is there already, at its id and as special as it is said to be."""
        entry = self.entry(token.content)
        special = False if entry is None else entry.get("special", False)
        return self.ids.get(token.content) == token.id and special == token.special

    def lacks(self, token: Token) -> bool:
        """Whether the token is not there, and what it replaced is."""
        gone = token.content not in self.ids
        return gone and (token.replaces is None or self.ids.get(token.replaces) == token.id)

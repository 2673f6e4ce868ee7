"""Edits a post-processor and chat templates so that they prepend a prefix to every text.

Parsed JSON and strings in, new JSON and strings out. ``patching.py`` finds the files, ``live.py`` edits a tokenizer in
memory, and ``classes.py`` knows the classes that would replace the post-processor. The post-processors are those of the
tokenizers library: https://huggingface.co/docs/tokenizers/api/post-processors
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from embedsurgery.errors import PlanError, UnsupportedError
from embedsurgery.plan import Prefix

MARKER_START = "<|soft:"
"""Start of the texts of baked virtual tokens."""

_ADDS_TOKENS = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")
"""Types of post-processors that add tokens."""

_BOS_FIRST = re.compile(r"\s*\{\{-?\s*bos_token\s*-?\}\}")

Piece = dict[str, Any]


def add_to_post_processor(processor: Mapping[str, Any] | None, prefix: Prefix, where: object) -> dict[str, Any]:
    """Return a post-processor that also prepends a prefix to the text, or to the first text of a pair.

    Args:
        processor: ``post_processor`` of a ``tokenizer.json``.
        prefix: The tokens.
        where: Path of the file, for messages.

    Raises:
        UnsupportedError: The type of a post-processor is unknown, or several add tokens.
    """
    parts = _flatten(processor)
    kinds = [part.get("type") for part in parts]
    adding = [number for number, kind in enumerate(kinds) if kind in _ADDS_TOKENS]
    unknown = [str(kind) for kind in kinds if kind not in (*_ADDS_TOKENS, "ByteLevel")]
    if unknown or len(adding) > 1:
        raise UnsupportedError(
            "this post-processor cannot prepend a prefix",
            where=where,
            expected=f"one of {', '.join(_ADDS_TOKENS)}, ByteLevel or none",
            found=", ".join(unknown) or f"{len(adding)} that add tokens",
            hint="bake without a prefix and write the markers into the text",
        )
    if not adding:
        after = [*parts, _insert_prefix(_as_template(None), prefix)]
    else:
        n = adding[0]
        new = _insert_prefix(_as_template(parts[n]), prefix)
        after = [*parts[:n], *_offset_trimming(parts[n]), new, *parts[n + 1 :]]
    return after[0] if len(after) == 1 else {"type": "Sequence", "processors": after}


def add_to_chat_template(template: str, prefix: Prefix, bos: str | None, where: object) -> str:
    """Return a chat template that also writes a prefix, at its beginning or after the BOS token.

    Jinja is not parsed: the BOS is found only as the first thing that the template writes.

    Args:
        template: A Jinja template.
        prefix: The tokens.
        bos: Text of the BOS token, None without one.
        where: Path of the file, for messages.

    Raises:
        UnsupportedError: The prefix comes after the BOS token, and the template writes that somewhere else.
    """
    if not prefix.after_bos:
        return prefix.text + template
    # transformers encodes a rendered chat without the post-processor's tokens, so templates write the BOS themselves.
    match = _BOS_FIRST.match(template)
    if match is not None:
        return template[: match.end()] + prefix.text + template[match.end() :]
    if bos and template.startswith(bos):
        return bos + prefix.text + template.removeprefix(bos)
    if "bos_token" in template or (bos and bos in template):
        raise UnsupportedError(
            "this chat template does not begin with the BOS token, so a prefix cannot be added after it",
            where=where,
            found=repr(template[:60]),
            expected="{{ bos_token }} at its beginning",
            hint="add the prompt before the BOS token, or leave the chat template unchanged",
        )
    return prefix.text + template


def refuse_existing_prefix(processor: object, templates: Iterable[str], contents: Iterable[str], where: object) -> None:
    """Refuse tokens that a post-processor or a chat template writes already, and a second prefix.

    Raises:
        PlanError: There is one. The error has the token and where it is.
    """
    written = {"the post-processor": json.dumps(processor, ensure_ascii=False)}
    written |= {f"chat template {number}": text for number, text in enumerate(templates, 1)}
    for content in contents:
        for place, text in written.items():
            if content in text:
                raise PlanError(
                    "the tokenizer writes this marker already",
                    where=f"{where}: {place}",
                    found=repr(content),
                    hint="remove it there, or bake under another name",
                )
    for place, text in written.items():
        if MARKER_START in text:
            raise PlanError(
                "the tokenizer prepends another soft prompt already",
                where=f"{where}: {place}",
                found=MARKER_START,
                hint="unmerge it first, or bake with prefix='none' and write the markers into the text",
            )


def _flatten(processor: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return the post-processors in a sequence, nested ones included."""
    if processor is None:
        return []
    if processor.get("type") == "Sequence" and isinstance(processor.get("processors"), list):
        return [part for inner in processor["processors"] for part in _flatten(inner)]
    return [dict(processor)]


def _as_template(processor: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return an equal ``TemplateProcessing``: the others cannot add further tokens. For None it adds nothing."""
    if processor is None:
        single, pair, named = [_sequence_piece("A", 0)], [_sequence_piece("A", 0), _sequence_piece("B", 1)], {}
    elif processor["type"] == "TemplateProcessing":
        return dict(processor)
    else:
        # BERT's pair is [CLS] A [SEP] B [SEP] with types 0 and 1, RoBERTa's <s> A </s></s> B </s> with type 0 only.
        (cls, cls_id), (sep, sep_id) = processor["cls"], processor["sep"]
        second = int(processor["type"] == "BertProcessing")
        single = [_special_piece(cls, 0), _sequence_piece("A", 0), _special_piece(sep, 0)]
        middle = [] if second else [_special_piece(sep, 0)]
        pair = [*single, *middle, _sequence_piece("B", second), _special_piece(sep, second)]
        named = {cls: _special_token(cls, [cls_id], [cls]), sep: _special_token(sep, [sep_id], [sep])}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": named}


def _offset_trimming(processor: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a post-processor for what a template cannot do: RobertaProcessing trims offsets as ByteLevel does."""
    if processor["type"] != "RobertaProcessing":
        return []
    kept = {key: processor[key] for key in ("add_prefix_space", "trim_offsets")}
    return [{"type": "ByteLevel", **kept, "use_regex": True}]


def _insert_prefix(template: Mapping[str, Any], prefix: Prefix) -> dict[str, Any]:
    """Return a template with one more special token, whose ids are those of all tokens of the prefix."""
    after = dict(template)
    for key in ("single", "pair"):
        pieces = list(template[key])
        begin = next(n for n, piece in enumerate(pieces) if "Sequence" in piece) if prefix.after_bos else 0
        type_id = next(iter(pieces[0].values()))["type_id"]
        after[key] = [*pieces[:begin], _special_piece(prefix.label, type_id), *pieces[begin:]]
    named = _special_token(prefix.label, list(prefix.ids), list(prefix.contents))
    return {**after, "special_tokens": {**template["special_tokens"], prefix.label: named}}


def _special_piece(text: str, type_id: int) -> Piece:
    return {"SpecialToken": {"id": text, "type_id": type_id}}


def _sequence_piece(name: str, type_id: int) -> Piece:
    return {"Sequence": {"id": name, "type_id": type_id}}


def _special_token(label: str, ids: list[int], texts: list[str]) -> dict[str, Any]:
    return {"id": label, "ids": ids, "tokens": texts}

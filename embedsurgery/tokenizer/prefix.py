"""Tokens at the front of every text: what a tokenizer's post-processor and its chat templates become.

Parsed JSON and texts in, parsed JSON and texts out. Which file holds them, and which class of transformers would put
its own post-processor in their place, is ``tokenizer_files.py``'s and ``tokenizer_classes.py``'s. The post-processors
are the tokenizers library's: https://huggingface.co/docs/tokenizers/api/post-processors
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from embedsurgery.errors import PlanError, UnsupportedError
from embedsurgery.plan import Prefix

MARK = "<|soft:"
"""How the texts of baked virtual tokens begin."""

_MAKERS = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")
"""Post-processors that add tokens."""

_BEGINS = re.compile(r"\s*\{\{-?\s*bos_token\s*-?\}\}")

Piece = dict[str, Any]


def put_first(processor: Mapping[str, Any] | None, prefix: Prefix, where: object) -> dict[str, Any]:
    """The post-processor that does what one does, and puts tokens at the front of the first text as well.

    Args:
        processor: ``post_processor`` of a ``tokenizer.json``.
        prefix: The tokens.
        where: For messages.

    Raises:
        UnsupportedError: A post-processor of a kind that is not known, or several that add tokens.
    """
    parts = _parts(processor)
    kinds = [part.get("type") for part in parts]
    makers = [place for place, kind in enumerate(kinds) if kind in _MAKERS]
    strange = [str(kind) for kind in kinds if kind not in (*_MAKERS, "ByteLevel")]
    if strange or len(makers) > 1:
        raise UnsupportedError(
            "a post-processor that tokens cannot be added to",
            where=where,
            expected=f"one of {', '.join(_MAKERS)}, ByteLevel or none",
            found=", ".join(strange) or f"{len(makers)} that add tokens",
            hint="bake without a prefix, and write the markers into the text",
        )
    if not makers:
        after = [*parts, _inserted(_template(None), prefix)]
    else:
        place = makers[0]
        new = _inserted(_template(parts[place]), prefix)
        after = [*parts[:place], *_offsets(parts[place]), new, *parts[place + 1 :]]
    return after[0] if len(after) == 1 else {"type": "Sequence", "processors": after}


def put_first_in_chat(template: str, prefix: Prefix, bos: str | None, where: object) -> str:
    """A chat template whose every rendering begins with tokens' texts.

    Args:
        template: Jinja.
        prefix: The tokens.
        bos: Text of the token that begins a text, None where there is none.
        where: For messages.

    Raises:
        UnsupportedError: They are to stand behind the BOS, and where the template writes that is not seen.
    """
    if not prefix.after_bos:
        return prefix.text + template
    match = _BEGINS.match(template)
    if match is not None:
        return template[: match.end()] + prefix.text + template[match.end() :]
    if bos and template.startswith(bos):
        return bos + prefix.text + template.removeprefix(bos)
    if "bos_token" in template or (bos and bos in template):
        raise UnsupportedError(
            "where this chat template writes the BOS is not plain, so nothing can be put behind it",
            where=where,
            found=repr(template[:60]),
            expected="{{ bos_token }} at its beginning",
            hint="put the prompt before the BOS, or leave the chat template alone",
        )
    return prefix.text + template


def refuse_held(processor: object, templates: Iterable[str], contents: Iterable[str], where: object) -> None:
    """Refuse tokens that a post-processor or a chat template writes already.

    Raises:
        PlanError: With the token and the place.
    """
    written = {"the post-processor": json.dumps(processor, ensure_ascii=False)}
    written |= {f"chat template {number}": text for number, text in enumerate(templates, 1)}
    for content in contents:
        for place, text in written.items():
            if content in text:
                raise PlanError(
                    "the tokenizer's template holds this marker already",
                    where=f"{where}: {place}",
                    found=repr(content),
                    hint="take it out there, or bake under another name",
                )
    for place, text in written.items():
        if MARK in text:
            raise PlanError(
                "another soft prompt stands before every text already",
                where=f"{where}: {place}",
                hint="unmerge it first, or bake with prefix='none' and choose by the text",
            )


def _parts(processor: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The processors one after another."""
    if processor is None:
        return []
    if processor.get("type") == "Sequence" and isinstance(processor.get("processors"), list):
        return [part for inner in processor["processors"] for part in _parts(inner)]
    return [dict(processor)]


def _template(processor: Mapping[str, Any] | None) -> dict[str, Any]:
    """What adds a text's special tokens, as a template."""
    if processor is None:
        single, pair, named = [_sequence("A", 0)], [_sequence("A", 0), _sequence("B", 1)], {}
    elif processor["type"] == "TemplateProcessing":
        return dict(processor)
    else:
        (cls, cls_id), (sep, sep_id) = processor["cls"], processor["sep"]
        second = int(processor["type"] == "BertProcessing")
        single = [_special(cls, 0), _sequence("A", 0), _special(sep, 0)]
        middle = [] if second else [_special(sep, 0)]
        pair = [*single, *middle, _sequence("B", second), _special(sep, second)]
        named = {cls: _named(cls, [cls_id], [cls]), sep: _named(sep, [sep_id], [sep])}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": named}


def _offsets(processor: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What else a processor does, that a template does not: RoBERTa's trims offsets as the byte-level one does."""
    if processor["type"] != "RobertaProcessing":
        return []
    kept = {key: processor[key] for key in ("add_prefix_space", "trim_offsets")}
    return [{"type": "ByteLevel", **kept, "use_regex": True}]


def _inserted(template: Mapping[str, Any], prefix: Prefix) -> dict[str, Any]:
    """A template with one more special token, which stands for all that are put at the front."""
    after = dict(template)
    for key in ("single", "pair"):
        pieces = list(template[key])
        place = next(n for n, piece in enumerate(pieces) if "Sequence" in piece) if prefix.after_bos else 0
        kind = next(iter(pieces[0].values()))["type_id"]
        after[key] = [*pieces[:place], _special(prefix.label, kind), *pieces[place:]]
    named = _named(prefix.label, list(prefix.ids), list(prefix.contents))
    return {**after, "special_tokens": {**template["special_tokens"], prefix.label: named}}


def _special(text: str, kind: int) -> Piece:
    return {"SpecialToken": {"id": text, "type_id": kind}}


def _sequence(name: str, kind: int) -> Piece:
    return {"Sequence": {"id": name, "type_id": kind}}


def _named(label: str, ids: list[int], texts: list[str]) -> dict[str, Any]:
    return {"id": label, "ids": ids, "tokens": texts}

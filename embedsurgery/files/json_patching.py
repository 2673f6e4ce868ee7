"""Patches JSON text in place: only what differs is replaced, the rest keeps its spelling.

Keeps indentation, separators, escapes, the order of keys and the end of the file, so that a patch can be undone byte
for byte and a diff shows only the change. Callers decide what the new content is. Whole files are read by
``json_reading.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embedsurgery.errors import CheckpointError
from embedsurgery.files.json_reading import parse_json

_WHITESPACE = re.compile(r"[ \t\n\r]*")
_COLON = re.compile(r"[ \t\n\r]*:[ \t\n\r]*")
_ESCAPED = re.compile(r"\\u(?!00[0-7])")
"""An escape of a character beyond ASCII. Lower ones say nothing about the style: control characters need an escape."""

scan_value = json.JSONDecoder().raw_decode
"""Called as ``scan_value(text, begin)``; returns the JSON value at a position and where it ends."""

Pair = tuple[int | None, int | None]
"""Index of an item before and after; None for an item that is added or removed."""


def patch_json(data: bytes, before: Mapping[str, Any], after: Mapping[str, Any], path: Path) -> bytes:
    """Return the bytes of a JSON object with new content and the old spelling.

    Args:
        data: The object as it is.
        before: Its content. Values that are the same Python object in ``after`` are not compared.
        after: The new content. Keys and elements that stay keep their order and spelling; new ones are formatted as
            their neighbours are.
        path: For messages.

    Raises:
        CheckpointError: The text cannot be patched: it has a duplicate key, or ``after`` has items in another order.
    """
    try:
        result = _splice(data.decode("utf-8"), before, after).encode("utf-8")
        # Python's parser is the judge: whatever odd spelling the splicer misread, a wrong file is never written.
        right = parse_json(result, path) == after
    except (ValueError, IndexError, TypeError, RecursionError) as error:
        raise _unpatchable(path, str(error)) from error
    if not right:
        raise _unpatchable(path, "the patched text has other content")
    return result


def _splice(text: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    begin = text.index("{")  # after white space or a byte order mark
    splicer = _Splicer(text, text.isascii() and _ESCAPED.search(text) is not None)
    splicer.patch_value(begin, before, after, _root_style(text, begin), last=True)
    return splicer.apply()


def _unpatchable(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        "JSON cannot be patched in place", where=path, found=found[:200], hint="rewrite the file with json.dump first"
    )


def skip_whitespace(text: str, position: int) -> int:
    """Return the first position at or after this one that is not JSON white space."""
    match = _WHITESPACE.match(text, position)
    return position if match is None else match.end()


@dataclass(frozen=True)
class _Style:
    """How an object or array is written.

    Attributes:
        close: Text before its closing bracket.
        unit: Indentation of its items relative to the bracket; None if it is on one line.
        colon: Text between a key and its value.
    """

    close: str
    unit: str | None
    colon: str

    @property
    def open(self) -> str:
        """Text before its first item."""
        return "" if self.unit is None else self.close + self.unit

    @property
    def between(self) -> str:
        """Text between two items."""
        # On one line, json.dumps pairs ", " with ": " and "," with ":".
        return "," + (self.open if self.unit is not None else " " if self.colon.endswith(" ") else "")

    @property
    def inline(self) -> _Style:
        """The same style on one line."""
        return _Style("", None, self.colon)

    @property
    def inner(self) -> _Style:
        """The style of an object or array among its items."""
        return self if self.unit is None else _Style(self.open, self.unit, self.colon)


def _root_style(text: str, begin: int) -> _Style:
    """The style around the root object, with the colon of its first item."""
    first = skip_whitespace(text, begin + 1)
    match = _COLON.match(text, scan_value(text, first)[1]) if text[first] == '"' else None
    return _Style("", None, match.group() if match else ": ")


@dataclass(frozen=True)
class _Splicer:
    """A walk through a text that collects replacements as (begin, end, new text).

    Positions refer to the old text, so the walk never has to adjust them.
    """

    text: str
    ascii: bool
    splices: list[tuple[int, int, str]] = field(default_factory=list)

    def apply(self) -> str:
        """Return the text with all replacements."""
        parts, position = [], 0
        for begin, end, new in sorted(self.splices, key=lambda splice: splice[:2]):
            parts += [self.text[position:begin], new]
            position = end
        return "".join([*parts, self.text[position:]])

    def patch_value(self, begin: int, before: Any, after: Any, around: _Style, last: bool = False) -> int:
        """Turn the value at ``begin`` into another; return where it ends.

        With ``last``, nothing changes after this value, so its end is not needed and may be 0. That saves scanning
        the rest of a tokenizer file whose vocabulary has hundreds of thousands of entries.
        """
        same = _is_unchanged(before, after)
        if not same and isinstance(before, dict) and isinstance(after, dict):
            return self.patch_container(begin, list(before), list(after), before, after, around, last)
        if not same and isinstance(before, list) and isinstance(after, list):
            return self.patch_container(begin, *_element_keys(before, after), before, after, around, last)
        end = 0 if last and same else scan_value(self.text, begin)[1]
        if not same:
            self.splices.append((begin, end, self.format_value(after, around)))
        return end

    def patch_container(
        self, begin: int, old: Sequence[Any], new: Sequence[Any], before: Any, after: Any, around: _Style, last: bool
    ) -> int:
        """As `patch_value`, for an object or array; ``old`` and ``new`` identify its items before and after."""
        is_object = isinstance(before, dict)
        position = skip_whitespace(self.text, begin + 1)
        style = self.style_at(begin, position, around)
        pairs = _align(old, new)
        values = list(before.values()) if is_object else before
        targets = list(after.values()) if is_object else after
        stop = _last_change(old, new, values, targets) if len(pairs) == len(old) == len(new) else None
        places: list[tuple[int, int]] = []
        inline = False
        for i, j in pairs:
            if i is None:
                continue
            first = position
            if is_object:
                position = self.patch_key(position, old[i], old[i] if j is None else new[j])
            at, value = position, values[i]
            position = self.patch_value(at, value, value if j is None else targets[j], style.inner, last and i == stop)
            if i == stop:
                return 0 if last else scan_value(self.text, begin)[1]
            nested = isinstance(value, dict | list) and len(value) > 0
            inline = inline or (nested and self.text.find("\n", at, position) < 0)
            places.append((first, position))
            position = skip_whitespace(self.text, position)
            if self.text[position] == ",":
                position = skip_whitespace(self.text, position + 1)
        if self.text[position] not in "]}":
            # The parser kept only the last of several equal keys, so the text has more items than ``before``.
            raise ValueError(f"duplicate key {scan_value(self.text, position)[0]!r}")
        items = list(after.items()) if is_object else after
        within = style.inner.inline if inline else style.inner
        added = {j: self.format_item(items[j], within, is_object) for i, j in pairs if i is None and j is not None}
        self.patch_membership((begin + 1, position), pairs, places, added, style)
        return position + 1

    def patch_key(self, position: int, old: str, new: str) -> int:
        """Rename the key at ``position``; return where its value begins."""
        key, end = scan_value(self.text, position)
        if key != old:
            raise ValueError(f"duplicate key {key!r}")
        if new != old:
            self.splices.append((position, end, self.quote(new)))
        return skip_whitespace(self.text, skip_whitespace(self.text, end) + 1)

    def patch_membership(
        self,
        inside: tuple[int, int],
        pairs: list[Pair],
        places: list[tuple[int, int]],
        added: dict[int, str],
        style: _Style,
    ) -> None:
        """Add and remove items of an object or array, and the commas between them.

        Args:
            inside: (begin, end) of the text between the brackets.
            pairs: Which item becomes which.
            places: (begin, end) of each old item.
            added: Text of the new items.
            style: The container's.
        """
        stay = [i for i, j in pairs if i is not None and j is not None]
        if not stay:
            body = style.between.join(added.values())
            self.splices.append((*inside, style.open + body + style.close if body else ""))
            return
        last = stay[-1]
        if last + 1 < len(places):
            self.splices.append((places[last][1], places[-1][1], ""))
        following: int | None = None
        found = []  # from back to front
        for i, j in reversed(pairs):
            if i is None and j is not None:
                # A new item brings its comma: before it at the end, behind it elsewhere.
                at, new = (
                    (places[last][1], style.between + added[j])
                    if following is None
                    else (places[following][0], added[j] + style.between)
                )
                found.append((at, at, new))
            elif i is not None and j is None and i < last:
                found.append((places[i][0], places[i + 1][0], ""))
            elif i is not None and j is not None:
                following = i
        self.splices.extend(reversed(found))

    def style_at(self, begin: int, first: int, around: _Style) -> _Style:
        """Return the style of the container at ``begin``, whose first item or closing bracket is at ``first``."""
        opening = self.text[begin + 1 : first]
        if self.text[first] in "]}":
            return around
        if "\n" not in opening:
            return around.inline
        line = self.text.rfind("\n", 0, begin) + 1
        close = opening[: opening.rfind("\n") + 1] + self.text[line : min(begin, skip_whitespace(self.text, line))]
        return _Style(close, opening.removeprefix(close) if opening.startswith(close) else "  ", around.colon)

    def quote(self, text: str) -> str:
        """Return a string as JSON, escaped as the file escapes."""
        return json.dumps(text, ensure_ascii=self.ascii)

    def format_item(self, item: Any, style: _Style, is_pair: bool) -> str:
        """Return the text of a new item: a value or, in an object, a (key, value) pair."""
        if is_pair:
            return self.quote(item[0]) + style.colon + self.format_value(item[1], style)
        return self.format_value(item, style)

    def format_value(self, value: Any, style: _Style) -> str:
        """Return the text of a new value, in this style if it is an object or array."""
        if isinstance(value, dict | list) and value:
            is_object = isinstance(value, dict)
            items: Iterable[Any] = value.items() if isinstance(value, dict) else value
            body = style.between.join(self.format_item(item, style.inner, is_object) for item in items)
            return f"{'{' if is_object else '['}{style.open}{body}{style.close}{'}' if is_object else ']'}"
        return json.dumps(value, ensure_ascii=self.ascii)


def _is_unchanged(before: Any, after: Any) -> bool:
    # The types are compared because 1, 1.0 and True are equal in Python and not in JSON.
    return before is after or (type(before) is type(after) and before == after)


def _last_change(old: Sequence[Any], new: Sequence[Any], values: Sequence[Any], targets: Sequence[Any]) -> int | None:
    """Index of the last item whose key or value changes, in a container whose items all stay in place."""
    changes = (n for n in reversed(range(len(old))) if old[n] != new[n] or not _is_unchanged(values[n], targets[n]))
    return next(changes, None)


def _element_keys(before: list[Any], after: list[Any]) -> tuple[Sequence[Hashable], Sequence[Hashable]]:
    """Return what identifies the elements of a list: an ``id``, the text or number itself, or else the index."""
    sides = [[e.get("id") if isinstance(e, dict) else e for e in side] for side in (before, after)]
    if all(isinstance(e, str | int) for side in sides for e in side):
        return sides[0], sides[1]
    return range(len(before)), range(len(after))


def _align(old: Sequence[Hashable], new: Sequence[Hashable]) -> list[Pair]:
    """Pair the items before with the items after, in order.

    Raises:
        ValueError: Items that stay have another order.
    """
    # Renamed in place: as many items, and no key of a changed item appears on the other side.
    unlike = [(a, b) for a, b in zip(old, new, strict=False) if a != b]
    if len(old) == len(new) and not {a for a, _ in unlike} & {b for _, b in unlike}:
        return list(zip(range(len(old)), range(len(new)), strict=True))
    was, will = set(old), set(new)
    pairs: list[Pair] = []
    i = j = 0
    while i < len(old) or j < len(new):
        leaves = i < len(old) and old[i] not in will
        comes = j < len(new) and new[j] not in was
        if (leaves and comes) or (i < len(old) and j < len(new) and old[i] == new[j]):
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif leaves:
            pairs.append((i, None))
            i += 1
        elif comes:
            pairs.append((None, j))
            j += 1
        else:
            raise ValueError(f"another order of items at {(new[j] if j < len(new) else old[i])!r}")
    return pairs

"""JSON text that changes in place: what differs is spliced in, everything else stays as it was spelled.

Responsible for indentation, separators, escapes, the order of keys and the end of the file; what the new content is, is
its caller's. A text is read once, from the front to the last change.
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

_GAP = re.compile(r"[ \t\n\r]*")
_COLON = re.compile(r"[ \t\n\r]*:[ \t\n\r]*")
_ESCAPED = re.compile(r"\\u(?!00[0-7])")
"""A character beyond ASCII that is written as an escape."""

_scan = json.JSONDecoder().raw_decode

Pair = tuple[int | None, int | None]
"""The place of an item before and after; None for one that comes or goes."""


def respell(data: bytes, before: Mapping[str, Any], after: Mapping[str, Any], path: Path) -> bytes:
    """The bytes of a JSON object that says ``after`` and is spelled as ``data`` is.

    Args:
        data: The object as it is.
        before: What it says. What is the same object in ``after`` is not looked at.
        after: What it becomes. Keys and elements that stay keep their order and spelling; new ones are formatted as
            their neighbours are.
        path: For messages.

    Raises:
        CheckpointError: The data is written in a way that cannot be changed in place.
    """
    try:
        result = _spliced(data.decode("utf-8"), before, after).encode("utf-8")
        right = parse_json(result, path) == after
    except (ValueError, IndexError, TypeError, RecursionError) as error:
        raise _cannot(path, str(error)) from error
    if not right:
        raise _cannot(path, "a text that then says something else")
    return result


def _spliced(text: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    begin = text.index("{")  # only white space, or a byte order mark, stands before it
    splicer = _Splicer(text, text.isascii() and _ESCAPED.search(text) is not None)
    splicer.value(begin, before, after, _outermost(text, begin), last=True)
    return splicer.spliced()


def _cannot(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        "JSON that cannot be changed in place",
        where=path,
        found=found[:200],
        hint="load it with Python's json and write it again",
    )


def _past_gap(text: str, position: int) -> int:
    match = _GAP.match(text, position)
    return position if match is None else match.end()


@dataclass(frozen=True)
class _Style:
    """How a container is written.

    Attributes:
        close: What stands before its closing bracket.
        unit: What its items are indented by beyond that; None where it is on one line.
        colon: What stands between a key and its value.
    """

    close: str
    unit: str | None
    colon: str

    @property
    def open(self) -> str:
        """What stands before its first item."""
        return "" if self.unit is None else self.close + self.unit

    @property
    def between(self) -> str:
        """What stands between two items."""
        return "," + (self.open if self.unit is not None else " " if self.colon.endswith(" ") else "")

    @property
    def inline(self) -> _Style:
        """The same on one line."""
        return _Style("", None, self.colon)

    @property
    def inner(self) -> _Style:
        """For a container among its items."""
        return self if self.unit is None else _Style(self.open, self.unit, self.colon)


def _outermost(text: str, begin: int) -> _Style:
    """The style around the outermost object, with the colon that its first item has."""
    first = _past_gap(text, begin + 1)
    match = _COLON.match(text, _scan(text, first)[1]) if text[first] == '"' else None
    return _Style("", None, match.group() if match else ": ")


@dataclass(frozen=True)
class _Splicer:
    """A walk through a text that notes what is to be replaced: (begin, end, by what)."""

    text: str
    ascii: bool
    splices: list[tuple[int, int, str]] = field(default_factory=list)

    def spliced(self) -> str:
        """The text with everything replaced."""
        parts, position = [], 0
        for begin, end, new in sorted(self.splices, key=lambda splice: splice[:2]):
            parts += [self.text[position:begin], new]
            position = end
        return "".join([*parts, self.text[position:]])

    def value(self, begin: int, before: Any, after: Any, around: _Style, last: bool = False) -> int:
        """Note what turns the value at ``begin`` into ``after``; returns where it ends, or 0 after the last change."""
        same = _same(before, after)
        if not same and isinstance(before, dict) and isinstance(after, dict):
            return self.container(begin, list(before), list(after), before, after, around, last)
        if not same and isinstance(before, list) and isinstance(after, list):
            return self.container(begin, *_identities(before, after), before, after, around, last)
        end = 0 if last and same else _scan(self.text, begin)[1]
        if not same:
            self.splices.append((begin, end, self.spell(after, around)))
        return end

    def container(
        self, begin: int, old: Sequence[Any], new: Sequence[Any], before: Any, after: Any, around: _Style, last: bool
    ) -> int:
        """As `value`, of an object or array; ``old`` and ``new`` say which item is which, before and after."""
        named = isinstance(before, dict)
        position = _past_gap(self.text, begin + 1)
        style = self.local(begin, position, around)
        inner = style.inner
        pairs = _aligned(old, new)
        moves = not len(pairs) == len(old) == len(new)
        values = list(before.values()) if named else before
        becomes = list(after.values()) if named else after
        changed = (
            [
                n
                for n, (a, b) in enumerate(zip(values, becomes, strict=False))
                if old[n] != new[n] or (a is not b and not _same(a, b))
            ]
            if not moves
            else []
        )
        places: list[tuple[int, int]] = []
        inline = False
        for i, j in pairs:
            if i is None:
                continue
            first = position
            if named:
                key, position = _scan(self.text, position)
                if key != old[i]:
                    raise ValueError(f"the key {key!r} twice")
                if j is not None and new[j] != key:
                    self.splices.append((first, position, self.quote(new[j])))
                position = _past_gap(self.text, _past_gap(self.text, position) + 1)
            at, was = position, values[i]
            ends = not moves and i == changed[-1]
            position = self.value(at, was, was if j is None else becomes[j], inner, last and ends)
            if ends:
                return 0 if last else _scan(self.text, begin)[1]
            nested = isinstance(was, dict | list) and len(was) > 0
            inline = inline or (nested and self.text.find("\n", at, position) < 0)
            places.append((first, position))
            position = _past_gap(self.text, position)
            if self.text[position] == ",":
                position = _past_gap(self.text, position + 1)
        if self.text[position] not in "]}":
            raise ValueError("a key twice")
        items = list(after.items()) if named else after
        within = inner.inline if inline else inner
        spelled = {j: self.item(items[j], within, named) for i, j in pairs if i is None and j is not None}
        self.membership((begin + 1, position), pairs, places, spelled, style)
        return position + 1

    def membership(
        self,
        inside: tuple[int, int],
        pairs: list[Pair],
        places: list[tuple[int, int]],
        spelled: dict[int, str],
        style: _Style,
    ) -> None:
        """Note the items of a container that come and go.

        Args:
            inside: Where the text between the brackets lies.
            pairs: Which item becomes which.
            places: Where each old item lies.
            spelled: The new items.
            style: The container's.
        """
        stay = [i for i, j in pairs if i is not None and j is not None]
        if not stay:
            body = style.between.join(spelled.values())
            self.splices.append((*inside, style.open + body + style.close if body else ""))
            return
        last = stay[-1]
        if last + 1 < len(places):
            self.splices.append((places[last][1], places[-1][1], ""))
        following: int | None = None
        found = []  # from back to front
        for i, j in reversed(pairs):
            if i is None and j is not None:
                at, new = (
                    (places[last][1], style.between + spelled[j])
                    if following is None
                    else (places[following][0], spelled[j] + style.between)
                )
                found.append((at, at, new))
            elif i is not None and j is None and i < last:
                found.append((places[i][0], places[i + 1][0], ""))
            elif i is not None and j is not None:
                following = i
        self.splices.extend(reversed(found))

    def local(self, begin: int, first: int, around: _Style) -> _Style:
        """The style of the container at ``begin``, whose first item or closing bracket is at ``first``."""
        opening = self.text[begin + 1 : first]
        if self.text[first] in "]}":
            return around
        if "\n" not in opening:
            return around.inline
        line = self.text.rfind("\n", 0, begin) + 1
        close = opening[: opening.rfind("\n") + 1] + self.text[line : min(begin, _past_gap(self.text, line))]
        return _Style(close, opening.removeprefix(close) if opening.startswith(close) else "  ", around.colon)

    def quote(self, text: str) -> str:
        """A string as the file would have it."""
        return json.dumps(text, ensure_ascii=self.ascii)

    def item(self, item: Any, style: _Style, named: bool) -> str:
        """A new item; the style is that of a container which it is."""
        return self.quote(item[0]) + style.colon + self.spell(item[1], style) if named else self.spell(item, style)

    def spell(self, value: Any, style: _Style) -> str:
        """A new value, in this style if it is a container."""
        if isinstance(value, dict | list) and value:
            named = isinstance(value, dict)
            items: Iterable[Any] = value.items() if isinstance(value, dict) else value
            body = style.between.join(self.item(item, style.inner, named) for item in items)
            return f"{'{' if named else '['}{style.open}{body}{style.close}{'}' if named else ']'}"
        return json.dumps(value, ensure_ascii=self.ascii)


def _same(before: Any, after: Any) -> bool:
    return before is after or (type(before) is type(after) and before == after)


def _identities(before: list[Any], after: list[Any]) -> tuple[Sequence[Hashable], Sequence[Hashable]]:
    """What makes an element of a list the same as before: its id, the text that it is, or else its place."""
    sides = [[e.get("id") if isinstance(e, dict) else e for e in side] for side in (before, after)]
    if all(isinstance(e, str | int) for side in sides for e in side):
        return sides[0], sides[1]
    return range(len(before)), range(len(after))


def _aligned(old: Sequence[Hashable], new: Sequence[Hashable]) -> list[Pair]:
    """Which item becomes which, in order."""
    unlike = [(a, b) for a, b in zip(old, new, strict=False) if a != b]
    if len(old) == len(new) and not {a for a, _ in unlike} & {b for _, b in unlike}:  # others only keep their places
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
            raise ValueError("items in another order")
    return pairs

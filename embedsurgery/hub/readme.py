"""Rewrites embedsurgery's parts of a README and keeps every other byte.

Two parts are embedsurgery's: the lines between two comments in the front matter, and the lines between two comments in
the text. What they say is ``card.py``'s.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import yaml

from embedsurgery.errors import HubError

README = "README.md"
BEGIN, END = "<!-- embedsurgery:begin, renewed with each push -->", "<!-- embedsurgery:end -->"
FRONT_BEGIN, FRONT_END = "# embedsurgery:begin, renewed with each push", "# embedsurgery:end"

_FRONT = re.compile(r"\A(\ufeff?\s*---[ \t]*\n)(.*?)(^---[ \t]*(?:\n|\Z))", re.DOTALL | re.MULTILINE)
FrontMatter = Mapping[str, str | Sequence[str]]
"""Key -> a value, or values to add to the key's list."""


def update_readme(readme: str | None, front: FrontMatter, title: str, body: str) -> str:
    """Rewrite embedsurgery's parts of a README, or write a new README.

    Where the author has set one of the keys, the author's value stays; values of lists are added to the author's.

    Args:
        readme: The README, None for a new one.
        front: Front matter to write.
        title: Heading of a new README.
        body: Markdown to write.

    Raises:
        HubError: The front matter is not a YAML mapping, or one of the two comments around the body is missing.
    """
    if readme is None:
        return f"---\n{_front_lines(front)}---\n\n# {title}\n\n{BEGIN}\n{body}\n{END}\n"
    line = "\r\n" if "\r\n" in readme else "\n"
    text = readme.replace("\r\n", "\n")
    match = _FRONT.match(text)
    if match is None:
        before, head, rest = "---\n", _merge_front_matter("", front), "---\n\n" + text.removeprefix("\ufeff")
    else:
        before, head, rest = match[1], _merge_front_matter(match[2], front), match[3] + text[match.end() :]
    return (before + head + _replace_body(rest, body)).replace("\n", line)


def read_front_matter(readme: str) -> dict[str, object]:
    """Parse a README's front matter; empty where there is none, or where it cannot be parsed."""
    match = _FRONT.match(readme.replace("\r\n", "\n"))
    try:
        return _parse_front_matter(match[2]) if match else {}
    except HubError:
        return {}


def _replace_body(text: str, body: str) -> str:
    begins, ends = (
        [m.start() for m in re.finditer(rf"^{re.escape(mark)}[ \t]*$", text, re.MULTILINE)] for mark in (BEGIN, END)
    )
    if not begins and not ends:
        return f"{text.rstrip(chr(10))}\n\n{BEGIN}\n{body}\n{END}\n"
    if len(begins) != 1 or len(ends) != 1 or begins > ends:
        raise HubError(
            "a comment around embedsurgery's part of the README is missing",
            where=README,
            expected=f"one line {BEGIN} and one {END} after it",
            found=f"{len(begins)} and {len(ends)}",
            hint="restore the missing comment, or remove both",
        )
    return f"{text[: begins[0]]}{BEGIN}\n{body}\n{text[ends[0] :]}"


def _merge_front_matter(head: str, front: FrontMatter) -> str:
    """Rewrite embedsurgery's lines in front matter, which consists of whole lines."""
    theirs = re.sub(
        rf"^{re.escape(FRONT_BEGIN)}\n.*?^{re.escape(FRONT_END)}(\n|\Z)", "", head, flags=re.DOTALL | re.MULTILINE
    )
    known = _parse_front_matter(theirs)
    more = {}
    for key, value in front.items():
        if key not in known:
            more[key] = value
        elif not isinstance(value, str):
            theirs = _add_values(theirs, key, value, known[key])
    result = theirs + (_front_lines(more) if more else "")
    # The author's YAML is edited as text, to keep its comments and quotes; so the result is always parsed again.
    if not isinstance(_parse_front_matter(result), dict):
        raise AssertionError(result)
    return result


def _parse_front_matter(head: str) -> dict[str, object]:
    try:
        body = yaml.safe_load(head)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 2}" if mark is not None else ""
        raise HubError(
            "the README's front matter is not YAML",
            where=f"{README}{line}",
            expected="YAML",
            found=str(getattr(error, "problem", None) or "invalid characters")[:120],
            hint="correct the lines between the two ---",
        ) from None
    except (ValueError, RecursionError) as error:  # an impossible date; deep nesting
        raise HubError("cannot read the README's front matter", where=README, found=str(error)[:120]) from None
    if body is None:
        return {}
    if not isinstance(body, dict):
        raise HubError(
            "the README's front matter is not a mapping",
            where=README,
            expected="lines of key: value",
            found=type(body).__name__,
        )
    return {str(key): value for key, value in body.items()}


def _add_values(head: str, key: str, values: Iterable[str], present: object) -> str:
    """Add values to the list of a key, in the style in which the author has written it."""
    listed = present if isinstance(present, list) else [] if present is None else [present]
    new = [value for value in values if value not in listed]
    if not new:
        return head
    root = yaml.compose(head, Loader=yaml.SafeLoader)
    node = next(value for name, value in root.value if name.value == key)
    start, end = node.start_mark.index, node.end_mark.index
    if isinstance(node, yaml.SequenceNode) and not node.flow_style:
        last = node.value[-1]
        column = " " * node.start_mark.column
        stop = head.find("\n", last.end_mark.index)
        stop = len(head) if stop < 0 else stop
        return head[:stop] + "".join(f"\n{column}- {_scalar(v)}" for v in new) + head[stop:]
    if isinstance(node, yaml.SequenceNode):
        inner = head[: end - 1].rstrip().rstrip(",")
        return f"{inner}{', ' if node.value else ''}{', '.join(map(_scalar, new))}]{head[end:]}"
    kept = [head[start:end].strip()] if present is not None else []
    space = "" if head[:start].endswith(" ") else " "
    return f"{head[:start]}{space}[{', '.join([*kept, *map(_scalar, new)])}]{head[end:]}"


def _front_lines(front: FrontMatter) -> str:
    lines = []
    for key, value in front.items():
        if isinstance(value, str):
            lines.append(f"{key}: {_scalar(value)}")
        else:
            lines += [f"{key}:", *(f"- {_scalar(v)}" for v in value)]
    return "".join(f"{line}\n" for line in (FRONT_BEGIN, *lines, FRONT_END))


def _scalar(value: str) -> str:
    return str(yaml.safe_dump(value, width=10**6, allow_unicode=True)).removesuffix("\n").removesuffix("\n...")

"""Model cards: what we say of an adapter or a merged model, and how it gets into a README without touching the rest.

Two parts of a README are ours: the lines between two comments in its front matter, and what stands between two
comments in its text. Both are renewed with each push; every other byte is its author's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import yaml

from embedsurgery.adapters.adapter import Adapter
from embedsurgery.adapters.manifest import Manifest
from embedsurgery.errors import EmbedSurgeryError, HubError, printable
from embedsurgery.hub.ids import HubId, find_id
from embedsurgery.plugins.current import registry
from embedsurgery.stores.store import Store

README = "README.md"
BEGIN, END = "<!-- embedsurgery:begin, renewed with each push -->", "<!-- embedsurgery:end -->"
FRONT_BEGIN, FRONT_END = "# embedsurgery:begin, renewed with each push", "# embedsurgery:end"

_FRONT = re.compile(r"\A(\ufeff?\s*---[ \t]*\n)(.*?)(^---[ \t]*(?:\n|\Z))", re.DOTALL | re.MULTILINE)
_LISTED = 20
"""Tokens that are listed by name."""

Front = Mapping[str, str | Sequence[str]]
"""Our front matter: key -> value, or values to be among the key's."""


def renewed(readme: str | None, front: Front, title: str, body: str) -> str:
    """A README with our parts renewed; without one, a new README.

    Where its author has set one of our keys, the author's value stays; our tags are added to the author's.

    Raises:
        HubError: The front matter is no YAML, or one of our marks stands without the other.
    """
    if readme is None:
        return f"---\n{_ours(front)}---\n\n# {title}\n\n{BEGIN}\n{body}\n{END}\n"
    line = "\r\n" if "\r\n" in readme else "\n"
    text = readme.replace("\r\n", "\n")
    match = _FRONT.match(text)
    if match is None:
        before, head, rest = "---\n", _merged("", front), "---\n\n" + text.removeprefix("\ufeff")
    else:
        before, head, rest = match[1], _merged(match[2], front), match[3] + text[match.end() :]
    return (before + head + _replaced(rest, body)).replace("\n", line)


def _replaced(text: str, body: str) -> str:
    begins, ends = (
        [m.start() for m in re.finditer(rf"^{re.escape(mark)}[ \t]*$", text, re.MULTILINE)] for mark in (BEGIN, END)
    )
    if not begins and not ends:
        return f"{text.rstrip(chr(10))}\n\n{BEGIN}\n{body}\n{END}\n"
    if len(begins) != 1 or len(ends) != 1 or begins > ends:
        raise HubError(
            "our marked part of the README has lost one of its marks",
            where=README,
            expected=f"one line {BEGIN} and one {END} after it",
            found=f"{len(begins)} and {len(ends)}",
            hint="put the marks back, or remove both",
        )
    return f"{text[: begins[0]]}{BEGIN}\n{body}\n{text[ends[0] :]}"


def _merged(head: str, front: Front) -> str:
    """Front matter, whole lines, with our lines in it."""
    theirs = re.sub(
        rf"^{re.escape(FRONT_BEGIN)}\n.*?^{re.escape(FRONT_END)}(\n|\Z)", "", head, flags=re.DOTALL | re.MULTILINE
    )
    known = _parsed(theirs)
    more = {}
    for key, value in front.items():
        if key not in known:
            more[key] = value
        elif not isinstance(value, str):
            theirs = _with_values(theirs, key, value, known[key])
    result = theirs + (_ours(more) if more else "")
    if not isinstance(_parsed(result), dict):  # what we wrote is read back, always
        raise AssertionError(result)
    return result


def _parsed(head: str) -> dict[str, object]:
    try:
        body = yaml.safe_load(head)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 2}" if mark is not None else ""
        raise HubError(
            "the README's front matter is no YAML",
            where=f"{README}{line}",
            found=str(getattr(error, "problem", None) or "it cannot be read")[:120],
            hint="mend what stands between the two lines of ---",
        ) from None
    except (ValueError, RecursionError) as error:  # a date that is none; nesting
        raise HubError("the README's front matter cannot be read", where=README, found=str(error)[:120]) from None
    if body is None:
        return {}
    if not isinstance(body, dict):
        raise HubError(
            "the README's front matter is no mapping",
            where=README,
            expected="lines of key: value",
            found=type(body).__name__,
        )
    return {str(key): value for key, value in body.items()}


def _with_values(head: str, key: str, values: Iterable[str], present: object) -> str:
    """Front matter whose list under a key has some values; the author's stay as they are written."""
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


def _ours(front: Front) -> str:
    lines = []
    for key, value in front.items():
        if isinstance(value, str):
            lines.append(f"{key}: {_scalar(value)}")
        else:
            lines += [f"{key}:", *(f"- {_scalar(v)}" for v in value)]
    return "".join(f"{line}\n" for line in (FRONT_BEGIN, *lines, FRONT_END))


def _scalar(value: str) -> str:
    return str(yaml.safe_dump(value, width=10**6, allow_unicode=True)).removesuffix("\n").removesuffix("\n...")


def base_id(manifest: Manifest) -> HubId | None:
    """The Hub id of an adapter's base, None where it was named by a path."""
    if manifest.base_model is None:
        return None
    try:
        found = find_id(manifest.base_model)
        return found if found is None or manifest.revision is None else HubId.parse(found.repo, manifest.revision)
    except EmbedSurgeryError:  # a name is only a name
        return None


def adapter_front(adapter: Adapter) -> dict[str, str | list[str]]:
    """An adapter's front matter."""
    base = base_id(adapter.manifest)
    related: dict[str, str | list[str]] = {}
    if base is not None:
        related = {"base_model": base.repo, "base_model_relation": "adapter"}
    tags = ["embedsurgery", adapter.manifest.surgery.replace("_", "-"), "peft"]
    return {**related, "library_name": "embedsurgery", "tags": tags}


def adapter_body(adapter: Adapter, repo: str, size: int, at_hand: Path | None = None) -> str:
    """What we say of an adapter, in Markdown.

    Args:
        adapter: The adapter.
        repo: Where it is pushed to.
        size: Bytes of its files.
        at_hand: The directory of its base, where that is here.
    """
    manifest, base = adapter.manifest, base_id(adapter.manifest)
    name = base.repo if base is not None else "path/to/base"
    link = f"[{name}](https://huggingface.co/{name})" if base is not None else "a model named by a path"
    at = f" at revision {_code(manifest.revision)}" if manifest.revision else ""
    pinned = f", revision={base.revision!r}" if base is not None and base.revision else ""
    return "\n".join(
        [
            f"This is an [embedsurgery](https://pypi.org/project/embedsurgery/) adapter ({_code(manifest.surgery)}) "
            f"for {link}{at}: {size:,} bytes.",
            "",
            *_tables(adapter),
            *_content(adapter, at_hand),
            "## Use it",
            "",
            "With embedsurgery, live on a model:",
            "",
            "```python",
            "import embedsurgery as es",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"model = AutoModelForCausalLM.from_pretrained({name!r}{pinned})",
            f"tokenizer = AutoTokenizer.from_pretrained({name!r}{pinned})",
            f"es.attach(model, es.load({repo!r}), tokenizer=tokenizer)",
            "```",
            "",
            "With PEFT:",
            "",
            "```python",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            f"model = AutoModelForCausalLM.from_pretrained({name!r}{pinned})",
            f"model = PeftModel.from_pretrained(model, {repo!r})",
            "```",
            "",
            "Baked into a copy of the model, for every engine; `embedsurgery unmerge` takes it out again bit for bit:",
            "",
            "```sh",
            f"embedsurgery merge {base or name} {repo} -o merged",
            "```",
            *_sections(manifest),
        ]
    )


def _sections(manifest: Manifest) -> list[str]:
    """What plugins add."""
    found = registry().sections(manifest)
    return [line for part in found for line in ("", f"## {printable(part.title)}", "", _unmarked(part.body))]


def _unmarked(body: str) -> str:
    """Markdown of others without our marks, which would end our part of the card where they stand."""
    return body.replace(BEGIN, "").replace(END, "").strip()


def _tables(adapter: Adapter) -> list[str]:
    lines = []
    for table in adapter.manifest.tables:
        raw = adapter.raw.get(table.name)
        if raw is None or not table.trained:
            continue
        tied = f", tied to {', '.join(map(_code, table.aliases))}" if table.aliases else ""
        lines.append(f"- {_code(table.name)}: {' x '.join(map(str, raw.shape))} in {raw.dtype}{tied}")
    return [*lines, ""] if lines else []


def _content(adapter: Adapter, base: Path | None) -> list[str]:
    """The tokens; or what the surgery has to say, such as virtual tokens with their nearest words."""
    describe, beside = (getattr(adapter.surgery, name, None) for name in ("card_lines", "card_lines_beside"))
    said: Iterable[object] = ()
    store = None if base is None or beside is None else _open(base)
    if store is not None and beside is not None:
        said = beside(adapter, store)
    elif describe is not None:
        said = describe(adapter)
    lines = [printable(str(line)) for line in said]
    tokens = adapter.manifest.tokens
    if tokens:
        lines += ["Tokens:", ""]
        lines += [f"- {index}: {_code(text)}" for index, text in list(tokens.items())[:_LISTED]]
        lines += [f"- and {len(tokens) - _LISTED:,} more"] if len(tokens) > _LISTED else []
    return [*lines, ""] if lines else []


def _open(base: Path) -> Store | None:
    """The base's store; None where it cannot be opened."""
    try:
        return registry().open_store(base)
    except EmbedSurgeryError:
        return None


def merged_front(bases: Sequence[str], kept: Mapping[str, object]) -> dict[str, str | list[str]]:
    """A merged model's front matter; ``kept`` is its base's, of which what still holds is kept."""
    same = ("license", "license_name", "license_link", "pipeline_tag", "library_name", "language")
    taken = {key: kept[key] for key in same if isinstance(kept.get(key), str)}
    front: dict[str, str | list[str]] = {key: str(value) for key, value in taken.items()}
    return {**front, "base_model": list(bases), "base_model_relation": "merge", "tags": ["embedsurgery"]}


def merged_body(base: str, adapters: Sequence[str], edits: Sequence[str], repo: str) -> str:
    """What we say of a merged model, in Markdown."""
    return "\n".join(
        [
            f"This is {_code(base)} with {', '.join(map(_code, adapters))} baked in by "
            "[embedsurgery](https://pypi.org/project/embedsurgery/). Every byte of every tensor outside these edits is "
            "the base's:",
            "",
            *(f"- {_code(edit)}" for edit in edits),
            "",
            f"`embedsurgery unmerge` gives the base's weights back bit for bit from a download of {_code(repo)}: what "
            "was there before is in `.embedsurgery/`.",
        ]
    )


def front_matter(readme: str) -> dict[str, object]:
    """A README's front matter, empty where there is none or where it cannot be read."""
    match = _FRONT.match(readme.replace("\r\n", "\n"))
    try:
        return _parsed(match[2]) if match else {}
    except HubError:
        return {}


def _code(text: str) -> str:
    """Text from data as inline code, on one line, whatever is in it."""
    shown = printable(text)
    fence = "`" * (max((len(run) for run in re.findall("`+", shown)), default=0) + 1)
    space = " " if not shown.strip() or shown[0] in "` " or shown[-1] in "` " else ""
    return f"{fence}{space}{shown}{space}{fence}"

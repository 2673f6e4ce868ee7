"""What a model card says of an adapter or a merged model. How it goes into an existing README is ``readme.py``'s."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from embedsurgery.adapters.adapter import Adapter
from embedsurgery.adapters.manifest import Manifest
from embedsurgery.errors import EmbedSurgeryError, escape_unprintable
from embedsurgery.hub.ids import HubId, find_id
from embedsurgery.hub.readme import BEGIN, END
from embedsurgery.plugins.current import registry
from embedsurgery.stores.store import Store

_MAX_LISTED = 20
"""Tokens that a card lists by name."""

_USAGE = """\
## Use it

With embedsurgery, live on a model:

```python
import embedsurgery as es
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({base})
tokenizer = AutoTokenizer.from_pretrained({base})
es.attach(model, es.load({repo!r}), tokenizer=tokenizer)
```

With PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(model, {repo!r})
```

Merged into a copy of the model, for every engine; `embedsurgery unmerge` undoes it bit for bit:

```sh
embedsurgery merge {base_id} {repo} -o merged
```"""


def base_id(manifest: Manifest) -> HubId | None:
    """Return the Hub id of an adapter's base, None where the adapter names a path."""
    if manifest.base_model is None:
        return None
    try:
        found = find_id(manifest.base_model)
        return found if found is None or manifest.revision is None else HubId.parse(found.repo, manifest.revision)
    except EmbedSurgeryError:  # the name comes from a file: one that cannot be an id is only text
        return None


def adapter_front_matter(adapter: Adapter) -> dict[str, str | list[str]]:
    """Return the front matter of an adapter's card."""
    base = base_id(adapter.manifest)
    related: dict[str, str | list[str]] = {}
    if base is not None:
        related = {"base_model": base.repo, "base_model_relation": "adapter"}
    tags = ["embedsurgery", adapter.manifest.surgery.replace("_", "-"), "peft"]
    return {**related, "library_name": "embedsurgery", "tags": tags}


def adapter_body(adapter: Adapter, repo: str, size: int, base_directory: Path | None = None) -> str:
    """Return the Markdown of an adapter's card.

    Args:
        adapter: The adapter.
        repo: The repository that it is pushed to.
        size: Size of its files in bytes.
        base_directory: A local copy of its base, if there is one.
    """
    manifest, base = adapter.manifest, base_id(adapter.manifest)
    name = base.repo if base is not None else "path/to/base"
    link = f"[{name}](https://huggingface.co/{name})" if base is not None else "a model named by a path"
    revision = f" at revision {_code_span(manifest.revision)}" if manifest.revision else ""
    pinned = f", revision={base.revision!r}" if base is not None and base.revision else ""
    lines = [
        "This is an [embedsurgery](https://pypi.org/project/embedsurgery/) adapter "
        f"({_code_span(manifest.surgery)}) for {link}{revision}: {size:,} bytes.",
        "",
        *_table_lines(adapter),
        *_content_lines(adapter, base_directory),
        _USAGE.format(base=repr(name) + pinned, base_id=base or name, repo=repo),
        *_plugin_sections(manifest),
    ]
    return "\n".join(lines)


def _plugin_sections(manifest: Manifest) -> list[str]:
    sections = registry().sections(manifest)
    texts = [(escape_unprintable(section.title), _strip_marks(section.body)) for section in sections]
    return [line for title, body in texts for line in ("", f"## {title}", "", body)]


def _strip_marks(body: str) -> str:
    """Remove embedsurgery's comments from a plugin's Markdown: they would end the part that is rewritten."""
    return body.replace(BEGIN, "").replace(END, "").strip()


def _table_lines(adapter: Adapter) -> list[str]:
    lines = []
    for table in adapter.manifest.tables:
        raw = adapter.raw.get(table.name)
        if raw is None or not table.trained:
            continue
        tied = f", tied to {', '.join(map(_code_span, table.aliases))}" if table.aliases else ""
        lines.append(f"- {_code_span(table.name)}: {' x '.join(map(str, raw.shape))} in {raw.dtype}{tied}")
    return [*lines, ""] if lines else []


def _content_lines(adapter: Adapter, base: Path | None) -> list[str]:
    """List the tokens, after the lines of the surgery, such as virtual tokens with their nearest words."""
    # Optional methods of a surgery; the second also gets the base, to compare the adapter with its rows.
    describe = getattr(adapter.surgery, "card_lines", None)
    describe_with_base = getattr(adapter.surgery, "card_lines_beside", None)
    described: Iterable[object] = ()
    store = None if base is None or describe_with_base is None else _open_base(base)
    if store is not None and describe_with_base is not None:
        described = describe_with_base(adapter, store)
    elif describe is not None:
        described = describe(adapter)
    lines = [escape_unprintable(str(line)) for line in described]
    tokens = adapter.manifest.tokens
    if tokens:
        lines += ["Tokens:", ""]
        lines += [f"- {index}: {_code_span(text)}" for index, text in list(tokens.items())[:_MAX_LISTED]]
        lines += [f"- and {len(tokens) - _MAX_LISTED:,} more"] if len(tokens) > _MAX_LISTED else []
    return [*lines, ""] if lines else []


def _open_base(base: Path) -> Store | None:
    """Open the base's store; None where that fails, since a card can do without it."""
    try:
        return registry().open_store(base)
    except EmbedSurgeryError:
        return None


def merged_model_front_matter(bases: Sequence[str], kept: Mapping[str, object]) -> dict[str, str | list[str]]:
    """Return the front matter of a merged model's card.

    Args:
        bases: Repositories of the base.
        kept: The base's front matter, of which license, task and language are kept.
    """
    same = ("license", "license_name", "license_link", "pipeline_tag", "library_name", "language")
    front: dict[str, str | list[str]] = {key: str(kept[key]) for key in same if isinstance(kept.get(key), str)}
    return {**front, "base_model": list(bases), "base_model_relation": "merge", "tags": ["embedsurgery"]}


def merged_model_body(base: str, adapters: Sequence[str], edits: Sequence[str], repo: str) -> str:
    """Return the Markdown of a merged model's card."""
    return "\n".join(
        [
            f"This is {_code_span(base)} with {', '.join(map(_code_span, adapters))} merged by "
            "[embedsurgery](https://pypi.org/project/embedsurgery/). Every byte of every tensor outside these edits is "
            "the base's:",
            "",
            *(f"- {_code_span(edit)}" for edit in edits),
            "",
            f"`embedsurgery unmerge` restores the base's weights bit for bit from a download of "
            f"{_code_span(repo)}: the original rows are in `.embedsurgery/`.",
        ]
    )


def _code_span(text: str) -> str:
    """Quote text from data as inline code on one line, whatever characters it has."""
    shown = escape_unprintable(text)
    fence = "`" * (max((len(run) for run in re.findall("`+", shown)), default=0) + 1)
    space = " " if not shown.strip() or shown[0] in "` " or shown[-1] in "` " else ""
    return f"{fence}{space}{shown}{space}{fence}"

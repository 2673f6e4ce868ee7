"""``embedsurgery inspect``: the tables of a checkpoint, from its headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from embedsurgery.cli.options import token_option
from embedsurgery.cli.render import json_option, print_json, print_table, size


@click.command("inspect")
@click.argument("model", type=click.Path(path_type=Path))
@token_option
@json_option
def command(model: Path, as_json: bool) -> None:
    """The embedding tables of the checkpoint MODEL, a directory or a Hub id.

    Reads headers, index, config and tokenizer.json, and no weights. Of org/name or org/name@revision, headers come by
    range requests, kilobytes for any size, and the tokenizer stays where it is.
    """
    facts = inspect(model)
    if as_json:
        print_json(facts)
        return
    rows = [
        (
            t["name"] + (" (input)" if t["name"] == facts["input"] else ""),
            "\n".join(t["aliases"]) or "-",
            f"{t['shape'][0]:,} x {t['shape'][1]:,}",
            t["dtype"],
            " + ".join(t["roles"]),
            t["kind"],
            "\n".join(dict.fromkeys(t["files"].values())),
            size(t["bytes"]),
        )
        for t in facts["tables"]
    ]
    print_table(f"{model}", ("table", "tied to", "shape", "dtype", "role", "kind", "file", "size"), rows)
    used = facts["rows"]
    if used is not None:
        free = [f"{len(used[k]):,} {k}" + (f" ({ranges(used[k])})" if used[k] else "") for k in ("reserved", "spare")]
        agree = "; ".join(used["disagreements"]) or "tokenizer, config and table agree"
        click.echo(f"rows: {used['used']:,} used by the tokenizer, {', '.join(free)}; {agree}")
    elif facts["input"] is not None:
        click.echo("rows: which are used is not known: there is no tokenizer.json here to say")


def inspect(model: Path) -> dict[str, Any]:
    """What the verb shows, as JSON values."""
    from embedsurgery import hub
    from embedsurgery.graph.from_names import vocabulary_sizes
    from embedsurgery.loading import open_store
    from embedsurgery.tensors.raw import ITEMSIZE
    from embedsurgery.tokenizer.reading import row_use

    with open_store(model) as store:
        graph, config = store.claimed_graph, store.config
    tables = [
        {
            "name": t.name,
            "aliases": list(t.aliases),
            "shape": list(t.shape),
            "dtype": t.dtype,
            "roles": list(t.roles),
            "kind": t.kind,
            "sites": [{"module": s.module, "role": s.role, "bias": s.bias} for s in t.sites],
            "files": dict(t.files),
            "bytes": t.shape[0] * t.shape[1] * ITEMSIZE.get(t.dtype, 0) * max(1, len(t.files)),
        }
        for t in graph.tables
    ]
    vocabularies = [
        {"name": v.name, "size": v.size, "tables": list(v.tables), "vectors": list(v.vectors)}
        for v in graph.vocabularies
    ]
    rows = None
    if hub.find_id(model) is None and graph.input is not None:
        use = row_use(model, graph.table(graph.input).shape[0], vocabulary_sizes(config))
        rows = use and {
            "used": use.used,
            "reserved": list(use.reserved),
            "spare": list(use.spare),
            "disagreements": list(use.disagreements),
        }
    return {
        "model": str(model),
        "input": graph.input,
        "tables": tables,
        "vocabularies": vocabularies,
        "rows": rows,
    }


def ranges(numbers: list[int], most: int = 4) -> str:
    """Ascending numbers as ranges: "3-5, 9"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts[:most])
    return text if len(parts) <= most else f"{text}, ..."

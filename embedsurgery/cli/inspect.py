"""``embedsurgery inspect``: list the tables of a checkpoint, from its headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from embedsurgery.cli.options import token_option
from embedsurgery.cli.render import format_size, json_option, print_json, print_table

if TYPE_CHECKING:
    from embedsurgery.graph import EmbeddingGraph


@click.command("inspect")
@click.argument("model", type=click.Path(path_type=Path))
@token_option
@json_option
def command(model: Path, as_json: bool) -> None:
    """List the embedding tables of the checkpoint MODEL, a directory or a Hub id.

    Reads headers, index, config and tokenizer.json, but no weights. For a Hub id (org/name or org/name@revision), only
    headers are fetched, by range requests: kilobytes for a checkpoint of any size. Its tokenizer is not read.
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
            format_size(t["bytes"]),
        )
        for t in facts["tables"]
    ]
    print_table(f"{model}", ("table", "tied to", "shape", "dtype", "role", "kind", "file", "size"), rows)
    if facts["rows"] is not None:
        click.echo(_format_row_use(facts["rows"]))
    elif facts["input"] is not None:
        click.echo("rows: unknown which are used, no tokenizer.json was read")


def inspect(model: Path) -> dict[str, Any]:
    """Return what the command prints, as JSON values."""
    from embedsurgery import hub
    from embedsurgery.graph.config import vocabulary_sizes
    from embedsurgery.loading import open_store
    from embedsurgery.tokenizer.reading import read_row_use

    with open_store(model) as store:
        graph, config = store.claimed_graph, store.config
    vocabularies = [
        {"name": v.name, "size": v.size, "tables": list(v.tables), "vectors": list(v.vectors)}
        for v in graph.vocabularies
    ]
    rows = None
    if hub.find_id(model) is None and graph.input is not None:
        use = read_row_use(model, graph.table(graph.input).shape[0], vocabulary_sizes(config))
        rows = use and {
            "used": use.used,
            "reserved": list(use.reserved),
            "spare": list(use.spare),
            "disagreements": list(use.disagreements),
        }
    return {
        "model": str(model),
        "input": graph.input,
        "tables": _tables_to_json(graph),
        "vocabularies": vocabularies,
        "rows": rows,
    }


def _tables_to_json(graph: EmbeddingGraph) -> list[dict[str, Any]]:
    from embedsurgery.tensors.raw import ITEMSIZE

    return [
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


def _format_row_use(use: dict[str, Any]) -> str:
    """Format which rows the tokenizer uses: "rows: 40 used by the tokenizer, 0 reserved, 2 spare (40-41); ..."."""
    unused = [f"{len(use[k]):,} {k}" + (f" ({format_ranges(use[k])})" if use[k] else "") for k in ("reserved", "spare")]
    disagreements = "; ".join(use["disagreements"]) or "tokenizer, config and table agree"
    return f"rows: {use['used']:,} used by the tokenizer, {', '.join(unused)}; {disagreements}"


def format_ranges(numbers: list[int], limit: int = 4) -> str:
    """Format ascending numbers as ranges: "3-5, 9"."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges[:limit])
    return text if len(ranges) <= limit else f"{text}, ..."

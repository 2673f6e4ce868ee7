"""``embedsurgery log``: the merges that lie in a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from embedsurgery.cli.options import token_option
from embedsurgery.cli.render import json_option, print_json, print_table


@click.command("log")
@click.argument("merged", type=click.Path(path_type=Path))
@token_option
@json_option
def command(merged: Path, as_json: bool) -> None:
    """The merges in the checkpoint MERGED, the last first: what `embedsurgery unmerge` can take out.

    MERGED is a directory or a Hub id; of a Hub id only the headers of the records are read.
    """
    from embedsurgery.checkpoints.log import list_merges

    records = list_merges(merged)
    if as_json:
        print_json({"model": str(merged), "merges": [asdict(record) for record in records]})
        return
    if not records:
        click.echo(f"{merged}: no merge is recorded")
        return
    lines = []
    for record in reversed(records):
        tokens = ", ".join(repr(text) for text in list(record.tokens.values())[:4])
        rows = ", ".join(f"{count:,} of {table}" for table, count in record.rows.items())
        weight = "" if record.weight == 1 else f" x {record.weight:g}"
        lines.append(
            (
                str(record.number),
                f"{record.adapter or record.surgery or '-'}{weight}",
                (record.adapter_sha256 or "-")[:12],
                rows or "-",
                tokens + (", ..." if len(record.tokens) > 4 else "") or "-",
                record.time or "-",
                record.version or "-",
            )
        )
    print_table(str(merged), ("merge", "adapter", "sha256", "rows", "tokens", "time", "version"), lines)

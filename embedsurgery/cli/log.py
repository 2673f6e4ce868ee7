"""``embedsurgery log``: list the merges of a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from embedsurgery.cli.options import token_option
from embedsurgery.cli.render import json_option, print_json, print_table

if TYPE_CHECKING:
    from embedsurgery.checkpoints.records import MergeRecord

_MAX_TOKENS = 4
_HASH_DIGITS = 12


@click.command("log")
@click.argument("merged", type=click.Path(path_type=Path))
@token_option
@json_option
def command(merged: Path, as_json: bool) -> None:
    """List the merges of the checkpoint MERGED, newest first.

    `embedsurgery unmerge` can undo them. MERGED is a directory or a Hub id. For a Hub id, only the headers of the
    records are read.
    """
    from embedsurgery.checkpoints.log import list_merges

    records = list_merges(merged)
    if as_json:
        print_json({"model": str(merged), "merges": [asdict(record) for record in records]})
        return
    if not records:
        click.echo(f"{merged}: no merges")
        return
    columns = ("merge", "adapter", "sha256", "rows", "tokens", "time", "version")
    print_table(str(merged), columns, [_format_record(record) for record in reversed(records)])


def _format_record(record: MergeRecord) -> tuple[str, ...]:
    """Format a record as the cells of its row."""
    tokens = ", ".join(repr(text) for text in list(record.tokens.values())[:_MAX_TOKENS])
    more = ", ..." if len(record.tokens) > _MAX_TOKENS else ""
    rows = ", ".join(f"{count:,} of {table}" for table, count in record.rows.items())
    weight = "" if record.weight == 1 else f" x {record.weight:g}"
    return (
        str(record.number),
        f"{record.adapter or record.surgery or '-'}{weight}",
        (record.adapter_sha256 or "-")[:_HASH_DIGITS],
        rows or "-",
        tokens + more or "-",
        record.time or "-",
        record.version or "-",
    )

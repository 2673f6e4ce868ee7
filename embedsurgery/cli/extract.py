"""``embedsurgery extract``: the rows that full tuning changed, as an adapter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from embedsurgery.cli.options import token_option
from embedsurgery.cli.render import copying, json_option, print_json, size
from embedsurgery.errors import OutputExistsError


@click.command("extract")
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("tuned", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The adapter's directory.")
@click.option(
    "--threshold",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    metavar="X",
    help="A row is changed where an element differs by more than X; 0: by any bit.",
)
@click.option("--dry-run", is_flag=True, help="Say what was found, write nothing.")
@token_option
@json_option
def command(base: Path, tuned: Path, output: Path | None, threshold: float, dry_run: bool, as_json: bool) -> None:
    """Make an adapter of the embedding rows in which TUNED differs from BASE.

    TUNED is a whole checkpoint, or a PEFT adapter that saved whole embeddings (modules_to_save). Merging the adapter
    into BASE gives TUNED's tables again. Both are directories or Hub ids, org/name or org/name@revision.
    """
    from embedsurgery.checkpoints.extracting import extract_checkpoint

    if output is None and not dry_run:
        raise click.UsageError("missing option '-o' / '--output', which only --dry-run does without")
    if output is not None and os.path.exists(output):
        raise OutputExistsError("the output exists already", where=output, hint="name a new directory, or remove it")
    with copying("reading") as progress:
        found = extract_checkpoint(base, tuned, threshold=threshold, progress=progress)
    written = 0
    if found.adapter is not None and output is not None and not dry_run:
        found.adapter.save(output)
        written = sum(path.stat().st_size for path in output.iterdir())
    facts: dict[str, Any] = {
        "base": str(base),
        "tuned": str(tuned),
        "output": str(output) if written else None,
        "rows": dict(found.rows),
        "grown": dict(found.grown),
        "tokens": {str(index): text for index, text in found.tokens.items()},
        "left": list(found.left),
        "table_bytes": found.bytes,
        "adapter_bytes": written,
    }
    if as_json:
        print_json(facts)
        return
    for table, count in found.rows.items():
        more = f", {found.grown[table]:,} of them new" if found.grown[table] else ""
        click.echo(f"{table}: {count:,} changed rows{more}")
    if found.tokens:
        texts = [repr(text) for text in found.tokens.values()]
        click.echo(f"tokens: {', '.join(texts[:8])}{f' and {len(texts) - 8:,} more' if len(texts) > 8 else ''}")
    if found.left:
        more = f" and {len(found.left) - 4:,} more" if len(found.left) > 4 else ""
        click.echo(f"left out, no embedding rows: {', '.join(found.left[:4])}{more}")
    if found.adapter is None:
        click.echo("nothing changed, so there is no adapter to write")
    elif written:
        times = found.bytes / written
        smaller = f"{times:,.0f} times smaller than the tables" if times > 1 else "no smaller than the tables"
        click.echo(f"written: {output} ({size(written)}, {smaller})")

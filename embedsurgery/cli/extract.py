"""``embedsurgery extract``: extract the rows that full fine-tuning changed, as an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from embedsurgery.cli.options import token_option
from embedsurgery.cli.render import format_size, json_option, print_json, show_progress

if TYPE_CHECKING:
    from embedsurgery.checkpoints.extracting import Extraction

_MAX_TOKENS = 8
_MAX_TENSORS = 4


@click.command("extract")
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("tuned", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="New adapter directory; optional with --dry-run.")
@click.option(
    "--threshold",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    metavar="X",
    help="Count a row as changed if an element differs by more than X; 0: by any bit.",
)
@click.option("--dry-run", is_flag=True, help="Print the changed rows, but write nothing.")
@token_option
@json_option
def command(base: Path, tuned: Path, output: Path | None, threshold: float, dry_run: bool, as_json: bool) -> None:
    """Extract the embedding rows in which TUNED differs from BASE, as an adapter.

    TUNED is a whole checkpoint, or a PEFT adapter with whole embeddings (modules_to_save). Merging the new adapter into
    BASE gives TUNED's tables. Both are directories or Hub ids (org/name or org/name@revision).
    """
    from embedsurgery.checkpoints.extracting import extract_checkpoint
    from embedsurgery.files.atomic import refuse_existing

    if output is None and not dry_run:
        raise click.UsageError("missing option '-o' / '--output' (optional only with --dry-run)")
    if output is not None:
        refuse_existing(output)
    with show_progress("reading") as progress:
        extraction = extract_checkpoint(base, tuned, threshold=threshold, progress=progress)
    written = 0
    if extraction.adapter is not None and output is not None and not dry_run:
        extraction.adapter.save(output)
        written = sum(path.stat().st_size for path in output.iterdir())
    if as_json:
        facts: dict[str, Any] = {
            "base": str(base),
            "tuned": str(tuned),
            "output": str(output) if written else None,
            "rows": dict(extraction.rows),
            "grown": dict(extraction.grown),
            "tokens": {str(index): text for index, text in extraction.tokens.items()},
            "left": list(extraction.left),
            "table_bytes": extraction.bytes,
            "adapter_bytes": written,
        }
        print_json(facts)
        return
    _print_extraction(extraction)
    if written:
        times = extraction.bytes / written
        smaller = f"{times:,.0f} times smaller than the tables" if times > 1 else "not smaller than the tables"
        click.echo(f"written: {output} ({format_size(written)}, {smaller})")


def _print_extraction(extraction: Extraction) -> None:
    for table, count in extraction.rows.items():
        new = f", {extraction.grown[table]:,} of them new" if extraction.grown[table] else ""
        click.echo(f"{table}: {count:,} changed rows{new}")
    if extraction.tokens:
        click.echo(f"tokens: {_list_first([repr(text) for text in extraction.tokens.values()], _MAX_TOKENS)}")
    if extraction.left:
        click.echo(f"other changed tensors, not extracted: {_list_first(extraction.left, _MAX_TENSORS)}")
    if extraction.adapter is None:
        click.echo("no changed rows, no adapter")


def _list_first(items: Sequence[str], limit: int) -> str:
    more = f" and {len(items) - limit:,} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more

"""``embedsurgery unmerge``: the last merge taken out of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from embedsurgery.cli.merge import output_option, place, print_report
from embedsurgery.cli.options import token_option
from embedsurgery.cli.render import copying, json_option


@click.command("unmerge")
@click.argument("merged", type=click.Path(path_type=Path))
@output_option
@click.option("--dry-run", is_flag=True, help="Check everything, say what would be done, write nothing.")
@token_option
@json_option
def command(merged: Path, output: Path | None, dry_run: bool, as_json: bool) -> None:
    """Write the checkpoint MERGED, a directory or a Hub id, without its last merge.

    It is bit for bit what it was merged into.
    """
    from embedsurgery.offline import unmerge_checkpoint

    with copying("copying") as progress:
        report = unmerge_checkpoint(merged, place(output, dry_run), dry_run=dry_run, progress=progress)
    print_report(report, "unmerged", as_json)

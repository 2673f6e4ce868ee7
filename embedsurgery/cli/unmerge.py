"""``embedsurgery unmerge``: merges taken out of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from embedsurgery.cli.merge import output_option, place, print_report
from embedsurgery.cli.render import copying, json_option


@click.command("unmerge")
@click.argument("merged", type=click.Path(path_type=Path))
@output_option
@click.option("--all", "everything", is_flag=True, help="Take every merge out: what is left is the original base.")
@click.option("--adapter", metavar="NAME",
              help="Take out the merge of this adapter (its name, number or hash in `embedsurgery log`), if no later one "
              "lies over its rows.")
@click.option("--dry-run", is_flag=True, help="Check everything, say what would be done, write nothing.")
@json_option
def command(
    merged: Path, output: Path | None, everything: bool, adapter: str | None, dry_run: bool, as_json: bool
) -> None:
    """Write the checkpoint MERGED without its last merge, or others: bit for bit what it was merged into."""
    if everything and adapter is not None:
        raise click.UsageError("--all goes without --adapter")
    from embedsurgery.offline import unmerge_checkpoint

    with copying("copying") as progress:
        report = unmerge_checkpoint(merged, place(output, dry_run), all=everything, adapter=adapter, dry_run=dry_run,
                                    progress=progress)  # fmt: skip
    print_report(report, "unmerged", as_json)

"""``embedsurgery unmerge``: undo merges of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from embedsurgery.cli.options import check_output_options, output_options, token_option
from embedsurgery.cli.render import json_option, show_progress
from embedsurgery.cli.reports import print_merge_report


@click.command("unmerge")
@click.argument("merged", type=click.Path(path_type=Path))
@output_options
@click.option("--all", "everything", is_flag=True, help="Undo every merge: restore the original base.")
@click.option(
    "--adapter",
    metavar="NAME",
    help="Undo the merge of this adapter (its name, number or hash in `embedsurgery log`), if no later merge changed "
    "the same rows.",
)
@token_option
@json_option
def command(merged: Path, everything: bool, adapter: str | None, as_json: bool, **where: Any) -> None:
    """Undo the last merge, or others, of the checkpoint MERGED, a directory or a Hub id.

    The result is bit for bit the checkpoint before the merge.
    """
    if everything and adapter is not None:
        raise click.UsageError("--all cannot be combined with --adapter")
    where = check_output_options(**where)
    from embedsurgery.checkpoints.unmerging import unmerge_checkpoint

    with show_progress("copying") as progress:
        report = unmerge_checkpoint(merged, all=everything, adapter=adapter, progress=progress, **where)
    print_merge_report(report, "unmerged", as_json)

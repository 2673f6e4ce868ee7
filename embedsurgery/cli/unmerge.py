"""``embedsurgery unmerge``: merges taken out of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from embedsurgery.cli.merge import print_report
from embedsurgery.cli.options import token_option
from embedsurgery.cli.placing import place_options, placed
from embedsurgery.cli.render import copying, json_option


@click.command("unmerge")
@click.argument("merged", type=click.Path(path_type=Path))
@place_options
@click.option("--all", "everything", is_flag=True, help="Take every merge out: what is left is the original base.")
@click.option(
    "--adapter",
    metavar="NAME",
    help="Take out the merge of this adapter (its name, number or hash in `embedsurgery log`), if no later one "
    "lies over its rows.",
)
@token_option
@json_option
def command(merged: Path, everything: bool, adapter: str | None, as_json: bool, **where: Any) -> None:
    """Write the checkpoint MERGED, a directory or a Hub id, without its last merge, or others.

    It is bit for bit what it was merged into.
    """
    if everything and adapter is not None:
        raise click.UsageError("--all goes without --adapter")
    place = placed(**where)
    from embedsurgery.checkpoints.unmerging import unmerge_checkpoint

    with copying("copying") as progress:
        report = unmerge_checkpoint(merged, all=everything, adapter=adapter, progress=progress, **place)
    print_report(report, "unmerged", as_json)

"""``embedsurgery merge``: adapters baked into a checkpoint on disk."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from embedsurgery.cli.render import copying, json_option, print_json, size

if TYPE_CHECKING:
    from embedsurgery.offline import MergeReport


@click.command("merge")
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("adapters", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="ADAPTER...")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The new checkpoint directory.")
@click.option("--dry-run", is_flag=True, help="Check everything, say what would be done, write nothing.")
@json_option
def command(base: Path, adapters: tuple[Path, ...], output: Path, dry_run: bool, as_json: bool) -> None:
    """Write the checkpoint BASE with each ADAPTER baked in.

    The model is not loaded: files are copied by the kernel, and only the rows are written. What was there before is
    kept in the output's .embedsurgery directory, so that `embedsurgery unmerge` gives BASE back bit for bit.
    """
    from embedsurgery.offline import merge_checkpoint

    with copying("copying") as progress:
        report = merge_checkpoint(base, adapters, output, dry_run=dry_run, progress=progress)
    print_report(report, "merged", as_json)


def print_report(report: MergeReport, verb: str, as_json: bool) -> None:
    """What a merge or unmerge did."""
    if as_json:
        print_json(asdict(report))
        return
    from embedsurgery.plan import count_rows

    rows = ", ".join(f"{count_rows(count)} of {table}" for table, count in report.rows.items())
    would = "" if report.done else "would be "
    click.echo(f"{would}{verb}: {rows} in {', '.join(report.files)}")
    for line in () if report.done else report.edits:
        click.echo(f"  {line}")
    click.echo(f"{'' if report.done else 'would be '}written: {report.output} ({size(report.copied)})")

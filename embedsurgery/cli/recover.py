"""``embedsurgery recover``: finish or roll back an interrupted change."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from embedsurgery.cli.render import json_option, print_json


@click.command("recover")
@click.argument("model", type=click.Path(path_type=Path))
@json_option
def command(model: Path, as_json: bool) -> None:
    """Repair MODEL after a kill, a crash or a power cut.

    An incomplete change in place is rolled back: every file is as before, bit for bit. A complete change is kept, and
    its leftovers are removed. Hidden directories beside MODEL, in which killed runs were building their output, are
    removed too; MODEL may be the output that such a run never finished. If nothing is wrong, nothing changes.
    """
    from embedsurgery.checkpoints.recovery import recover_checkpoint

    report = recover_checkpoint(model)
    if as_json:
        print_json(asdict(report))
        return
    if report.restored:
        click.echo(f"rolled back: {', '.join(report.restored)} in {report.directory}")
    if report.finished:
        click.echo(f"finished: removed the leftovers of a complete change in {report.directory}")
    if report.removed:
        click.echo(f"removed: unfinished output of killed runs, for {', '.join(report.removed)}")
    if not (report.restored or report.finished or report.removed):
        click.echo(f"nothing to recover in {report.directory}")

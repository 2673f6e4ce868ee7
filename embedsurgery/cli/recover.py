"""``embedsurgery recover``: what a crash left is finished or rolled back."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from embedsurgery.cli.render import json_option, print_json


@click.command("recover")
@click.argument("model", type=click.Path(path_type=Path))
@json_option
def command(model: Path, as_json: bool) -> None:
    """Bring MODEL out of the state that a kill, a crash or a power cut left it in.

    A change in place that was not complete is rolled back: every file is as before it, bit for bit. One that was
    complete stands, and what it left is removed. So are hidden directories beside MODEL in which killed runs were
    making new ones; MODEL may be the output that such a run never made. Where nothing is wrong, nothing is done.
    """
    from embedsurgery.checkpoints.recovery import recover_checkpoint

    report = recover_checkpoint(model)
    if as_json:
        print_json(asdict(report))
        return
    if report.restored:
        click.echo(f"rolled back: {', '.join(report.restored)} in {report.directory} as before the change")
    if report.finished:
        click.echo(f"finished: removed what a complete change left in {report.directory}")
    if report.removed:
        click.echo(f"removed: what killed runs left beside it, on the way to {', '.join(report.removed)}")
    if not (report.restored or report.finished or report.removed):
        click.echo(f"nothing to recover in {report.directory}")

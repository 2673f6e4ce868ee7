"""``embedsurgery push``: an adapter on the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from embedsurgery.cli.options import push_options
from embedsurgery.cli.render import json_option, print_json, size

if TYPE_CHECKING:
    from embedsurgery.hub import PushReport


@click.command("push")
@click.argument("adapter", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("repo", metavar="REPO")
@push_options
@json_option
def command(adapter: Path, repo: str, as_json: bool, **options: Any) -> None:
    """Push the directory ADAPTER to REPO, org/name, on the Hugging Face Hub.

    Config, weights and model card go in one commit, made on the commit that was looked at. The repository is made where
    it is not there, private unless --public. What is there already is not pushed again. Of a README that is there only
    our marked part is renewed.
    """
    from embedsurgery import hub

    print_push(hub.push(adapter, repo, **options), as_json)


def print_push(report: PushReport, as_json: bool) -> None:
    """What a push did."""
    if as_json:
        print_json(asdict(report))
        return
    kind = {True: "private", False: "public", None: ""}[report.private]
    made = f"made the {kind} repository {report.repo}" if report.created else f"{kind} repository {report.repo}"
    if not report.changed:
        click.echo(f"unchanged: {made} holds this already, nothing was pushed")
    else:
        what = ", ".join(f"{path} ({size(count)})" for path, count in report.uploaded.items())
        click.echo(f"pushed: {what} to the {made}" if not report.created else f"{made}\npushed: {what}")
        if report.recognised:
            click.echo("the Hub's answer was lost; the commit was found there, and was not repeated")
    if report.copied:
        click.echo(f"copied by the Hub, not sent: {', '.join(report.copied)}")
    if report.left_out:
        click.echo(f"left out, weights in other formats that would be stale: {', '.join(report.left_out)}")
    if report.tag:
        click.echo(f"tag: {report.tag}")
    click.echo(f"commit: {report.sha}\n{report.url}")

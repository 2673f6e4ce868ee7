"""Print the reports that several commands share: of a change to a checkpoint, and of a push."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from embedsurgery.cli.render import format_size, print_json

if TYPE_CHECKING:
    from embedsurgery.checkpoints.report import MergeReport
    from embedsurgery.hub import PushReport


def print_merge_report(report: MergeReport, verb: str, as_json: bool) -> None:
    """Print what a merge, an unmerge or an addition of tokens changed.

    Args:
        report: Its report.
        verb: Past participle for the first line: "merged".
        as_json: Print the report as JSON instead.
    """
    if as_json:
        print_json(asdict(report))
        return
    from embedsurgery.plan.edit import format_row_count
    from embedsurgery.plan.tokens import format_tokens

    would = "" if report.done else "would be "
    rows = ", ".join(f"{format_row_count(count)} of {table}" for table, count in report.rows.items())
    tokens = format_tokens(list(report.tokens.items()))
    changes = "; ".join(part for part in (f"tokens {tokens}" if tokens else "", rows) if part)
    click.echo(f"{would}{verb}{': ' * bool(changes)}{changes} in {', '.join(report.files)}")
    only_rows = all(line.startswith("set ") for line in report.edits)
    for line in () if report.done and only_rows else report.edits:  # the first line has the rows of every table
        click.echo(f"  {line}")
    if report.undo and not report.done:
        click.echo(f"would be kept for unmerge: {format_size(report.undo)}")
    how = "in place" if report.in_place else format_size(report.copied)
    click.echo(f"{would}written: {report.output or 'no output given'} ({how})")


def print_push_report(report: PushReport, as_json: bool) -> None:
    """Print what a push changed on the Hub."""
    if as_json:
        print_json(asdict(report))
        return
    kind = {True: "private", False: "public", None: ""}[report.private]
    repository = f"{kind} repository {report.repo}".strip()
    if report.created:
        click.echo(f"created: {repository}")
    if not report.changed:
        click.echo(f"unchanged: {repository} is up to date")
    else:
        files = ", ".join(f"{path} ({format_size(count)})" for path, count in report.uploaded.items())
        click.echo(f"pushed: {files} to {repository}")
        if report.recognised:
            click.echo("the Hub's answer was lost; the commit was found on the Hub and not repeated")
    if report.copied:
        click.echo(f"copied by the Hub: {', '.join(report.copied)}")
    if report.left_out:
        click.echo(f"not pushed, stale weights in other formats: {', '.join(report.left_out)}")
    if report.tag:
        click.echo(f"tag: {report.tag}")
    click.echo(f"commit: {report.sha}\n{report.url}")

"""Options of several commands: Hub access, pushing, and where a changed checkpoint is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

_Command = TypeVar("_Command", bound=Callable[..., Any])


def _use_token(context: click.Context, option: click.Parameter, token: str | None) -> None:
    if token:
        from embedsurgery.hub import using_token

        context.with_resource(using_token(token))


_HUB_HELP = "Hub access token. HF_TOKEN or the stored login are safer: other users can see a command line."

token_option = click.option("--token", metavar="TOKEN", callback=_use_token, expose_value=False, help=_HUB_HELP)
"""The Hub token of the whole command; see `embedsurgery.hub.using_token`."""

hub_token_option = click.option("--hub-token", metavar="TOKEN", callback=_use_token, expose_value=False, help=_HUB_HELP)
"""The same for a command whose ``--token`` is a token of a vocabulary."""

_OUTPUT_OPTIONS = (
    click.option(
        "-o", "--output", type=click.Path(path_type=Path), help="New checkpoint directory; optional with --dry-run."
    ),
    click.option(
        "--in-place", is_flag=True, help="Change the checkpoint itself; a journal rolls back a failed change."
    ),
    click.option("--hardlink", is_flag=True, help="With -o: hard-link the weight files that do not change."),
    click.option("--dry-run", is_flag=True, help="Check everything and print the changes, but write nothing."),
)


def output_options(command: _Command) -> _Command:
    """Add ``-o``, ``--in-place``, ``--hardlink`` and ``--dry-run``, for `check_output_options`."""
    for option in reversed(_OUTPUT_OPTIONS):
        command = option(command)
    return command


def check_output_options(*, output: Path | None, in_place: bool, hardlink: bool, dry_run: bool) -> dict[str, Any]:
    """Check the options of `output_options`; return them as keyword arguments for ``embedsurgery.checkpoints``.

    Raises:
        click.UsageError: Neither an output nor ``--in-place`` nor ``--dry-run`` is given, or options contradict.
    """
    if in_place and (output is not None or hardlink):
        raise click.UsageError("--in-place cannot be combined with -o / --output or --hardlink")
    if output is None and not dry_run and not in_place:
        raise click.UsageError("missing option '-o' / '--output' or '--in-place' (optional only with --dry-run)")
    return {"output": output, "in_place": in_place, "hardlink": hardlink, "dry_run": dry_run}


def push_options(command: _Command) -> _Command:
    """Add the options of a push to the Hub, for ``embedsurgery.hub.push``."""
    for option in (
        token_option,
        click.option("--message", metavar="TEXT", help="First line of the commit message."),
        click.option("--create-pr", is_flag=True, help="Open a pull request instead of pushing to the branch."),
        click.option("--tag", metavar="TAG", help="Tag the commit."),
        click.option("--revision", metavar="BRANCH", help="Push to this branch; create it if it does not exist."),
        click.option(
            "--private/--public",
            default=True,
            show_default="private",
            help="Visibility of a new repository; an existing one keeps its own.",
        ),
    ):
        command = option(command)
    return command

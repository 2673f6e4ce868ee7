"""Options that several verbs have, of those that reach the Hub."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

_Verb = TypeVar("_Verb", bound=Callable[..., Any])


def _use(context: click.Context, option: click.Parameter, token: str | None) -> None:
    if token:
        from embedsurgery.hub import using_token

        context.with_resource(using_token(token))


_HELP = "For the Hub. HF_TOKEN and the stored login are safer: others see a command line."

token_option = click.option("--token", metavar="TOKEN", callback=_use, expose_value=False, help=_HELP)
"""The token that the verb's work uses throughout; see `embedsurgery.hub.using_token`."""

hub_token_option = click.option("--hub-token", metavar="TOKEN", callback=_use, expose_value=False, help=_HELP)
"""The same, of a verb whose ``--token`` is a token of a vocabulary."""


def push_options(verb: _Verb) -> _Verb:
    """What can be said of a push."""
    for option in (
        token_option,
        click.option("--message", metavar="TEXT", help="The commit's first line."),
        click.option("--create-pr", is_flag=True, help="Open a pull request instead of pushing to the branch."),
        click.option("--tag", metavar="TAG", help="Set this tag on the commit."),
        click.option("--revision", metavar="BRANCH", help="Push to this branch, made where it is not there."),
        click.option(
            "--private/--public",
            default=True,
            show_default="private",
            help="Who sees a repository that is made; one that is there stays as it is.",
        ),
    ):
        verb = option(verb)
    return verb

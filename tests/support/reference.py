"""Generate the README's command reference: ``python -m tests.support.reference`` updates it.

With ``--check``, exits with 1 if it is out of date, and writes nothing. Runs in a process of its own: click caches the
help option of the first context that a command is used with.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from embedsurgery.cli.main import VERBS, cli

README = Path(__file__).resolve().parents[2] / "README.md"
START, END = "<!-- generated: python -m tests.support.reference -->\n", "<!-- end of generated -->\n"


def render_reference() -> str:
    """Render the help of every command, as the command line prints it."""
    context = cli.make_context("embedsurgery", ["inspect"])  # has the group's settings, as in a real call
    return "\n".join(f"```\n{text}\n```\n" for verb in VERBS for text in iterate_help(cli, verb, context))


def iterate_help(group: click.Group, name: str, parent: click.Context) -> Iterator[str]:
    """Yield the help of a command and of its subcommands."""
    command = group.get_command(parent, name)
    assert command is not None
    context = click.Context(command, info_name=name, parent=parent, terminal_width=100, max_content_width=100)
    yield command.get_help(context)
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            yield from iterate_help(command, below, context)


def update(text: str) -> str:
    """Return the README's text with a new generated part."""
    pattern = re.compile(re.escape(START) + ".*?" + re.escape(END), re.DOTALL)
    assert len(pattern.findall(text)) == 1
    return pattern.sub(lambda _: f"{START}\n{render_reference()}\n{END}", text)


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    if sys.argv[1:] == ["--check"]:
        sys.exit(update(text) != text)
    README.write_text(update(text), encoding="utf-8")

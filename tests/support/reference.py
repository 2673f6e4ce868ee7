"""Writes the parts of the README that are generated: ``python -m tests.support.reference`` brings them up to date.

With ``--check`` it only says by its exit code whether they are. In a process of its own either way: click keeps the
help option that a command was first asked with.
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


def commands() -> str:
    """Every verb's help, as the command line prints it."""
    context = cli.make_context("embedsurgery", ["inspect"])  # with the group's own settings, as a real call has them
    return "\n".join(f"```\n{text}\n```\n" for verb in VERBS for text in helps(cli, verb, context))


def helps(group: click.Group, name: str, parent: click.Context) -> Iterator[str]:
    """The help of a command, and of those below it."""
    command = group.get_command(parent, name)
    assert command is not None
    context = click.Context(command, info_name=name, parent=parent, terminal_width=100, max_content_width=100)
    yield command.get_help(context)
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            yield from helps(command, below, context)


def brought_up_to_date(text: str) -> str:
    """The README with its generated part made anew."""
    pattern = re.compile(re.escape(START) + ".*?" + re.escape(END), re.DOTALL)
    assert len(pattern.findall(text)) == 1
    return pattern.sub(lambda _: f"{START}\n{commands()}\n{END}", text)


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    if sys.argv[1:] == ["--check"]:
        sys.exit(brought_up_to_date(text) != text)
    README.write_text(brought_up_to_date(text), encoding="utf-8")

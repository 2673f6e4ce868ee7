"""Writes the parts of the README that are generated: ``python -m tests.reference`` brings them up to date.

With ``--check`` it only says by its exit code whether they are. In a process of its own either way: click keeps the
help option that a command was first asked with.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import click

from embedsurgery.cli.main import VERBS, cli

README = Path(__file__).resolve().parent.parent / "README.md"
START, END = "<!-- generated: python -m tests.reference -->\n", "<!-- end of generated -->\n"


def commands() -> str:
    """Every verb's help, as the command line prints it."""
    parts = []
    context = cli.make_context("embedsurgery", ["inspect"])  # with the group's own settings, as a real call has them
    for verb in VERBS:
        command = cli.get_command(context, verb)
        assert command is not None
        text = command.get_help(
            click.Context(command, info_name=verb, parent=context, terminal_width=100, max_content_width=100)
        )
        parts.append(f"```\n{text}\n```\n")
    return "\n".join(parts)


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

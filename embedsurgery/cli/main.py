"""The group of verbs, loaded one by one, and what happens to errors: one line on standard error, exit code 1."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import warnings
from importlib import import_module
from typing import Any, TextIO

import click

from embedsurgery._version import __version__
from embedsurgery.errors import EmbedSurgeryError, EmbedSurgeryWarning

VERBS = {
    "inspect": "The embedding tables of a checkpoint: names, ties, rows, shards.",
    "show": "What an adapter holds, and whether it fits a model.",
    "merge": "Bake adapters into a checkpoint on disk, without loading it.",
    "unmerge": "Take the last merge out again, bit for bit.",
    "verify": "Check a checkpoint; exits 1 and names what disagrees.",
    "plugins": "The plugins that are installed, and what each brings.",
    "demo": "The whole path on a small real model, in under a minute.",
}
"""Verb -> its line in the list; the verb's own file is ``cli/VERB.py`` with a command called ``command``."""


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = import_module(f"embedsurgery.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="embedsurgery")
def cli() -> None:
    """Train a few rows of an embedding table, ship kilobytes, bake them into any checkpoint, take them out again."""


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 refused or failed, 2 usage, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # token texts reach terminals that know only ASCII
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _interrupt)  # as on Ctrl-C, so that what is half done is taken away
    warnings.showwarning = _show_warning
    warnings.simplefilter("always", EmbedSurgeryWarning)
    try:
        code = cli.main(args, prog_name="embedsurgery", standalone_mode=False)
    except EmbedSurgeryError as error:
        _fail(str(error))
        code = 1
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx is not None else "", err=True)
        code = 2
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort) as error:
        _fail("interrupted; nothing was left behind")
        code = 128 + next((n for n in error.args if isinstance(n, int)), signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of a pipe went away
        code = 1
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        full = "; make room there, nothing was left behind" if error.errno == errno.ENOSPC else ""
        _fail(f"{error.strerror or error}{where}{full}")
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)


def _fail(line: str) -> None:
    click.echo(f"embedsurgery: {line}", err=True)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> Any:
    if issubclass(category, EmbedSurgeryWarning):
        click.echo(f"embedsurgery: warning: {message}", err=True)

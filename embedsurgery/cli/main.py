"""The group of verbs, loaded one by one, and what happens to errors: one line on standard error, exit code 1."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import warnings
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, TextIO

import click

from embedsurgery._version import __version__
from embedsurgery.errors import EmbedSurgeryError, EmbedSurgeryWarning, PluginError, printable
from embedsurgery.plugins.entry_points import plugins_at_hand
from embedsurgery.plugins.verbs import VERBS

if TYPE_CHECKING:
    from embedsurgery.plugins.hookspecs import CommandRecord

_READER_GONE = 128 + signal.SIGPIPE


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*VERBS, *_brought()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in VERBS:
            command: click.Command = import_module(f"embedsurgery.cli.{cmd_name}").command
            return command
        record = _brought().get(cmd_name)
        return None if record is None else _loaded(record)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in VERBS and not ctx.resilient_parsing and args[0] not in _brought():
            from difflib import get_close_matches

            near = get_close_matches(args[0].lower(), [*VERBS, *_brought()], n=1)
            meant = f"; did you mean '{near[0]}'?" if near else ""
            raise click.UsageError(f"no such command '{printable(args[0])}'{meant}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([*VERBS.items(), *((name, record.summary) for name, record in _brought().items())])


def _brought() -> Mapping[str, CommandRecord]:
    """The verbs that plugins bring. Without any plugin installed nothing is imported to find that out."""
    if not plugins_at_hand():
        return {}
    from embedsurgery.plugins.current import registry

    return {name: record for name, record in registry().commands.items() if name not in VERBS}


def _loaded(record: CommandRecord) -> click.Command:
    """A plugin's verb.

    Raises:
        PluginError: The plugin fails to give it.
    """
    try:
        command = record.load()
    except Exception as error:  # whatever a third party's code raises
        raise PluginError(
            "the plugin's verb cannot be loaded", where=record.name, found=f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(command, click.Command):
        raise PluginError(
            "the plugin's verb is none", where=record.name, expected="a click.Command", found=type(command).__name__
        )
    return command


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="embedsurgery")
def cli() -> None:
    """Train a few rows of an embedding table, ship kilobytes, bake them into any checkpoint, take them out again."""


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit.

    0 done, 1 refused or failed, 2 usage, 130 interrupted, 141 where the reader of a pipe went away: as every tool that
    SIGPIPE ends, and never 0, which of ``verify`` would say that all is well.
    """
    streams = (sys.stdout, sys.stderr)
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # token texts reach terminals that know only ASCII
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _interrupt)  # as on Ctrl-C, so that what is half done is taken away
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # what it says of a second try shows signed addresses
    if sys.stderr is None or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # its bars for uploads do not look where they go
    warnings.showwarning = _show_warning
    warnings.simplefilter("always", EmbedSurgeryWarning)
    try:
        code = _run(args)
    except BrokenPipeError:  # standard error's, in the middle of saying what went wrong
        code = _READER_GONE
    sys.exit(_flush(streams) or code)


def _run(args: list[str] | None) -> int:
    """The exit code; what went wrong is said."""
    try:
        code = cli.main(args, prog_name="embedsurgery", standalone_mode=False)
    except EmbedSurgeryError as error:
        _fail(str(error))
        return 1
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx is not None else "", err=True)
        return 2
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort) as error:
        _fail("interrupted; nothing is half done")
        numbers = (*error.args, *getattr(error.__cause__, "args", ()))  # click makes an Abort of an interrupt
        return 128 + next((n for n in numbers if isinstance(n, int)), signal.SIGINT)
    except SystemExit as stop:  # click's own: after a shell's completion, or 1 where the reader of a pipe went away
        if stop.code != 1:
            raise
        return _READER_GONE
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        full = "; make room there, nothing was left behind" if error.errno == errno.ENOSPC else ""
        _fail(f"{error.strerror or error}{where}{full}")
        return 1
    return code if isinstance(code, int) else 0


def _flush(streams: tuple[TextIO | None, ...]) -> int:
    """0 where all that was printed went out; otherwise it is thrown away, of which the interpreter would complain."""
    code = 0
    for stream in filter(None, streams):  # a stream that the caller closed is none
        try:
            stream.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            code = _READER_GONE if isinstance(error, BrokenPipeError) else 1
    return code


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

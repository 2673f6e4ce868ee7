"""The command group and the entry point of the command line.

Loads each command when it is used, and turns errors into one line on standard error and an exit code.
"""

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
from embedsurgery.errors import EmbedSurgeryError, EmbedSurgeryWarning, PluginError, escape_unprintable
from embedsurgery.plugins.entry_points import may_have_plugins
from embedsurgery.plugins.verbs import VERBS

if TYPE_CHECKING:
    from embedsurgery.plugins.hookspecs import CommandRecord

_BROKEN_PIPE = 128 + signal.SIGPIPE


class _CommandGroup(click.Group):
    """Built-in commands, imported by name, and those of plugins."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*VERBS, *_plugin_commands()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in VERBS:
            command: click.Command = import_module(f"embedsurgery.cli.{cmd_name}").command
            return command
        record = _plugin_commands().get(cmd_name)
        return None if record is None else _load_command(record)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in VERBS and not ctx.resilient_parsing and args[0] not in _plugin_commands():
            from difflib import get_close_matches

            near = get_close_matches(args[0].lower(), [*VERBS, *_plugin_commands()], n=1)
            suggestion = f"; did you mean '{near[0]}'?" if near else ""
            raise click.UsageError(f"no such command '{escape_unprintable(args[0])}'{suggestion}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(
                [*VERBS.items(), *((name, record.summary) for name, record in _plugin_commands().items())]
            )


def _plugin_commands() -> Mapping[str, CommandRecord]:
    """Return the plugins' commands by name. The registry is not imported if no plugin can be installed."""
    if not may_have_plugins():
        return {}
    from embedsurgery.plugins.current import registry

    return {name: record for name, record in registry().commands.items() if name not in VERBS}


def _load_command(record: CommandRecord) -> click.Command:
    """Load a plugin's command.

    Raises:
        PluginError: The plugin raises, or returns something else.
    """
    expected = "a click.Command"
    try:
        command = record.load()
    except Exception as error:  # third-party code raises anything
        found = f"{type(error).__name__}: {error}"
        raise PluginError(
            "cannot load a plugin's command", where=record.name, expected=expected, found=found
        ) from error
    if not isinstance(command, click.Command):
        raise PluginError(
            "plugin command is not a click.Command",
            where=record.name,
            expected=expected,
            found=type(command).__name__,
        )
    return command


@click.group(cls=_CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="embedsurgery")
def cli() -> None:
    """Train a few rows of an embedding table, ship kilobytes, merge them into any checkpoint, and unmerge them."""


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit.

    Exit codes: 0 done, 1 refused or failed, 2 usage, 128 + N after signal N (130 for Ctrl-C), 141 if the reader of a
    pipe has closed it. A closed pipe is never 0: from ``verify``, 0 would mean that the checkpoint is good.
    """
    streams = (sys.stdout, sys.stderr)
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # token texts may not fit an ASCII terminal
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _raise_interrupt)  # as for Ctrl-C, so that cleanup code runs
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retry warnings print signed URLs
    if sys.stderr is None or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # its upload bars do not check for a terminal
    warnings.showwarning = _show_warning
    warnings.simplefilter("always", EmbedSurgeryWarning)
    try:
        code = _run_command(args)
    except BrokenPipeError:  # of standard error, while an error is printed
        code = _BROKEN_PIPE
    sys.exit(_flush_streams(streams) or code)


def _run_command(args: list[str] | None) -> int:
    """Run a command and print its error, if any. Returns the exit code."""
    try:
        code = cli.main(args, prog_name="embedsurgery", standalone_mode=False)
    except EmbedSurgeryError as error:
        _print_error(str(error))
        return 1
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx is not None else "", err=True)
        return 2
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort) as error:
        _print_error("interrupted; no partial change is left")
        numbers = (*error.args, *getattr(error.__cause__, "args", ()))  # click raises Abort from a KeyboardInterrupt
        return 128 + next((n for n in numbers if isinstance(n, int)), signal.SIGINT)
    except SystemExit as stop:  # click's: after shell completion, or 1 for a closed pipe
        if stop.code != 1:
            raise
        return _BROKEN_PIPE
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        hint = "; free some space, no partial output is left" if error.errno == errno.ENOSPC else ""
        _print_error(f"{error.strerror or error}{where}{hint}")
        return 1
    return code if isinstance(code, int) else 0


def _flush_streams(streams: tuple[TextIO | None, ...]) -> int:
    """Flush streams. Returns 0, or an exit code if that fails."""
    code = 0
    for stream in filter(None, streams):  # None if the caller closed it
        try:
            stream.flush()
        except OSError as error:
            # The interpreter flushes again on exit, and would print a traceback: send the rest to /dev/null.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            code = _BROKEN_PIPE if isinstance(error, BrokenPipeError) else 1
    return code


def _raise_interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)


def _print_error(line: str) -> None:
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

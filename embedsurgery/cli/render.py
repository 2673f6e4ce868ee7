"""How the verbs print: rich tables for a person, JSON for a program, progress on a terminal only.

Standard output is a program's input, so under ``--json`` it is kept for one document, whatever a library prints.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from contextvars import ContextVar
from functools import wraps
from typing import TYPE_CHECKING, Any, TextIO, TypeGuard

import click

from embedsurgery.errors import printable

if TYPE_CHECKING:
    from embedsurgery.checkpoints.report import Progress

_json_stdout: ContextVar[TextIO | None] = ContextVar("_json_stdout")
"""Where `print_json` prints while everything else that is printed goes to standard error."""


def json_option(verb: Callable[..., None]) -> Callable[..., None]:
    """The option ``--json`` of a verb, under which `print_json` alone reaches standard output."""

    @click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
    @wraps(verb)
    def run(*args: Any, as_json: bool, **options: Any) -> None:
        with stdout_for_json() if as_json else nullcontext():
            verb(*args, as_json=as_json, **options)

    return run


@contextmanager
def stdout_for_json() -> Iterator[None]:
    """Inside, what anything but `print_json` prints to standard output goes to standard error.

    Libraries that are imported on the way do print there: by ``print``, by a logger that took ``sys.stdout`` as it
    found it, from C, from a child. Hence the descriptor itself is turned over, where ``sys.stdout`` has one.
    """
    stdout: TextIO | None = sys.stdout  # none at all where the caller closed it
    with _turned_to_stderr(stdout) if _is_descriptor_1(stdout) else nullcontext(stdout) as document:
        token = _json_stdout.set(document)
        try:
            with redirect_stdout(sys.stderr):
                yield
        finally:
            _json_stdout.reset(token)


def _is_descriptor_1(stream: TextIO | None) -> TypeGuard[TextIO]:
    try:
        return stream is not None and stream.fileno() == 1
    except OSError:  # a stream in memory, as in tests
        return False


@contextmanager
def _turned_to_stderr(stdout: TextIO) -> Iterator[TextIO]:
    """Descriptor 1 goes where 2 goes; gives a stream to where 1 went."""
    stdout.flush()
    kept = fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 3)  # a child inherits 1 only as it is turned
    try:
        _turn()
        with open(kept, "w", encoding=stdout.encoding, errors=stdout.errors, closefd=False) as document:
            yield document
    finally:
        stdout.flush()
        import ctypes

        ctypes.CDLL(None).fflush(None)  # C keeps a buffer of its own
        os.dup2(kept, 1)
        os.close(kept)
        atexit.register(_turn)  # last registered, first called: before what a library says when it is unloaded


def _turn() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()
    if sys.stderr is not None:
        os.dup2(2, 1)
    else:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    stdout = _json_stdout.get(sys.stdout)
    if stdout is None:
        return
    text = json.dumps(value, indent=2, ensure_ascii=False)
    click.echo(text if _encodes(text, stdout) else json.dumps(value, indent=2), file=stdout)


def _encodes(text: str, stream: TextIO) -> bool:
    try:
        text.encode(stream.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table; columns whose values are numbers stand to the right. In a pipe it is as wide as it needs."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    listed = [list(row) for row in rows]
    table = Table(box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        numeric = bool(listed) and all(isinstance(row[number], int) for row in listed)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in listed:
        table.add_row(*(Text(_cell(value)) for value in row))
    width = None if sys.stdout.isatty() else 200
    console = Console(width=width, highlight=False, soft_wrap=False)
    with console.capture() as drawn:  # rich itself would end the process where the reader of a pipe went away
        console.print(Text(printable(title), style="bold"), table)
    click.echo(drawn.get(), nl=False, color=True)  # in the colours that rich found fit


def _cell(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "\n".join(printable(line) for line in str(value).split("\n"))


def size(count: int) -> str:
    """A number of bytes for a person, in powers of 1000."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


@contextmanager
def copying(label: str) -> Iterator[Progress | None]:
    """Progress for long copies: a bar on a terminal, nothing in a pipe.

    It is drawn from the first copy on: before, the bars of a download may be there.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    parts = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Bar(*parts, console=Console(stderr=True), transient=True)

    def update(done: int, total: int) -> None:
        if not bar.tasks:
            bar.add_task(label, total=None)
            bar.start()
        bar.update(bar.tasks[0].id, completed=done, total=total)

    try:
        yield update
    finally:
        if bar.tasks:
            bar.stop()

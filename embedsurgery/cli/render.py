"""Print results: rich tables for a person, JSON for a program, progress bars on a terminal only.

Programs read standard output, so with ``--json`` it gets exactly one document, whatever a library prints.
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

from embedsurgery.errors import escape_unprintable

if TYPE_CHECKING:
    from embedsurgery.checkpoints.report import Progress

_json_stdout: ContextVar[TextIO | None] = ContextVar("_json_stdout")
"""The stream of `print_json` while all other output goes to standard error; None if standard output is closed."""


def json_option(command: Callable[..., None]) -> Callable[..., None]:
    """Add the option ``--json``, with which only `print_json` writes to standard output."""

    @click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
    @wraps(command)
    def run(*args: Any, as_json: bool, **options: Any) -> None:
        with reserve_stdout() if as_json else nullcontext():
            command(*args, as_json=as_json, **options)

    return run


@contextmanager
def reserve_stdout() -> Iterator[None]:
    """Redirect standard output to standard error, except for `print_json`.

    Imported libraries do print there: with ``print``, with a logger that has stored ``sys.stdout``, from C, from a
    child process. Replacing ``sys.stdout`` covers only the first, so descriptor 1 itself is redirected, if
    ``sys.stdout`` writes to it.
    """
    stdout: TextIO | None = sys.stdout  # None if the caller closed it
    with _redirect_descriptor_1(stdout) if _is_descriptor_1(stdout) else nullcontext(stdout) as document:
        token = _json_stdout.set(document)
        try:
            with redirect_stdout(sys.stderr):
                yield
        finally:
            _json_stdout.reset(token)


def _is_descriptor_1(stream: TextIO | None) -> TypeGuard[TextIO]:
    try:
        return stream is not None and stream.fileno() == 1
    except OSError:  # an in-memory stream, as in tests
        return False


@contextmanager
def _redirect_descriptor_1(stdout: TextIO) -> Iterator[TextIO]:
    """Redirect descriptor 1 to standard error. Yields a stream to its original target."""
    stdout.flush()
    original = fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 3)  # close on exec: a child process must not write to it
    try:
        _point_descriptor_1_at_stderr()
        with open(original, "w", encoding=stdout.encoding, errors=stdout.errors, closefd=False) as document:
            yield document
    finally:
        stdout.flush()
        import ctypes

        ctypes.CDLL(None).fflush(None)  # C code has a buffer of its own
        os.dup2(original, 1)
        os.close(original)
        # A library may print in an atexit handler. This handler is registered after it, so it runs before it.
        atexit.register(_point_descriptor_1_at_stderr)


def _point_descriptor_1_at_stderr() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()
    if sys.stderr is not None:
        os.dup2(2, 1)
    else:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 1)


def print_json(value: Any) -> None:
    """Print one JSON document on standard output; escape non-ASCII characters if the stream cannot encode them."""
    stdout = _json_stdout.get(sys.stdout)
    if stdout is None:
        return
    text = json.dumps(value, indent=2, ensure_ascii=False)
    click.echo(text if _can_encode(text, stdout) else json.dumps(value, indent=2), file=stdout)


def _can_encode(text: str, stream: TextIO) -> bool:
    try:
        text.encode(stream.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table. Columns of integers are right-aligned. In a pipe the table is 200 characters wide at most."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [list(row) for row in rows]
    table = Table(box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        numeric = bool(cells) and all(isinstance(row[number], int) for row in cells)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        table.add_row(*(Text(_format_cell(value)) for value in row))
    width = None if sys.stdout.isatty() else 200
    console = Console(width=width, highlight=False, soft_wrap=False)
    with console.capture() as drawn:  # printing to a closed pipe, rich would exit with 1; main.py exits with 141
        console.print(Text(escape_unprintable(title), style="bold"), table)
    click.echo(drawn.get(), nl=False, color=True)  # rich has chosen the colours


def _format_cell(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "\n".join(escape_unprintable(line) for line in str(value).split("\n"))


def format_size(count: int) -> str:
    """Format a number of bytes in powers of 1000: "1.5 MB"."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


@contextmanager
def show_progress(label: str) -> Iterator[Progress | None]:
    """Show the progress of a long copy: a bar on a terminal, nothing in a pipe.

    The bar appears with the first update, so that it does not overlap the bars of a download before it.
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

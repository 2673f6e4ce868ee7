"""The options that say where a changed checkpoint goes, the same for every verb that changes one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

_F = TypeVar("_F", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "-o", "--output", type=click.Path(path_type=Path), help="The new checkpoint directory; --dry-run needs none."
    ),
    click.option("--in-place", is_flag=True, help="Change the checkpoint itself; a journal undoes what fails."),
    click.option("--hardlink", is_flag=True, help="With -o: share the weight files that do not change."),
    click.option("--dry-run", is_flag=True, help="Check everything, say what would be done, write nothing."),
)


def place_options(command: _F) -> _F:
    """``-o``, ``--in-place``, ``--hardlink`` and ``--dry-run``, which `placed` takes."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def placed(*, output: Path | None, in_place: bool, hardlink: bool, dry_run: bool) -> dict[str, Any]:
    """The options as the functions of ``embedsurgery.checkpoints`` take them.

    Raises:
        click.UsageError: Something is to be written, and nobody said where, or two places are named.
    """
    if in_place and (output is not None or hardlink):
        raise click.UsageError("--in-place goes with neither -o / --output nor --hardlink")
    if output is None and not dry_run and not in_place:
        raise click.UsageError("missing option '-o' / '--output' or '--in-place', which only --dry-run does without")
    return {"output": output, "in_place": in_place, "hardlink": hardlink, "dry_run": dry_run}

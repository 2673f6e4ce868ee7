"""The options of ``embedsurgery merge`` that say how adapters are combined."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import click


def combine_options(verb: Callable[..., None]) -> Callable[..., None]:
    """``--weight``, ``--on-conflict`` and ``--allow-nan``, as ``weights``, ``on_conflict`` and ``allow_nan``."""
    options = (
        click.option(
            "--weight",
            "weights",
            multiple=True,
            metavar="ADAPTER=NUMBER",
            help="How far the rows of an adapter go from BASE's, 1 by default; once for each adapter. Rows of "
            "tokens that are new to BASE are taken as they are.",
        ),
        click.option(
            "--on-conflict",
            type=click.Choice(["last", "average"]),
            help="What becomes of rows that several adapters set: those of the last, or the mean of what each "
            "alone would make of them. Refused by default.",
        ),
        click.option("--allow-nan", is_flag=True, help="Merge rows with NaN or infinity, which are refused otherwise."),
    )
    for option in reversed(options):
        verb = option(verb)
    return verb


def weighted(adapters: Sequence[Path], weights: Sequence[str]) -> list[tuple[Path, float]]:
    """The adapters with their weights; one is named as on the command line, or by its last part.

    Raises:
        click.BadParameter: A weight is no number, or its name is that of no adapter or of several.
    """
    found = dict.fromkeys(range(len(adapters)), 1.0)
    given: set[int] = set()
    for weight in weights:
        name, equals, text = weight.rpartition("=")
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not equals or not math.isfinite(number):
            raise click.BadParameter(f"{weight!r} is not ADAPTER=NUMBER", param_hint="'--weight'")
        fits = [n for n, adapter in enumerate(adapters) if str(adapter) == name or adapter == Path(name)]
        fits = fits or [n for n, adapter in enumerate(adapters) if adapter.name == name]
        if len(fits) != 1 or fits[0] in given:
            what = "is given twice" if fits and fits[0] in given else "is no ADAPTER of this merge"
            what = what if len(fits) < 2 else "is more than one ADAPTER of this merge"
            raise click.BadParameter(f"{name!r} {what}", param_hint="'--weight'")
        given.add(fits[0])
        found[fits[0]] = number
    return [(adapter, found[n]) for n, adapter in enumerate(adapters)]

"""``embedsurgery tokens``: new tokens for a checkpoint, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from embedsurgery.cli.merge import print_report
from embedsurgery.cli.options import hub_token_option
from embedsurgery.cli.placing import place_options, placed
from embedsurgery.cli.render import copying, json_option

_INIT = "How rows start: mean, normal, random, zeros, subtokens, description:TEXT, copy:TOKEN, or a plugin's."


@click.group("tokens")
def command() -> None:
    """New tokens for a checkpoint."""


@command.command("add")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--token", "tokens", multiple=True, required=True, metavar="TEXT", help="A new token; repeatable.")
@click.option("--init", default="mean", show_default=True, metavar="INIT", help=_INIT)
@click.option("--special", is_flag=True, help="They are special tokens: never split, skipped in decoding.")
@click.option("--reserved", is_flag=True, help="Take the ids of reserved tokens, such as [unused7], first.")
@click.option("--multiple", type=click.IntRange(min=1), metavar="N", help="Where tables grow, grow to a multiple of N.")
@click.option("--seed", type=int, default=0, show_default=True, help="For initialisers that draw.")
@place_options
@hub_token_option
@json_option
def add(
    model: Path,
    tokens: tuple[str, ...],
    init: str,
    special: bool,
    reserved: bool,
    multiple: int | None,
    seed: int,
    as_json: bool,
    **where: Any,
) -> None:
    """Write the checkpoint MODEL, a directory or a Hub id, with tokens added to its tokenizer, and rows for them.

    Spare rows are used first; else every table of the vocabulary grows. `embedsurgery unmerge` takes them out again.
    """
    place = placed(**where)
    from embedsurgery.checkpoints.adding import add_tokens_checkpoint

    with copying("copying") as progress:
        report = add_tokens_checkpoint(
            model,
            tokens,
            init=init,
            special=special,
            reserved=reserved,
            pad_to_multiple_of=multiple,
            seed=seed,
            progress=progress,
            **place,
        )
    print_report(report, "added", as_json)

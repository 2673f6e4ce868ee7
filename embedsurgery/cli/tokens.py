"""``embedsurgery tokens``: add tokens to a checkpoint, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from embedsurgery.cli.options import check_output_options, hub_token_option, output_options
from embedsurgery.cli.render import json_option, show_progress
from embedsurgery.cli.reports import print_merge_report

_INIT = "Initialiser: mean, normal, random, zeros, subtokens, description:TEXT, copy:TOKEN, or a plugin's."


@click.group("tokens")
def command() -> None:
    """Add tokens to a checkpoint."""


@command.command("add")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--token", "tokens", multiple=True, required=True, metavar="TEXT", help="Text of a new token; repeatable."
)
@click.option("--init", default="mean", show_default=True, metavar="INIT", help=_INIT)
@click.option("--special", is_flag=True, help="Add special tokens: never split, skipped in decoding.")
@click.option("--reserved", is_flag=True, help="First use the ids of reserved tokens, such as [unused7].")
@click.option("--multiple", type=click.IntRange(min=1), metavar="N", help="Grow tables to a multiple of N rows.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of random initialisers.")
@output_options
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
    """Add tokens to the checkpoint MODEL, a directory or a Hub id.

    The tokenizer gets the tokens, and the tables a row for each. Spare rows are used first; if there are too few, every
    table of the vocabulary grows. `embedsurgery unmerge` removes the tokens again.
    """
    where = check_output_options(**where)
    from embedsurgery.checkpoints.adding import add_tokens_checkpoint

    with show_progress("copying") as progress:
        report = add_tokens_checkpoint(
            model,
            tokens,
            init=init,
            special=special,
            reserved=reserved,
            pad_to_multiple_of=multiple,
            seed=seed,
            progress=progress,
            **where,
        )
    print_merge_report(report, "added", as_json)

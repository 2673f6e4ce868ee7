"""``embedsurgery merge``: merge adapters into a checkpoint on disk, or on the Hub with ``--push``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from embedsurgery.cli.merge_options import bake_options, combine_options, parse_weights, take_bake_configs
from embedsurgery.cli.options import check_output_options, output_options, push_options
from embedsurgery.cli.render import json_option, show_progress
from embedsurgery.cli.reports import print_merge_report, print_push_report

if TYPE_CHECKING:
    from embedsurgery.combining.several import Conflict


@click.command("merge")
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("adapters", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="ADAPTER...")
@output_options
@combine_options
@click.option("--hash", "hashes", is_flag=True, help="Record the sha256 of every output file, for verify --full.")
@click.option("--push", "repo", metavar="REPO", help="Push the result to org/name on the Hub. BASE must be a Hub id.")
@bake_options
@push_options
@json_option
def command(
    base: Path,
    adapters: tuple[Path, ...],
    output: Path | None,
    in_place: bool,
    hardlink: bool,
    weights: tuple[str, ...],
    on_conflict: Conflict | None,
    allow_nan: bool,
    hashes: bool,
    dry_run: bool,
    repo: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Merge each ADAPTER into the checkpoint BASE.

    Several adapters are merged in one pass, with one record for each. The model is not loaded: the kernel copies the
    files, and only the changed rows are written. The original rows are kept in the output's .embedsurgery directory,
    so that `embedsurgery unmerge` restores BASE bit for bit.

    With --in-place, the rows are written into BASE itself, under a lock (a second merge at the same time is refused)
    and with a journal: `embedsurgery recover` rolls back a merge that was killed.

    A soft prompt becomes tokens with rows of their own. The tokenizer adds them before every text, so that any engine
    can serve the prompted model. With several prompts, a request selects one by writing the texts of its tokens.

    BASE and ADAPTER are directories or Hub ids (org/name or org/name@revision). With --push, only headers, small files
    and the shards with changed tables are transferred; the Hub copies the other shards.
    """
    weighted_adapters = parse_weights(adapters, weights)
    how: dict[str, Any] = {"bake": take_bake_configs(options), "on_conflict": on_conflict, "allow_nan": allow_nan}
    if repo is not None:
        if output is not None or in_place or hardlink or dry_run or hashes:
            raise click.UsageError("--push cannot be combined with -o, --in-place, --hardlink, --dry-run or --hash")
        from embedsurgery import hub

        hub.check_installed()
        from embedsurgery.checkpoints.hub_merging import push_merged

        print_push_report(push_merged(str(base), weighted_adapters, repo, **how, **options), as_json)
        return
    from embedsurgery.checkpoints.merging import merge_checkpoint

    where = check_output_options(output=output, in_place=in_place, hardlink=hardlink, dry_run=dry_run)
    with show_progress("copying") as progress:
        report = merge_checkpoint(base, weighted_adapters, hashes=hashes, progress=progress, **how, **where)
    print_merge_report(report, "merged", as_json)

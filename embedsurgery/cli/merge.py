"""``embedsurgery merge``: adapters baked into a checkpoint on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from embedsurgery.cli.combining import combine_options, weighted
from embedsurgery.cli.options import push_options
from embedsurgery.cli.placing import place_options, placed
from embedsurgery.cli.render import copying, json_option, print_json, size

if TYPE_CHECKING:
    from embedsurgery.checkpoints.report import MergeReport
    from embedsurgery.combining.several import Conflict
    from embedsurgery.surgeries.soft_prompt.bake_config import BakeConfig

PREFIX_PLACES = ("all", "text", "chat", "none")

hash_option = click.option(
    "--hash", "hashes", is_flag=True, help="Record the sha256 of every file of the result, for verify --full."
)


_BAKING = (
    click.option(
        "--prompt-name",
        "names",
        multiple=True,
        metavar="NAME",
        help="Names the tokens of a soft prompt, <|soft:NAME:0|>; once for each ADAPTER, in their order.  "
        "[default: the directory's name]",
    ),
    click.option(
        "--prefix",
        type=click.Choice(PREFIX_PLACES),
        default=None,
        help="Where the tokenizer puts a soft prompt by itself: before every text, into the chat templates, "
        "both, or nowhere.  [default: all for one prompt, none for several]",
    ),
    click.option("--after-bos", is_flag=True, help="Put it behind the BOS, not before, where it was trained."),
    click.option(
        "--keep-tie",
        is_flag=True,
        help="Write no head of its own for a tied model: then only the generation config keeps the model from "
        "generating virtual tokens.",
    ),
)


def bake_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options that say how soft prompts become tokens."""
    for option in reversed(_BAKING):
        function = option(function)
    return function


def bake_configs(options: dict[str, Any]) -> BakeConfig | list[BakeConfig] | None:
    """What `bake_options` were given, taken out of all options; None where none was."""
    names, prefix, after_bos = options.pop("names"), options.pop("prefix"), options.pop("after_bos")
    tied = "keep" if options.pop("keep_tie") else "untie"
    if not (names or prefix or after_bos or tied == "keep"):
        return None
    from embedsurgery.surgeries.soft_prompt.bake_config import BakeConfig

    configs = [BakeConfig(name, prefix, after_bos, tied) for name in names or (None,)]  # type: ignore[arg-type]
    return configs if names else configs[0]


@click.command("merge")
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("adapters", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="ADAPTER...")
@place_options
@combine_options
@hash_option
@click.option("--push", "repo", metavar="REPO", help="Push the result to org/name on the Hub; BASE is an id, too.")
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
    """Write the checkpoint BASE with each ADAPTER baked in.

    Several adapters go in one pass, each with a record of its own. The model is not loaded: files are copied by the
    kernel, and only the rows are written. What was there before is kept in the output's .embedsurgery directory, so
    that `embedsurgery unmerge` gives BASE back bit for bit.

    With --in-place the rows are written into BASE itself, under a lock (a second merge meanwhile is refused) and with a
    journal: what a kill leaves half done, `embedsurgery recover` takes back.

    A soft prompt becomes tokens with rows of their own, which the tokenizer puts before every text, so that any engine
    serves the prompted model; several prompts are chosen by a request that writes the texts of their tokens.

    BASE and ADAPTER are directories or Hub ids, org/name or org/name@revision. With --push only shards with a touched
    table, small files and headers travel; the Hub copies the other shards by itself.
    """
    asked = weighted(adapters, weights)
    bake = bake_configs(options)
    if repo is not None:
        if output is not None or in_place or hardlink or dry_run or hashes:
            raise click.UsageError("--push goes with none of -o, --in-place, --hardlink, --dry-run and --hash")
        from embedsurgery import hub
        from embedsurgery.cli.push import print_push

        hub.check_installed()
        from embedsurgery.checkpoints.hub_merging import push_merged

        pushed = push_merged(str(base), asked, repo, bake=bake, on_conflict=on_conflict, allow_nan=allow_nan, **options)
        print_push(pushed, as_json)
        return
    from embedsurgery.checkpoints.merging import merge_checkpoint

    where = placed(output=output, in_place=in_place, hardlink=hardlink, dry_run=dry_run)
    with copying("copying") as progress:
        report = merge_checkpoint(
            base,
            asked,
            bake=bake,
            on_conflict=on_conflict,
            allow_nan=allow_nan,
            hashes=hashes,
            progress=progress,
            **where,
        )
    print_report(report, "merged", as_json)


def print_report(report: MergeReport, verb: str, as_json: bool) -> None:
    """What a merge or unmerge did."""
    if as_json:
        print_json(asdict(report))
        return
    from embedsurgery.plan.edit import count_rows
    from embedsurgery.plan.tokens import listed_tokens

    would = "" if report.done else "would be "
    rows = ", ".join(f"{count_rows(count)} of {table}" for table, count in report.rows.items())
    tokens = listed_tokens(list(report.tokens.items()))
    what = "; ".join(part for part in (f"tokens {tokens}" if tokens else "", rows) if part)
    click.echo(f"{would}{verb}{': ' * bool(what)}{what} in {', '.join(report.files)}")
    said = all(line.startswith("set ") for line in report.edits)  # by the number of rows
    for line in () if report.done and said else report.edits:
        click.echo(f"  {line}")
    if report.undo and not report.done:
        click.echo(f"would be kept to take it out again: {size(report.undo)}")
    how = "in place" if report.in_place else size(report.copied)
    click.echo(f"{would}written: {report.output or 'no output was named'} ({how})")

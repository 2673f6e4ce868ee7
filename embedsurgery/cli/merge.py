"""``embedsurgery merge``: adapters baked into a checkpoint on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from embedsurgery.cli.options import push_options
from embedsurgery.cli.push import print_push
from embedsurgery.cli.render import copying, json_option, print_json, size

if TYPE_CHECKING:
    from embedsurgery.offline import MergeReport
    from embedsurgery.surgeries.soft_prompt_bake_config import BakeConfig

FRONTS = ("all", "text", "chat", "none")

output_option = click.option("-o", "--output", type=click.Path(path_type=Path),
                             help="The new checkpoint directory; --dry-run needs none.")  # fmt: skip


_BAKING = (
    click.option("--prompt-name", "names", multiple=True, metavar="NAME",
                 help="Names the tokens of a soft prompt, <|soft:NAME:0|>; once for each ADAPTER, in their order.  "
                      "[default: the directory's name]"),
    click.option("--front", type=click.Choice(FRONTS), default=None,
                 help="Where the tokenizer puts a soft prompt by itself: before every text, into the chat templates, "
                      "both, or nowhere.  [default: all for one prompt, none for several]"),
    click.option("--after-bos", is_flag=True, help="Put it behind the BOS, not before, where it was trained."),
    click.option("--keep-tie", is_flag=True,
                 help="Write no head of its own for a tied model: then only the generation config keeps the model from "
                      "generating virtual tokens."),
)  # fmt: skip


def bake_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options that say how soft prompts become tokens."""
    for option in reversed(_BAKING):
        function = option(function)
    return function


def bake_configs(options: dict[str, Any]) -> BakeConfig | list[BakeConfig]:
    """What `bake_options` were given, taken out of all options."""
    from embedsurgery.surgeries.soft_prompt_bake_config import BakeConfig

    names, front, after_bos = options.pop("names"), options.pop("front"), options.pop("after_bos")
    tied = "keep" if options.pop("keep_tie") else "untie"
    configs = [BakeConfig(name, front, after_bos, tied) for name in names or (None,)]  # type: ignore[arg-type]
    return configs if names else configs[0]


@click.command("merge")
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("adapters", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="ADAPTER...")
@output_option
@click.option("--dry-run", is_flag=True, help="Check everything, say what would be done, write nothing.")
@click.option("--push", "repo", metavar="REPO", help="Push the result to org/name on the Hub; BASE is an id, too.")
@bake_options
@push_options
@json_option
def command(
    base: Path,
    adapters: tuple[Path, ...],
    output: Path | None,
    dry_run: bool,
    repo: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Write the checkpoint BASE with each ADAPTER baked in.

    The model is not loaded: files are copied by the kernel, and only the rows are written. What was there before is
    kept in the output's .embedsurgery directory, so that `embedsurgery unmerge` gives BASE back bit for bit.

    A soft prompt becomes tokens with rows of their own, which the tokenizer puts before every text, so that any engine
    serves the prompted model; several prompts are chosen by a request that writes the texts of their tokens.

    BASE and ADAPTER are directories or Hub ids, org/name or org/name@revision. With --push only shards with a touched
    table, small files and headers travel; the Hub copies the other shards by itself.
    """
    bake = bake_configs(options)
    if repo is not None:
        if output is not None or dry_run:
            raise click.UsageError("--push goes with neither -o / --output nor --dry-run")
        from embedsurgery import hub

        print_push(hub.push_merged(str(base), adapters, repo, bake=bake, **options), as_json)
        return
    from embedsurgery.offline import merge_checkpoint

    with copying("copying") as progress:
        to = place(output, dry_run)
        report = merge_checkpoint(base, adapters, to, bake=bake, dry_run=dry_run, progress=progress)
    print_report(report, "merged", as_json)


def place(output: Path | None, dry_run: bool) -> Path | None:
    """Where the checkpoint is to be written; a dry run needs no place.

    Raises:
        click.UsageError: Something is to be written, and nobody said where.
    """
    if output is None and not dry_run:
        raise click.UsageError("missing option '-o' / '--output', which only --dry-run does without")
    return output


def print_report(report: MergeReport, verb: str, as_json: bool) -> None:
    """What a merge or unmerge did."""
    if as_json:
        print_json(asdict(report))
        return
    from embedsurgery.plan import count_rows, listed_tokens

    would = "" if report.done else "would be "
    rows = ", ".join(f"{count_rows(count)} of {table}" for table, count in report.rows.items())
    tokens = listed_tokens(list(report.tokens.items()))
    what = "; ".join(part for part in (f"tokens {tokens}" if tokens else "", rows) if part)
    click.echo(f"{would}{verb}: {what} in {', '.join(report.files)}")
    for line in () if report.done else report.edits:
        click.echo(f"  {line}")
    if report.undo and not report.done:
        click.echo(f"would be kept to take it out again: {size(report.undo)}")
    click.echo(f"{would}written: {report.output or 'no output was named'} ({size(report.copied)})")

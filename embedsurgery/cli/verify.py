"""``embedsurgery verify``: check a checkpoint, and list what disagrees."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from embedsurgery.cli.options import token_option
from embedsurgery.cli.render import json_option, print_json, print_table


@click.command("verify")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--full", is_flag=True, help="Also read every byte, and compare each file's sha256 with the recorded one."
)
@token_option
@json_option
def command(model: Path, full: bool, as_json: bool) -> None:
    """Check the checkpoint MODEL: index against shards, config against rows, ties, tokenizer, recorded merges.

    With --full, compare each file's sha256 with the one that `merge --hash` recorded or, for files that no merge
    changed, with the one that the Hub gave at download. Files without a recorded hash are listed.

    Exits with 1 if anything disagrees. MODEL is a directory or a Hub id. For a Hub id, only headers, small files and
    the rows of recorded merges are fetched, by range requests; with --full, everything.
    """
    from embedsurgery.checkpoints.verifying import verify_checkpoint

    checks = verify_checkpoint(model, full=full)
    good = all(check.ok for check in checks)
    if as_json:
        print_json({"model": str(model), "ok": good, "checks": [asdict(check) for check in checks]})
    else:
        rows = [("ok" if check.ok else "FAILED", check.name, check.detail) for check in checks]
        print_table(str(model), ("", "check", "detail"), rows)
    if not good:
        failed = "; ".join(f"{check.name}: {check.detail}" for check in checks if not check.ok)
        click.echo(f"embedsurgery: {failed}", err=True)
        raise click.exceptions.Exit(1)

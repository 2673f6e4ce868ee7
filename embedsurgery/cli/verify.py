"""``embedsurgery verify``: checks a checkpoint and names what disagrees."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from embedsurgery.cli.options import token_option
from embedsurgery.cli.render import json_option, print_json, print_table


@click.command("verify")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--full", is_flag=True, help="Also read every byte and compare each file's hash with what was recorded.")
@token_option
@json_option
def command(model: Path, full: bool, as_json: bool) -> None:
    """Check the checkpoint MODEL: index against shards, config against rows, ties, tokenizer, recorded merges.

    With --full, each file's sha256 is compared with what `merge --hash` recorded or, for files that no merge has
    touched, with what the Hub said when they were downloaded; files of which neither is known are named.

    Exits 1 where something disagrees. MODEL is a directory or a Hub id, of which headers, small files and the rows of
    recorded merges come, by range requests; with --full, all of it.
    """
    from embedsurgery.checkpoints.verifying import verify_checkpoint

    checks = verify_checkpoint(model, full=full)
    good = all(check.ok for check in checks)
    if as_json:
        print_json({"model": str(model), "ok": good, "checks": [asdict(check) for check in checks]})
    else:
        print_table(str(model), ("", "check", "seen"), [("ok" if c.ok else "NO", c.name, c.detail) for c in checks])
    if not good:
        wrong = "; ".join(f"{check.name}: {check.detail}" for check in checks if not check.ok)
        click.echo(f"embedsurgery: {wrong}", err=True)
        raise click.exceptions.Exit(1)

"""``embedsurgery push``: push an adapter to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from embedsurgery.cli.options import push_options
from embedsurgery.cli.render import json_option
from embedsurgery.cli.reports import print_push_report


@click.command("push")
@click.argument("adapter", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("repo", metavar="REPO")
@push_options
@json_option
def command(adapter: Path, repo: str, as_json: bool, **options: Any) -> None:
    """Push the directory ADAPTER to REPO (org/name) on the Hugging Face Hub.

    Config, weights and model card are pushed in one commit, whose parent is the commit that was read. A missing
    repository is created, private unless --public. Unchanged files are not pushed again. In an existing README, only
    the part between embedsurgery's marks is rewritten.
    """
    from embedsurgery import hub

    print_push_report(hub.push(adapter, repo, **options), as_json)

"""``embedsurgery pull``: download an adapter from the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

import click

from embedsurgery.cli.options import token_option
from embedsurgery.cli.render import format_size, json_option, print_json


@click.command("pull")
@click.argument("repo", metavar="REPO")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="New adapter directory.")
@click.option("--revision", metavar="REVISION", help="Branch, tag, commit or refs/pr/N; or write REPO@REVISION.")
@token_option
@json_option
def command(repo: str, output: Path, revision: str | None, as_json: bool) -> None:
    """Download the adapter REPO (org/name or org/name@revision) from the Hugging Face Hub.

    The revision is resolved once, and only adapter_config.json and adapter_model.safetensors of that commit are
    downloaded. Shapes and dtypes are checked before the weights are fetched. Works offline from the Hub cache.
    """
    from embedsurgery import hub

    adapter = hub.pull(repo, revision=revision, output=output)
    manifest = adapter.manifest
    written = sum(path.stat().st_size for path in output.iterdir() if path.is_file())
    if as_json:
        facts = {
            "source": adapter.source,
            "output": str(output),
            "surgery": manifest.surgery,
            "base_model": manifest.base_model,
            "bytes": written,
        }
        print_json(facts)
        return
    click.echo(f"pulled: {adapter.source}, {manifest.surgery}, base {manifest.base_model or 'not recorded'}")
    click.echo(f"written: {output} ({format_size(written)})")

"""``embedsurgery pull``: an adapter from the Hugging Face Hub as a directory."""

from __future__ import annotations

from pathlib import Path

import click

from embedsurgery.cli.options import token_option
from embedsurgery.cli.render import json_option, print_json, size


@click.command("pull")
@click.argument("repo", metavar="REPO")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The adapter's new directory.")
@click.option("--revision", metavar="REVISION", help="A branch, a tag, a commit or refs/pr/N; or write REPO@REVISION.")
@token_option
@json_option
def command(repo: str, output: Path, revision: str | None, as_json: bool) -> None:
    """Get the adapter REPO, org/name or org/name@revision, from the Hugging Face Hub.

    The revision is resolved once, and only adapter_config.json and adapter_model.safetensors are taken, from that
    commit. Shapes and dtypes are checked before the weights come. It works offline from the Hub cache.
    """
    from embedsurgery import hub

    adapter = hub.pull(repo, revision=revision, output=output)
    written = sum(path.stat().st_size for path in output.iterdir() if path.is_file())
    if as_json:
        print_json(
            {
                "source": adapter.source,
                "output": str(output),
                "surgery": adapter.manifest.surgery,
                "base_model": adapter.manifest.base_model,
                "bytes": written,
            }
        )
        return
    click.echo(
        f"pulled: {adapter.source}, {adapter.manifest.surgery}, base {adapter.manifest.base_model or 'not named'}"
    )
    click.echo(f"written: {output} ({size(written)})")

"""``embedsurgery textual-inversion``: learned embeddings baked into a pipeline's directory."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click


@click.command("textual-inversion")
@click.argument("pipeline", type=click.Path(path_type=Path))
@click.argument("embeddings", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="FILE...")
@click.option("--token", metavar="TEXT", help="What stands for the one embedding in prompts.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The new pipeline directory.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def command(pipeline: Path, embeddings: tuple[Path, ...], token: str | None, output: Path, as_json: bool) -> None:
    """Write the diffusion pipeline PIPELINE with the learned embeddings of each FILE in its text encoders.

    Several vectors become several tokens, NAME, NAME_1 and so on, which diffusers puts into prompts by itself.
    """
    from embedsurgery_textual_inversion.pipeline import bake

    baked = bake(pipeline, embeddings, output, token=token)
    if as_json:
        click.echo(json.dumps(asdict(baked), indent=2, ensure_ascii=False))
        return
    for encoder, tokens in baked.tokens.items():
        click.echo(f"baked into {encoder}: " + ", ".join(f"{name} as {index}" for name, index in tokens.items()))
    click.echo(f"written: {baked.output}")

"""``embedsurgery textual-inversion``: bakes learned embeddings into a pipeline's directory."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click


@click.command("textual-inversion")
@click.argument("pipeline", type=click.Path(path_type=Path))
@click.argument("embeddings", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="FILE...")
@click.option("--token", metavar="TEXT", help="The token of the one embedding, for prompts.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The new pipeline directory.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def command(pipeline: Path, embeddings: tuple[Path, ...], token: str | None, output: Path, as_json: bool) -> None:
    """Copy the diffusion pipeline PIPELINE, and add the learned embeddings of each FILE to its text encoders.

    Several vectors become several tokens, NAME, NAME_1 and so on, which diffusers puts into prompts automatically.
    """
    from embedsurgery_textual_inversion.pipeline import bake

    report = bake(pipeline, embeddings, output, token=token)
    if as_json:
        click.echo(json.dumps(asdict(report), indent=2, ensure_ascii=False))
        return
    for encoder, tokens in report.tokens.items():
        click.echo(f"baked into {encoder}: " + ", ".join(f"{name} as {index}" for name, index in tokens.items()))
    click.echo(f"written: {report.output}")

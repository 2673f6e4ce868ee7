"""``embedsurgery distill``: new tokens whose rows are learned from texts, as an adapter."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import click


@click.command("distill")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--token", "tokens", multiple=True, required=True, metavar="TEXT", help="A new token; repeatable.")
@click.option(
    "--texts",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    required=True,
    help="Texts that contain the tokens, one a line, in UTF-8.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The adapter's new directory.")
@click.option("--epochs", type=click.IntRange(min=1), default=20, show_default=True, help="How often a text is seen.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Texts a step.")
@click.option("--learning-rate", type=float, default=0.2, show_default=True, help="In units of the rows' own scale.")
@click.option("--layer", type=int, default=-1, show_default=True, help="Which hidden states are compared.")
@click.option("--held-out", type=float, default=0.25, show_default=True, help="Part of the texts that only measures.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the order of texts, and of what is held out.")
@click.option("--device", default="cpu", show_default=True, help="Where the model runs, such as cuda.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def command(
    model: Path,
    tokens: tuple[str, ...],
    texts: Path,
    output: Path,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    layer: int,
    held_out: float,
    seed: int,
    device: str,
    as_json: bool,
) -> None:
    """Learn the rows of new tokens of MODEL from texts, and write them as an adapter.

    Each row is trained until the model's hidden states with the one new token are those with its old sub-tokens (Token
    Distillation, https://arxiv.org/abs/2505.20133). MODEL is not changed: `embedsurgery merge` bakes the adapter in.
    """
    from embedsurgery.errors import ConfigError, OutputExistsError
    from embedsurgery_distill.initializer import read_texts
    from embedsurgery_distill.loading import load
    from embedsurgery_distill.method import distill

    if output.exists():
        raise OutputExistsError("the output exists", where=output, hint="name a new directory")
    lines = read_texts(texts)
    watched = sys.stderr.isatty()
    loaded, tokenizer = load(model, progress=watched)
    try:
        loaded.to(device)
    except (RuntimeError, AssertionError) as error:  # torch's words for a device that is not there
        line = str(error).partition("\n")[0]
        raise ConfigError("the model cannot run there", where=f"--device {device}", found=line) from error
    bar = click.progressbar(length=1000, label="distilling", file=sys.stderr)

    def progress(done: int, total: int) -> None:
        bar.update(done * 1000 // total - bar.pos)

    with bar if watched else nullcontext():
        adapter, report = distill(
            loaded,
            tokenizer,
            tokens,
            lines,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            layer=layer,
            held_out=held_out,
            seed=seed,
            progress=progress if watched else None,
        )
    adapter.save(output)
    if as_json:
        click.echo(json.dumps({**asdict(report), "output": str(output)}, indent=2))
        return
    click.echo(f"distilled: {', '.join(tokens)} from {report.texts} texts in {report.steps} steps, seed {report.seed}")
    click.echo(f"on {report.held_out} held-out texts, against the same texts in sub-tokens:")
    click.echo("                      similarity   squared error")
    click.echo(f"  mean of sub-tokens  {report.similarity_before:10.4f}   {report.loss_before:13.5g}")
    click.echo(f"  distilled           {report.similarity_after:10.4f}   {report.loss_after:13.5g}")
    click.echo(f"written: {output}")

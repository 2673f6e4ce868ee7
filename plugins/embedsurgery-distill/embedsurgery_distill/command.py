"""``embedsurgery distill``: learns the rows of new tokens from texts, and writes them as an adapter."""

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
    help="A UTF-8 file of texts that contain the tokens, one per line.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The adapter's new directory.")
@click.option("--epochs", type=click.IntRange(min=1), default=20, show_default=True, help="Passes over the texts.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Texts per step.")
@click.option(
    "--learning-rate",
    type=float,
    default=0.2,
    show_default=True,
    help="Of Adam, relative to the root mean square of the rows.",
)
@click.option("--layer", type=int, default=-1, show_default=True, help="The layer whose hidden states are compared.")
@click.option(
    "--held-out", type=float, default=0.25, show_default=True, help="Fraction of the texts that is not trained on."
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of the order of texts and of the held-out ones."
)
@click.option("--device", default="cpu", show_default=True, help="Device to run the model on, such as cuda.")
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

    Each row is trained until the model's hidden states with the new token match those with its old sub-tokens (Token
    Distillation, https://arxiv.org/abs/2505.20133). MODEL is not changed; `embedsurgery merge` merges the adapter.
    """
    from embedsurgery.errors import ConfigError, OutputExistsError
    from embedsurgery_distill.initializer import read_texts
    from embedsurgery_distill.loading import load
    from embedsurgery_distill.method import distill

    if output.exists():
        raise OutputExistsError("the output exists already", where=output, hint="name a new directory")
    lines = read_texts(texts)
    on_terminal = sys.stderr.isatty()
    loaded, tokenizer = load(model, progress=on_terminal)
    try:
        loaded.to(device)
    except (RuntimeError, AssertionError) as error:  # how torch reports a device that does not exist
        line = str(error).partition("\n")[0]
        raise ConfigError("the model cannot run on this device", where=f"--device {device}", found=line) from error
    bar = click.progressbar(length=1000, label="distilling", file=sys.stderr)

    def progress(done: int, total: int) -> None:
        bar.update(done * 1000 // total - bar.pos)

    with bar if on_terminal else nullcontext():
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
            progress=progress if on_terminal else None,
        )
    adapter.save(output)
    if as_json:
        click.echo(json.dumps({**asdict(report), "output": str(output)}, indent=2))
        return
    click.echo(f"distilled: {', '.join(tokens)} from {report.texts} texts in {report.steps} steps, seed {report.seed}")
    click.echo(f"on {report.held_out} held-out texts, compared with the hidden states of the sub-tokens:")
    click.echo("                      similarity   squared error")
    click.echo(f"  mean of sub-tokens  {report.similarity_before:10.4f}   {report.loss_before:13.5g}")
    click.echo(f"  distilled           {report.similarity_after:10.4f}   {report.loss_after:13.5g}")
    click.echo(f"written: {output}")

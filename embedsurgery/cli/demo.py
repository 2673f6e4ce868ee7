"""``embedsurgery demo``: the whole path on a small real model. What it does is in ``embedsurgery/demo``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import singledispatch
from pathlib import Path

import click

from embedsurgery.cli.render import json_option, print_json, size
from embedsurgery.demo.report import (
    BaseStep,
    DemoReport,
    Measure,
    MergeStep,
    ReloadStep,
    SaveStep,
    Step,
    TrainStep,
    UnmergeStep,
    WordStep,
)


@click.command("demo")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("embedsurgery-demo"),
    show_default=True,
    help="Where everything is written; a new or empty directory.",
)
@click.option("--model", type=click.Path(path_type=Path), help="Your own checkpoint directory; it is only read.")
@click.option("--word", help="The new word.  [default: zorbl]")
@click.option(
    "--text",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Lines that use the word, in place of the demo's own.",
)
@json_option
def command(output: Path, model: Path | None, word: str | None, text: Path | None, as_json: bool) -> None:
    """Teach a small language model a word, bake it in, and take it out again: under a minute, without a network.

    Makes a small transformers checkpoint, trains the row of a new token until the model uses it, saves the row, merges
    it, verifies and reloads the result, unmerges it, and says at each step what there is to see. Needs
    embedsurgery[demo].

    With --model the same is done to a language model of yours, on the CPU; its embedding table must have a spare
    row, and its directory is not changed. Three fourths of the lines of --text that use the word train it, and the
    others test it.
    """
    from embedsurgery.demo.corpus import WORD
    from embedsurgery.demo.run import Options, run

    options = Options(output, model, WORD if word is None else word, text)
    with _busy() as (busy, pause):

        def show(step: Step) -> None:
            pause()
            if not as_json:
                _print_step(step)

        report = run(options, show, busy)
    if as_json:
        print_json(asdict(report))
    else:
        _print_end(report)


@contextmanager
def _busy() -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """What is being done, on a terminal, and how to clear it before a line is printed; nothing in a pipe."""
    if not sys.stderr.isatty():
        yield lambda text: None, lambda: None
        return
    from rich.console import Console

    with Console(stderr=True).status("") as status:

        def busy(text: str) -> None:
            status.update(f"{text} ...")
            status.start()

        yield busy, status.stop


@singledispatch
def _print_step(step: Step) -> None:
    raise NotImplementedError(type(step).__name__)


def _heading(number: int, title: str) -> None:
    click.echo(f"{'' if number == 1 else chr(10)}{number}. {title}")


def _line(name: str, text: str) -> None:
    click.echo(f"   {name:<12} {text}")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _measure(measure: Measure) -> str:
    return (
        f"probability {measure.probability:.6f}, rank {measure.rank:,}, first choice in {measure.first} of "
        f"{measure.lines} held-out lines, their loss {measure.loss:.3f}"
    )


@_print_step.register
def _base(step: BaseStep) -> None:
    _heading(1, f"a language model: {step.directory}")
    _line(
        "size", f"{step.parameters:,} parameters, {size(step.bytes)} in {_count(len(step.files), 'file')}, {step.dtype}"
    )
    if step.made:
        _line(
            "trained",
            f"{step.steps} steps in {step.seconds:.1f} s, loss on held-out sentences "
            f"{step.first_loss:.3f} -> {step.last_loss:.3f}",
        )


@_print_step.register
def _word(step: WordStep) -> None:
    _heading(2, f'a new word: "{step.word}"')
    _line(
        "row",
        f"{step.row} of {', '.join(step.tables)}{' (tied to the output)' if step.tied else ''}; "
        f"{step.spare} of {step.rows:,} rows were spare",
    )
    _line("tokenizer", f'"{step.token}" is token {step.row} in {step.tokenizer}; the checkpoints keep theirs')
    _line("before", _measure(step.before))
    _line("", f"{step.prompt} -> {step.completion}")


@_print_step.register
def _train(step: TrainStep) -> None:
    _heading(3, "its row is trained, and nothing else")
    _line(
        "trained",
        f"{step.trained:,} numbers, {step.steps} steps in {step.seconds:.1f} s, loss "
        f"{step.first_loss:.3f} -> {step.last_loss:.3f}",
    )
    _line("after", _measure(step.after))
    _line("writes it", f"... -> {step.completion}")
    _line("reads it", f"{step.reading_prompt} -> {step.reading}")
    _line(
        "other lines",
        f"without the word: loss {step.others_before:.3f} -> {step.others_after:.3f}; columns of the "
        f"logits that changed: {', '.join(map(str, step.columns[:8])) or 'none'}",
    )


@_print_step.register
def _save(step: SaveStep) -> None:
    _heading(4, f"saved as an adapter: {step.directory}")
    _line("size", f"{size(step.bytes)}; the model's weights are {size(step.model_bytes)}")


@_print_step.register
def _merge(step: MergeStep) -> None:
    _heading(5, f"merged into a checkpoint, without loading it: {step.directory}")
    for name, count in step.rows.items():
        _line("changed", f"{_count(count, 'row')} of {name}")
    tensors, files = _count(step.tensors - len(step.rows), "other tensor"), _count(step.same_files, "other file")
    _line("the same", f"{tensors} in {', '.join(step.changed_files)}, and {files}, byte for byte")
    _line("new", ", ".join(step.new_files))
    _line("verified", f"{len(step.checks)} checks, all ok: {', '.join(dict.fromkeys(step.checks))}")


@_print_step.register
def _reload(step: ReloadStep) -> None:
    _heading(6, "reloaded by transformers, without embedsurgery")
    _line("logits", f"{step.logits:,} compared with the trained model's: largest difference {step.max_difference:.2g}")
    _line("writes it", f"... -> {step.completion}")


@_print_step.register
def _unmerge(step: UnmergeStep) -> None:
    _heading(7, f"unmerged: {step.directory}")
    for item in step.hashes:
        _line("sha256", item.file)
        _line("", f"{item.base}  base")
        _line("", f"{item.merged}  merged")
        _line("", f"{item.unmerged}  unmerged")
    _line("the same", f"all {step.files} files are the base's, byte for byte")


def _print_end(report: DemoReport) -> None:
    click.echo(f"\ndone in {report.seconds:.1f} s. To go on:")
    for line in report.commands:
        click.echo(f"   {line}")

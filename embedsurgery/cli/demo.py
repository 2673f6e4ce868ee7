"""``embedsurgery demo``: run the whole workflow on a small real model, and print each step.

``demo/run.py`` runs the steps and returns what is printed here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import singledispatch
from pathlib import Path

import click

from embedsurgery.cli.render import format_size, json_option, print_json
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
    help="Output directory; new or empty.",
)
@click.option("--model", type=click.Path(path_type=Path), help="A checkpoint to use instead of the demo's; only read.")
@click.option("--word", help="New word.  [default: zorbl]")
@click.option(
    "--text",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A file of lines that use the word, instead of the demo's lines.",
)
@json_option
def command(output: Path, model: Path | None, word: str | None, text: Path | None, as_json: bool) -> None:
    """Teach a small language model a word, merge it and unmerge it: in under a minute, without a network.

    Trains a small transformers checkpoint, trains the row of a new token until the model uses it, saves the row, merges
    it, verifies and reloads the result, unmerges it, and prints what each step did. Needs embedsurgery[demo].

    With --model, does the same with your language model, on the CPU. Its embedding table must have a spare row, and its
    directory is not changed. Of the lines of --text that use the word, three quarters train it, and the others test it.
    """
    from embedsurgery.demo.corpus import WORD
    from embedsurgery.demo.run import DemoOptions, run_demo

    options = DemoOptions(output, model, WORD if word is None else word, text)
    with _status_line() as (busy, clear):

        def show(step: Step) -> None:
            clear()
            if not as_json:
                _print_step(step)

        report = run_demo(options, show, busy)
    if as_json:
        print_json(asdict(report))
    else:
        _print_end(report)


@contextmanager
def _status_line() -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """Show what is running, on a terminal only. Yields a function that sets the text and one that clears the line."""
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


def _print_heading(number: int, title: str) -> None:
    click.echo(f"{'' if number == 1 else chr(10)}{number}. {title}")


def _print_fact(name: str, text: str) -> None:
    click.echo(f"   {name:<12} {text}")


def _format_count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _format_measure(measure: Measure) -> str:
    return (
        f"probability {measure.probability:.6f}, rank {measure.rank:,}, most likely in {measure.first} of "
        f"{measure.lines} held-out lines, loss {measure.loss:.3f}"
    )


@_print_step.register
def _print_base(step: BaseStep) -> None:
    _print_heading(1, f"language model: {step.directory}")
    files = f"{format_size(step.bytes)} in {_format_count(len(step.files), 'file')}"
    _print_fact("size", f"{step.parameters:,} parameters, {files}, {step.dtype}")
    if step.made:
        _print_fact(
            "trained",
            f"{step.steps} steps in {step.seconds:.1f} s, loss on held-out sentences "
            f"{step.first_loss:.3f} -> {step.last_loss:.3f}",
        )


@_print_step.register
def _print_word(step: WordStep) -> None:
    _print_heading(2, f'new word: "{step.word}"')
    _print_fact(
        "row",
        f"{step.row} of {', '.join(step.tables)}{' (tied to the output)' if step.tied else ''}; "
        f"{step.spare} of {step.rows:,} rows spare",
    )
    _print_fact(
        "tokenizer", f'"{step.token}" is token {step.row} in {step.tokenizer}; the checkpoints keep their tokenizers'
    )
    _print_fact("before", _format_measure(step.before))
    _print_fact("", f"{step.prompt} -> {step.completion}")


@_print_step.register
def _print_train(step: TrainStep) -> None:
    _print_heading(3, "trained: its row, and nothing else")
    _print_fact(
        "trained",
        f"{step.trained:,} parameters, {step.steps} steps in {step.seconds:.1f} s, loss "
        f"{step.first_loss:.3f} -> {step.last_loss:.3f}",
    )
    _print_fact("after", _format_measure(step.after))
    _print_fact("writes it", f"... -> {step.completion}")
    _print_fact("reads it", f"{step.reading_prompt} -> {step.reading}")
    _print_fact(
        "other lines",
        f"without the word: loss {step.others_before:.3f} -> {step.others_after:.3f}; changed logit "
        f"columns: {', '.join(map(str, step.columns[:8])) or 'none'}",
    )


@_print_step.register
def _print_save(step: SaveStep) -> None:
    _print_heading(4, f"saved as adapter: {step.directory}")
    _print_fact("size", f"{format_size(step.bytes)}; the model's weights are {format_size(step.model_bytes)}")


@_print_step.register
def _print_merge(step: MergeStep) -> None:
    _print_heading(5, f"merged without loading the model: {step.directory}")
    for name, count in step.rows.items():
        _print_fact("changed", f"{_format_count(count, 'row')} of {name}")
    tensors, files = (
        _format_count(step.tensors - len(step.rows), "other tensor"),
        _format_count(step.same_files, "other file"),
    )
    _print_fact("unchanged", f"{tensors} in {', '.join(step.changed_files)}, and {files}, byte for byte")
    _print_fact("new", ", ".join(step.new_files))
    _print_fact("verified", f"{len(step.checks)} checks, all ok: {', '.join(dict.fromkeys(step.checks))}")


@_print_step.register
def _print_reload(step: ReloadStep) -> None:
    _print_heading(6, "reloaded by transformers, without embedsurgery")
    _print_fact(
        "logits", f"{step.logits:,} compared with the trained model's: largest difference {step.max_difference:.2g}"
    )
    _print_fact("writes it", f"... -> {step.completion}")


@_print_step.register
def _print_unmerge(step: UnmergeStep) -> None:
    _print_heading(7, f"unmerged: {step.directory}")
    for item in step.hashes:
        _print_fact("sha256", item.file)
        _print_fact("", f"{item.base}  base")
        _print_fact("", f"{item.merged}  merged")
        _print_fact("", f"{item.unmerged}  unmerged")
    _print_fact("unchanged", f"all {step.files} files equal the base's, byte for byte")


def _print_end(report: DemoReport) -> None:
    click.echo(f"\ndone in {report.seconds:.1f} s. Try next:")
    for line in report.commands:
        click.echo(f"   {line}")

"""The demo from end to end: model, word, trained row, adapter, merge, check, reload, and the way back."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedsurgery.checkpoints.merging import merge_checkpoint
from embedsurgery.checkpoints.unmerging import unmerge_checkpoint
from embedsurgery.checkpoints.verifying import verify_checkpoint
from embedsurgery.demo import corpus
from embedsurgery.demo.base import load_model, load_tokenizer, make_base, one_thread, quiet, require, seeded
from embedsurgery.demo.disk import changed_rows, fresh_directory, hashes, total_bytes
from embedsurgery.demo.report import (
    BaseStep,
    DemoReport,
    Hashes,
    MergeStep,
    ReloadStep,
    SaveStep,
    Step,
    TrainStep,
    UnmergeStep,
    WordStep,
)
from embedsurgery.errors import CheckpointError, UnsupportedError
from embedsurgery.models.attaching import attach
from embedsurgery.models.walking import walk
from embedsurgery.stores.checkpoint import open_checkpoint
from embedsurgery.surgeries.trainable_tokens.config import TrainableTokensConfig

if TYPE_CHECKING:
    import torch

    from embedsurgery.demo.word import Lines, Row

_SMALL = 20_000_000
"""Parameters below which one thread does the work fastest."""
_PROBES = 4
"""Held-out lines whose logits are compared after the reload: V numbers for each of their tokens."""


@dataclass(frozen=True)
class Options:
    """What the user asks for.

    Attributes:
        output: The directory that everything is written to.
        model: A checkpoint in place of the demo's own; it is only read.
        word: The new word.
        text: A file with lines that use it, in place of the demo's own.
        steps: Steps of training at the most.
    """

    output: Path
    model: Path | None = None
    word: str = corpus.WORD
    text: Path | None = None
    steps: int = 200


@dataclass(frozen=True)
class _Learnt:
    """What the checks on disk need of the attached model, which is gone by then."""

    word: WordStep
    train: TrainStep
    save: SaveStep
    prompt: list[int]
    probes: list[list[int]]
    logits: torch.Tensor


def run(options: Options, show: Callable[[Step], None], busy: Callable[[str], None]) -> DemoReport:
    """The demo.

    Args:
        options: What the user asks for.
        show: Called with each step when it is done.
        busy: Called with what is done next, where it takes its time.

    Returns:
        Every step.

    Raises:
        OutputExistsError: There is something in ``options.output``.
        UnsupportedError: A package is missing, no row is spare, or the model has not learnt the word.
        CheckpointError: transformers cannot load ``options.model``; or a merged checkpoint fails its checks, or an
            unmerged one is not the base.
        ConfigError: A word or text that cannot be used.
    """
    from embedsurgery.demo.word import check_word

    began = time.perf_counter()
    check_word(options.word)
    output, own = options.output, options.model is None
    base = output / "base" if options.model is None else options.model
    small = own or _parameters(base) < _SMALL
    with fresh_directory(output, apart_from=options.model):
        require()
        busy("loading torch and transformers")
        with ExitStack() as stack:
            for guard in (quiet(), seeded(), *((one_thread(),) if small else ())):
                stack.enter_context(guard)
            base_step = _base(base, own, busy)
            show(base_step)
            learnt = _learn(options, base, base_step, show, busy)
            merged, unmerged = output / "merged", output / "unmerged"
            busy("merging")
            before = hashes(base)
            merge = _merge(base, output / "adapter", merged, before)
            show(merge)
            busy("loading the merged checkpoint")
            reload = _reload(merged, output / "tokenizer", learnt)
            show(reload)
            busy("unmerging")
            unmerge = _unmerge(merged, unmerged, before, merge)
            show(unmerge)
    seconds = time.perf_counter() - began
    return DemoReport(
        str(output),
        base_step,
        learnt.word,
        learnt.train,
        learnt.save,
        merge,
        reload,
        unmerge,
        seconds,
        _commands(base, output),
    )


def _base(base: Path, own: bool, busy: Callable[[str], None]) -> BaseStep:
    trained: tuple[Any, ...] = ()
    if own:
        busy("training a small language model")
        trained = make_base(base)
    files = tuple(open_checkpoint(base).headers)
    dtype = walk(base).main_input().dtype
    return BaseStep(str(base), own, _parameters(base), dtype, files, total_bytes(base, files), *trained)


def _parameters(base: Path) -> int:
    headers = open_checkpoint(base).headers.values()
    return sum(math.prod(entry.shape) for header in headers for entry in header.entries.values())


def _learn(
    options: Options, base: Path, base_step: BaseStep, show: Callable[[Step], None], busy: Callable[[str], None]
) -> _Learnt:
    """Give the word a row, train it, and save it; afterwards the model is no longer needed."""
    from embedsurgery.demo import training
    from embedsurgery.demo.word import add_word, demo_lines, own_lines

    model, tokenizer = load_model(base), load_tokenizer(base)
    row = add_word(tokenizer, options.word, walk(model))
    lines = demo_lines(tokenizer, options.word) if options.text is None else own_lines(tokenizer, row, options.text)
    tokenizer.save_pretrained(options.output / "tokenizer")
    first = lines.held_out[0]
    prompt = first[: training.last_place(first, row.row)]
    word = _word(options, model, tokenizer, row, lines, prompt)
    show(word)
    busy(f"training row {row.row}")
    others_before = training.mean_loss(model, lines.other_held_out)
    config = TrainableTokensConfig([row.row], target_modules=_targets(row))
    attachment = attach(model, config, tokenizer=tokenizer)
    scales = [float(model.get_parameter(t.name).detach().float().square().mean().sqrt()) for t in row.tables]
    done = training.train_rows(model, attachment, scales, lines.train, lines.other_train, options.steps)
    after = training.measure(model, lines.held_out, row.row)
    if 2 * after.first < after.lines:
        raise UnsupportedError(
            "the model has not learnt the word",
            where=options.word,
            expected=f"its first choice in half of {after.lines} held-out lines or more",
            found=f"{after.first}, probability {after.probability:.3f}, after {done.steps} steps",
            hint="give lines that tell more of it with --text",
        )
    train = TrainStep(
        trained=sum(p.numel() for p in attachment.parameters()),
        steps=done.steps,
        seconds=done.seconds,
        first_loss=done.first_loss,
        last_loss=done.last_loss,
        after=after,
        others_before=others_before,
        others_after=training.mean_loss(model, lines.other_held_out),
        columns=training.changed_columns(model, attachment, lines.other_held_out),
        completion=training.complete(model, tokenizer, prompt),
        reading_prompt=f"The{row.token}",
        reading=training.complete(model, tokenizer, training.encode(tokenizer, [f"The{row.token}"])[0]),
    )
    show(train)
    adapter = options.output / "adapter"
    attachment.adapter().save(adapter)
    save = SaveStep(str(adapter), total_bytes(adapter), base_step.bytes)
    show(save)
    probes = lines.held_out[:_PROBES]
    return _Learnt(word, train, save, prompt, probes, training.probe(model, probes))


def _word(options: Options, model: Any, tokenizer: Any, row: Row, lines: Lines, prompt: list[int]) -> WordStep:
    from embedsurgery.demo import training

    return WordStep(
        word=options.word,
        token=row.token,
        row=row.row,
        rows=row.tables[0].shape[0],
        spare=row.spare,
        tables=tuple(table.name for table in row.tables),
        tied=len(row.tables) == 1,
        tokenizer=str(options.output / "tokenizer"),
        train_lines=len(lines.train),
        before=training.measure(model, lines.held_out, row.row),
        prompt=str(tokenizer.decode(prompt, skip_special_tokens=True)),
        completion=training.complete(model, tokenizer, prompt),
    )


def _targets(row: Row) -> tuple[str, ...] | None:
    """None is the input table with what is tied to it; two tables are named."""
    return None if len(row.tables) == 1 else tuple(table.modules[0] for table in row.tables)


def _merge(base: Path, adapter: Path, merged: Path, before: dict[str, str]) -> MergeStep:
    merge_checkpoint(base, adapter, merged)
    after = hashes(merged)
    changed = tuple(name for name, digest in before.items() if after.get(name) != digest)
    transposed = {name for table in walk(base).tables for name in table.transposed}
    rows: dict[str, int] = {}
    tensors = 0
    for name in changed:
        differ, count = changed_rows(base / name, merged / name, transposed)
        rows.update(differ)
        tensors += count
    checks = verify_checkpoint(merged)
    wrong = "; ".join(f"{check.name}: {check.detail}" for check in checks if not check.ok)
    if wrong:
        raise CheckpointError("the merged checkpoint fails its checks", where=merged, found=wrong)
    return MergeStep(
        directory=str(merged),
        rows=rows,
        changed_files=changed,
        same_files=len(before) - len(changed),
        new_files=tuple(name for name in after if name not in before),
        tensors=tensors,
        checks=tuple(check.name for check in checks),
    )


def _reload(merged: Path, tokenizer: Path, learnt: _Learnt) -> ReloadStep:
    from embedsurgery.demo.training import complete, probe

    model = load_model(merged)
    logits = probe(model, learnt.probes)
    completion = complete(model, load_tokenizer(tokenizer), learnt.prompt)
    difference = float((logits - learnt.logits).abs().max())
    return ReloadStep(logits.numel(), difference, completion, completion == learnt.train.completion)


def _unmerge(merged: Path, unmerged: Path, before: dict[str, str], merge: MergeStep) -> UnmergeStep:
    unmerge_checkpoint(merged, unmerged)
    now, after = hashes(merged), hashes(unmerged)
    wrong = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
    if wrong:
        raise CheckpointError("the unmerged checkpoint is not the base", where=unmerged, found=", ".join(wrong[:4]))
    changed = tuple(Hashes(name, before[name], now[name], after[name]) for name in merge.changed_files)
    return UnmergeStep(str(unmerged), changed, len(after))


def _commands(base: Path, output: Path) -> tuple[str, ...]:
    """What to try next, as lines for a shell."""
    start, adapter, again, back = base, output / "adapter", output / "merged-again", output / "unmerged-again"
    lines: tuple[tuple[str | Path, ...], ...] = (
        ("inspect", start),
        ("show", adapter, "--model", start),
        ("merge", start, adapter, "-o", again),
        ("verify", again),
        ("unmerge", again, "-o", back),
    )
    return tuple(shlex.join(["embedsurgery", *map(str, line)]) for line in lines)

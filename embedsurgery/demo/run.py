"""The demo from end to end: model, word, trained row, adapter, merge, verify, reload, unmerge.

The result of each step is data of ``report.py``; ``cli/demo.py`` prints it.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from embedsurgery.checkpoints.merging import merge_checkpoint
from embedsurgery.checkpoints.unmerging import unmerge_checkpoint
from embedsurgery.checkpoints.verifying import verify_checkpoint
from embedsurgery.demo import corpus, training
from embedsurgery.demo.base import (
    check_packages,
    load_model,
    load_tokenizer,
    make_base,
    seed_torch,
    silence_transformers,
    use_one_thread,
)
from embedsurgery.demo.disk import count_changed_rows, fresh_directory, hash_directory, total_bytes
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
from embedsurgery.demo.word import Lines, WordRow, add_word, check_word, demo_lines, read_lines
from embedsurgery.errors import CheckpointError, UnsupportedError
from embedsurgery.models.attaching import attach
from embedsurgery.models.walking import walk
from embedsurgery.stores.checkpoint import open_checkpoint
from embedsurgery.surgeries.trainable_tokens.config import TrainableTokensConfig

if TYPE_CHECKING:
    from embedsurgery.runtime.attachment import Attachment

_SMALL = 20_000_000
"""Number of parameters below which one thread is fastest."""
_PROBES = 4
"""Number of held-out lines whose logits are compared after the reload: V numbers for each token."""


@dataclass(frozen=True)
class DemoOptions:
    """The user's options.

    Attributes:
        output: The directory that everything is written to.
        model: A checkpoint in place of the demo's; it is only read.
        word: The new word.
        text: A file of lines that use the word, in place of the demo's.
        steps: Upper limit of training steps.
    """

    output: Path
    model: Path | None = None
    word: str = corpus.WORD
    text: Path | None = None
    steps: int = 200


@dataclass(frozen=True)
class _TrainedWord:
    """The steps with the attached model, and what the later checks need of it: the model itself is freed."""

    word: WordStep
    train: TrainStep
    save: SaveStep
    prompt: list[int]
    probes: list[list[int]]
    logits: torch.Tensor


def run_demo(options: DemoOptions, show: Callable[[Step], None], busy: Callable[[str], None]) -> DemoReport:
    """Run the demo.

    Args:
        options: The user's options.
        show: Called with each finished step.
        busy: Called with a short text before work that takes a while.

    Returns:
        All steps.

    Raises:
        OutputExistsError: ``options.output`` is not empty.
        UnsupportedError: A package is missing, the table has no spare row, or the model did not learn the word.
        CheckpointError: transformers cannot load ``options.model``; or the merged checkpoint fails its checks, or the
            unmerged one differs from the base.
        ConfigError: The word or the text cannot be used.
    """
    began = time.perf_counter()
    check_word(options.word)
    output, own = options.output, options.model is None
    base = output / "base" if options.model is None else options.model
    small = own or _count_parameters(base) < _SMALL
    with fresh_directory(output, apart_from=options.model):
        check_packages()
        busy("loading transformers")
        with silence_transformers(), seed_torch(), use_one_thread() if small else nullcontext():
            base_step = _prepare_base(base, own, busy)
            show(base_step)
            trained = _train_word(options, base, base_step, show, busy)
            merged, unmerged = output / "merged", output / "unmerged"
            busy("merging")
            before = hash_directory(base)
            merge = _merge_and_compare(base, output / "adapter", merged, before)
            show(merge)
            busy("loading the merged checkpoint")
            reload = _reload_and_compare(merged, output / "tokenizer", trained)
            show(reload)
            busy("unmerging")
            unmerge = _unmerge_and_compare(merged, unmerged, before, merge)
            show(unmerge)
    return DemoReport(
        output=str(output),
        base=base_step,
        word=trained.word,
        train=trained.train,
        save=trained.save,
        merge=merge,
        reload=reload,
        unmerge=unmerge,
        seconds=time.perf_counter() - began,
        commands=_next_commands(base, output),
    )


def _prepare_base(base: Path, own: bool, busy: Callable[[str], None]) -> BaseStep:
    trained: tuple[Any, ...] = ()
    if own:
        busy("training a small language model")
        trained = make_base(base)
    files = tuple(open_checkpoint(base).headers)
    dtype = walk(base).main_input().dtype
    return BaseStep(str(base), own, _count_parameters(base), dtype, files, total_bytes(base, files), *trained)


def _count_parameters(base: Path) -> int:
    headers = open_checkpoint(base).headers.values()
    return sum(math.prod(entry.shape) for header in headers for entry in header.entries.values())


def _train_word(
    options: DemoOptions, base: Path, base_step: BaseStep, show: Callable[[Step], None], busy: Callable[[str], None]
) -> _TrainedWord:
    """Give the word a row, train the row, and save it as an adapter. The model is freed on return."""
    model, tokenizer = load_model(base), load_tokenizer(base)
    row = add_word(tokenizer, options.word, walk(model))
    lines = demo_lines(tokenizer, options.word) if options.text is None else read_lines(tokenizer, row, options.text)
    tokenizer.save_pretrained(options.output / "tokenizer")
    first = lines.held_out[0]
    prompt = first[: training.last_position(first, row.row)]
    word = _word_step(options, model, tokenizer, row, lines, prompt)
    show(word)
    busy(f"training row {row.row}")
    attachment, train = _train_row(options, model, tokenizer, row, lines, prompt)
    show(train)
    adapter = options.output / "adapter"
    attachment.adapter().save(adapter)
    save = SaveStep(str(adapter), total_bytes(adapter), base_step.bytes)
    show(save)
    probes = lines.held_out[:_PROBES]
    return _TrainedWord(word, train, save, prompt, probes, training.compute_logits(model, probes))


def _train_row(
    options: DemoOptions, model: Any, tokenizer: Any, row: WordRow, lines: Lines, prompt: list[int]
) -> tuple[Attachment, TrainStep]:
    """Attach the row to the model and train it.

    Raises:
        UnsupportedError: The word is not the most likely token in half of the held-out lines.
    """
    others_before = training.mean_loss(model, lines.other_held_out)
    config = TrainableTokensConfig([row.row], target_modules=_target_modules(row))
    attachment = attach(model, config, tokenizer=tokenizer)
    scales = [float(model.get_parameter(t.name).detach().float().square().mean().sqrt()) for t in row.tables]
    result = training.train_rows(model, attachment, scales, lines.train, lines.other_train, options.steps)
    after = training.measure(model, lines.held_out, row.row)
    if 2 * after.first < after.lines:
        raise UnsupportedError(
            "the model did not learn the word",
            where=options.word,
            expected=f"the most likely token in at least half of {after.lines} held-out lines",
            found=f"{after.first} lines, probability {after.probability:.3f}, after {result.steps} steps",
            hint="give more informative lines with --text",
        )
    step = TrainStep(
        trained=sum(p.numel() for p in attachment.parameters()),
        steps=result.steps,
        seconds=result.seconds,
        first_loss=result.first_loss,
        last_loss=result.last_loss,
        after=after,
        others_before=others_before,
        others_after=training.mean_loss(model, lines.other_held_out),
        columns=training.find_changed_columns(model, attachment, lines.other_held_out),
        completion=training.complete(model, tokenizer, prompt),
        reading_prompt=f"The{row.token}",
        reading=training.complete(model, tokenizer, training.encode_lines(tokenizer, [f"The{row.token}"])[0]),
    )
    return attachment, step


def _word_step(
    options: DemoOptions, model: Any, tokenizer: Any, row: WordRow, lines: Lines, prompt: list[int]
) -> WordStep:
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


def _target_modules(row: WordRow) -> tuple[str, ...] | None:
    """Return target_modules: None for a tied table, because the default covers it; else both tables."""
    return None if len(row.tables) == 1 else tuple(table.modules[0] for table in row.tables)


def _merge_and_compare(base: Path, adapter: Path, merged: Path, before: dict[str, str]) -> MergeStep:
    merge_checkpoint(base, adapter, merged)
    after = hash_directory(merged)
    changed = tuple(name for name, digest in before.items() if after.get(name) != digest)
    transposed = {name for table in walk(base).tables for name in table.transposed}
    rows: dict[str, int] = {}
    tensors = 0
    for name in changed:
        differ, count = count_changed_rows(base / name, merged / name, transposed)
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


def _reload_and_compare(merged: Path, tokenizer: Path, trained: _TrainedWord) -> ReloadStep:
    model = load_model(merged)
    logits = training.compute_logits(model, trained.probes)
    completion = training.complete(model, load_tokenizer(tokenizer), trained.prompt)
    difference = float((logits - trained.logits).abs().max())
    return ReloadStep(logits.numel(), difference, completion, completion == trained.train.completion)


def _unmerge_and_compare(merged: Path, unmerged: Path, before: dict[str, str], merge: MergeStep) -> UnmergeStep:
    unmerge_checkpoint(merged, unmerged)
    now, after = hash_directory(merged), hash_directory(unmerged)
    wrong = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
    if wrong:
        raise CheckpointError(
            "the unmerged checkpoint differs from the base", where=unmerged, found=", ".join(wrong[:4])
        )
    changed = tuple(Hashes(name, before[name], now[name], after[name]) for name in merge.changed_files)
    return UnmergeStep(str(unmerged), changed, len(after))


def _next_commands(base: Path, output: Path) -> tuple[str, ...]:
    """Return commands to try next, as shell lines."""
    adapter, merged, unmerged = output / "adapter", output / "merged-again", output / "unmerged-again"
    lines: tuple[tuple[str | Path, ...], ...] = (
        ("inspect", base),
        ("show", adapter, "--model", base),
        ("merge", base, adapter, "-o", merged),
        ("verify", merged),
        ("unmerge", merged, "-o", unmerged),
    )
    return tuple(shlex.join(["embedsurgery", *map(str, line)]) for line in lines)

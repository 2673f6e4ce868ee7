"""Losses, the training of the rows, and the measurements of how well the model uses the word.

A line is a list of token ids; shorter lines of a batch are padded on the right. ``word.py`` chooses the lines.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from embedsurgery.demo.report import Measure
from embedsurgery.errors import UnsupportedError

if TYPE_CHECKING:
    from embedsurgery.runtime.attachment import Attachment

Line = Sequence[int]

BATCH = 8
MAX_TOKENS = 128
RATE = 0.1
"""Learning rate relative to the root mean square of the table: tables differ in scale by a factor of a hundred."""
_WINDOW = 12
"""Least number of steps that the loss is averaged over."""
_MIN_GAIN = 0.02
"""Training ends when a window lowers the loss by less than this part of the whole decrease."""
_IGNORED = -100
"""Target of padding, which the loss ignores."""


@dataclass(frozen=True)
class TrainingResult:
    """Steps and seconds of a training, and the mean loss of the lines before and after it, in nats per token."""

    steps: int
    seconds: float
    first_loss: float
    last_loss: float


def encode_lines(tokenizer: Any, lines: Iterable[str]) -> list[list[int]]:
    """Encode lines, with the tokenizer's special tokens, each cut to `MAX_TOKENS` ids."""
    return [list(tokenizer(line)["input_ids"])[:MAX_TOKENS] for line in lines]


def _pad_batch(lines: Sequence[Line]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, attention mask and targets, int64 (B, T) each."""
    longest = max(map(len, lines))
    ids = torch.zeros(len(lines), longest, dtype=torch.int64)
    mask, targets = torch.zeros_like(ids), torch.full_like(ids, _IGNORED)
    for number, line in enumerate(lines):
        values = torch.tensor(line, dtype=torch.int64)
        ids[number, : len(line)], targets[number, : len(line)] = values, values
        mask[number, : len(line)] = 1
    return ids, mask, targets


def _next_token_logits(model: Any, lines: Sequence[Line]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return next-token logits, fp32 (B, T-1, V), and the next tokens, int64 (B, T-1)."""
    ids, mask, targets = _pad_batch(lines)
    logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits[:, :-1].float(), targets[:, 1:]


def token_loss(model: Any, lines: Sequence[Line]) -> torch.Tensor:
    """Return the mean cross entropy per token of one batch, in nats, with gradients."""
    logits, targets = _next_token_logits(model, lines)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=_IGNORED)


@torch.no_grad()
def mean_loss(model: Any, lines: Sequence[Line]) -> float:
    """Return the mean cross entropy per token of any number of lines, in nats, without gradients."""
    total, count = 0.0, 0
    for batch in _batches(lines):
        logits, targets = _next_token_logits(model, batch)
        total += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=_IGNORED, reduction="sum"))
        count += int((targets != _IGNORED).sum())
    return total / count


def last_position(line: Line, row: int) -> int:
    """Return the last position of a token in a line; 0 if it is absent, or only first, where nothing predicts it."""
    return max((position for position, token in enumerate(line) if token == row), default=0)


@torch.no_grad()
def measure(model: Any, lines: Sequence[Line], row: int) -> Measure:
    """Measure how well the model predicts a token, on lines that contain it."""
    probabilities, ranks = [], []
    for batch in _batches(lines):
        logits, _ = _next_token_logits(model, batch)
        for number, line in enumerate(batch):
            predicted = logits[number, last_position(line, row) - 1].softmax(-1)
            probabilities.append(float(predicted[row]))
            ranks.append(int((predicted > predicted[row]).sum()) + 1)
    return Measure(
        lines=len(lines),
        probability=statistics.fmean(probabilities),
        rank=statistics.median_high(ranks),
        first=ranks.count(1),
        loss=mean_loss(model, lines),
    )


@torch.no_grad()
def find_changed_columns(model: Any, attachment: Attachment, lines: Sequence[Line]) -> tuple[int, ...]:
    """Find the columns of the logits in which base and adapter differ at any position of the lines."""
    differ: torch.Tensor | None = None
    for batch in _batches(lines):
        live, _ = _next_token_logits(model, batch)
        with attachment.disabled():
            base, _ = _next_token_logits(model, batch)
        columns = (live != base).flatten(0, 1).any(dim=0)
        differ = columns if differ is None else differ | columns
    return () if differ is None else tuple(torch.nonzero(differ).flatten().tolist())


@torch.no_grad()
def compute_logits(model: Any, lines: Sequence[Line]) -> torch.Tensor:
    """Return all next-token logits of the lines as one fp32 vector. Line by line, so that there is no padding."""
    return torch.cat([_next_token_logits(model, [line])[0].flatten() for line in lines])


@torch.no_grad()
def complete(model: Any, tokenizer: Any, prompt: Line, max_new_tokens: int = 24) -> str:
    """Continue a prompt greedily. Returns the new text, without the prompt, on one line."""
    ids = torch.tensor([list(prompt)], dtype=torch.int64)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=padding if padding is not None else 0,
    )
    text = tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
    return " ".join(str(text).split())


def train_rows(
    model: Any,
    attachment: Attachment,
    scales: Sequence[float],
    lines: Sequence[Line],
    others: Sequence[Line],
    max_steps: int,
) -> TrainingResult:
    """Train an attachment's rows until the loss of the lines stops falling.

    Each step sees lines with the word and as many without it, so that the model learns where the word belongs and where
    it does not. The loss is averaged over windows of steps that see every line equally often. Training ends when a
    window lowers it by less than 2% of the decrease since the first.

    Args:
        model: The attached model.
        attachment: Its parameters are trained.
        scales: The root mean square of the table, for each parameter.
        lines: Lines with the word.
        others: Lines without it.
        max_steps: Upper limit of steps.

    Raises:
        UnsupportedError: The loss became infinite or NaN.
    """
    groups = [{"params": [p], "lr": RATE * s} for p, s in zip(attachment.parameters(), scales, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    epoch = math.ceil(len(lines) / BATCH)
    window = math.ceil(_WINDOW / epoch) * epoch
    batches, other_batches = _cycle(lines), _cycle(others)
    first = mean_loss(model, lines)
    losses: list[float] = []
    means: list[float] = []
    began = time.perf_counter()
    while len(losses) < max_steps:
        loss = token_loss(model, next(batches))
        optimizer.zero_grad()
        (loss + token_loss(model, next(other_batches))).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss))
        if not math.isfinite(losses[-1]):
            raise UnsupportedError("the training loss is not finite", where=f"step {len(losses)}", found=losses[-1])
        if len(losses) % window:
            continue
        means.append(statistics.fmean(losses[-window:]))
        if len(means) > 2 and means[-2] - means[-1] < _MIN_GAIN * (means[0] - means[-1]):
            break
    seconds = time.perf_counter() - began
    return TrainingResult(len(losses), seconds, first, mean_loss(model, lines))


def _batches(lines: Sequence[Line]) -> Iterator[Sequence[Line]]:
    return (lines[start : start + BATCH] for start in range(0, len(lines), BATCH))


def _cycle(lines: Sequence[Line]) -> Iterator[Sequence[Line]]:
    while True:
        yield from _batches(lines)

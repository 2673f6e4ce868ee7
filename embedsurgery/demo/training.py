"""Losses, the training of the rows, and the measurements that say whether the model uses the word.

Lines are lists of token ids; where a batch has lines of several lengths, the shorter are padded on the right.
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
"""Learning rate, as a part of the root mean square of the table's numbers: tables differ in scale by a hundredfold."""
_WINDOW = 12
_LITTLE = 0.02
_IGNORED = -100


@dataclass(frozen=True)
class Trained:
    """Steps and seconds that the training took, and the mean loss of the lines before and after it."""

    steps: int
    seconds: float
    first_loss: float
    last_loss: float


def encode(tokenizer: Any, lines: Iterable[str]) -> list[list[int]]:
    """The token ids of lines, special tokens as the tokenizer puts them, cut to `MAX_TOKENS`."""
    return [list(tokenizer(line)["input_ids"])[:MAX_TOKENS] for line in lines]


def _batch(lines: Sequence[Line]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, attention mask and targets, int64 (B, T) each."""
    longest = max(map(len, lines))
    ids = torch.zeros(len(lines), longest, dtype=torch.int64)
    mask, targets = torch.zeros_like(ids), torch.full_like(ids, _IGNORED)
    for number, line in enumerate(lines):
        values = torch.tensor(line, dtype=torch.int64)
        ids[number, : len(line)], targets[number, : len(line)] = values, values
        mask[number, : len(line)] = 1
    return ids, mask, targets


def _logits(model: Any, lines: Sequence[Line]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the next tokens, fp32 (B, T-1, V), and these tokens, int64 (B, T-1)."""
    ids, mask, targets = _batch(lines)
    logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits[:, :-1].float(), targets[:, 1:]


def token_loss(model: Any, lines: Sequence[Line]) -> torch.Tensor:
    """Mean cross entropy of the lines' tokens, in nats, with gradients."""
    logits, targets = _logits(model, lines)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=_IGNORED)


@torch.no_grad()
def mean_loss(model: Any, lines: Sequence[Line]) -> float:
    """The same over many lines, batch by batch, without gradients."""
    total, count = 0.0, 0
    for part in _parts(lines):
        logits, targets = _logits(model, part)
        total += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=_IGNORED, reduction="sum"))
        count += int((targets != _IGNORED).sum())
    return total / count


def last_place(line: Line, row: int) -> int:
    """Where a token comes last in a line; 0 where it does not come, or only where nothing predicts it."""
    return max((place for place, token in enumerate(line) if token == row), default=0)


@torch.no_grad()
def measure(model: Any, lines: Sequence[Line], row: int) -> Measure:
    """How the model takes to a token, on lines that have it in them."""
    chances, ranks = [], []
    for part in _parts(lines):
        logits, _ = _logits(model, part)
        for number, line in enumerate(part):
            here = logits[number, last_place(line, row) - 1].softmax(-1)
            chances.append(float(here[row]))
            ranks.append(int((here > here[row]).sum()) + 1)
    return Measure(
        lines=len(lines),
        probability=statistics.fmean(chances),
        rank=statistics.median_high(ranks),
        first=ranks.count(1),
        loss=mean_loss(model, lines),
    )


@torch.no_grad()
def changed_columns(model: Any, attachment: Attachment, lines: Sequence[Line]) -> tuple[int, ...]:
    """Columns of the logits that differ between base and adapter, at any place of the lines."""
    differ: torch.Tensor | None = None
    for part in _parts(lines):
        now, _ = _logits(model, part)
        with attachment.disabled():
            base, _ = _logits(model, part)
        here = (now != base).flatten(0, 1).any(dim=0)
        differ = here if differ is None else differ | here
    return () if differ is None else tuple(torch.nonzero(differ).flatten().tolist())


@torch.no_grad()
def probe(model: Any, lines: Sequence[Line]) -> torch.Tensor:
    """All next-token logits of lines, fp32, as one vector; what padding gives is left out."""
    return torch.cat([_logits(model, [line])[0].flatten() for line in lines])


@torch.no_grad()
def complete(model: Any, tokenizer: Any, prompt: Line, most: int = 24) -> str:
    """How the model goes on from a prompt, greedily, as text without the prompt, on one line."""
    ids = torch.tensor([list(prompt)], dtype=torch.int64)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=most,
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
    most: int,
) -> Trained:
    """Train an attachment's rows until the loss of the lines no longer falls.

    Each step sees lines with the word and as many without it, so that the word is learnt where it belongs and
    nowhere else. The loss is averaged over a window of steps that sees every line equally often; training ends when a
    window adds less than 2% to what the loss has fallen in all.

    Args:
        model: The model that the attachment is on.
        attachment: Whose parameters are trained.
        scales: For each parameter the root mean square of its table.
        lines: Lines with the word.
        others: Lines without it.
        most: Steps at the most.

    Raises:
        UnsupportedError: The loss became infinite or no number.
    """
    groups = [{"params": [p], "lr": RATE * s} for p, s in zip(attachment.parameters(), scales, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    round_of = math.ceil(len(lines) / BATCH)
    window = math.ceil(_WINDOW / round_of) * round_of
    turns, other_turns = _cycle(lines), _cycle(others)
    first = mean_loss(model, lines)
    losses: list[float] = []
    means: list[float] = []
    began = time.perf_counter()
    while len(losses) < most:
        loss = token_loss(model, next(turns))
        optimizer.zero_grad()
        (loss + token_loss(model, next(other_turns))).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss))
        if not math.isfinite(losses[-1]):
            raise UnsupportedError("the loss is no longer a number", where=f"step {len(losses)}", found=losses[-1])
        if len(losses) % window:
            continue
        means.append(statistics.fmean(losses[-window:]))
        if len(means) > 2 and means[-2] - means[-1] < _LITTLE * (means[0] - means[-1]):
            break
    seconds = time.perf_counter() - began
    return Trained(len(losses), seconds, first, mean_loss(model, lines))


def _parts(lines: Sequence[Line]) -> Iterator[Sequence[Line]]:
    return (lines[start : start + BATCH] for start in range(0, len(lines), BATCH))


def _cycle(lines: Sequence[Line]) -> Iterator[Sequence[Line]]:
    while True:
        yield from _parts(lines)

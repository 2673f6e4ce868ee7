"""Token Distillation: trains a new token's row to give the hidden states that its sub-tokens gave.

Dobler, Elliott and de Melo 2026, https://arxiv.org/abs/2505.20133: with every weight frozen, the row of the new token
is trained to minimise the mean squared error between the hidden states of one layer (the last) on a text with the new
token and on the same text with the old ones. Compared are the positions that both have: tokens that end at the same
character, for the word itself its last sub-token. Only the input row is trained this way; the row of an untied head and
its bias stay the mean of the sub-tokens.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import embedsurgery as es
from embedsurgery.adapters.adapter import Adapter
from embedsurgery.errors import ConfigError, UnsupportedError

Progress = Callable[[int, int], None]
"""Called with the number of steps done and the total."""


@dataclass(frozen=True)
class Report:
    """What distillation reached. Similarities are mean cosines of hidden states at the compared positions.

    Attributes:
        tokens: The new tokens.
        texts: Number of texts that were trained on.
        held_out: Number of held-out texts, on which losses and similarities are measured.
        steps: Steps of the optimizer.
        seed: Seed of the order of texts and of the choice of held-out ones.
        loss_before: Mean squared error with the mean of the sub-tokens as row.
        loss_after: Mean squared error with the distilled row.
        similarity_before: Similarity with the mean of the sub-tokens as row.
        similarity_after: Similarity with the distilled row.
    """

    tokens: tuple[str, ...]
    texts: int
    held_out: int
    steps: int
    seed: int
    loss_before: float
    loss_after: float
    similarity_before: float
    similarity_after: float


@dataclass(frozen=True)
class _Pair:
    """A text as new token ids (student) and old ones (teacher), and the positions that are compared."""

    student: list[int]
    teacher: list[int]
    student_positions: list[int]
    teacher_positions: list[int]


def distill(
    model: torch.nn.Module,
    tokenizer: Any,
    tokens: str | Sequence[str],
    texts: Sequence[str],
    *,
    epochs: int = 20,
    batch_size: int = 8,
    learning_rate: float = 0.2,
    layer: int = -1,
    held_out: float = 0.25,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Adapter, Report]:
    """Learn the rows of new tokens from texts that contain them.

    Args:
        model: A transformers model without an attachment. It grows during training, and is restored bit for bit.
        tokenizer: Its fast tokenizer, which is restored too.
        tokens: Texts that become one token each; none may be a token already.
        texts: Texts that contain them. Texts that contain none are skipped.
        epochs: Passes over the texts.
        batch_size: Texts per step.
        learning_rate: Of Adam, relative to the root mean square of the rows at the start; falls linearly to zero.
        layer: The layer whose hidden states are compared: an index into the model's ``hidden_states``.
        held_out: Fraction of the texts that is not trained on, and that the report is measured on.
        seed: Seed of the order of texts and of the choice of held-out ones.
        progress: Called after each step.

    Returns:
        An adapter that brings the tokens with their rows, and a report.

    Raises:
        ConfigError: A token exists already, fewer than two texts contain the tokens, a number is out of range, or
            training diverged.
        UnsupportedError: The tokenizer is a slow one, which gives no offsets.
    """
    contents = [tokens] if isinstance(tokens, str) else list(tokens)
    _check_arguments(tokenizer, texts, epochs, batch_size, learning_rate, layer, held_out)
    before, training = copy.deepcopy(tokenizer), model.training
    ids = es.add_tokens(model, tokenizer, contents, init="subtokens")
    try:
        if ids.new_tokens is None or len(ids.new_tokens.ids) != len(ids):
            raise ConfigError("a token exists already", found=", ".join(map(repr, contents)))
        pairs = _make_pairs(texts, before, tokenizer, set(ids))
        train, test = _split(pairs, set(ids), contents, held_out, seed)
        model.eval()
        config = es.TrainableTokensConfig(token_indices=ids)
        attachment = es.attach(model, config, tokenizer=tokenizer)
        try:
            run = _Comparison(model, layer)
            first = run.measure(test, batch_size)
            steps = run.train(attachment, train, epochs, batch_size, learning_rate, seed, progress)
            last = run.measure(test, batch_size)
            adapter = attachment.adapter()
            if not math.isfinite(last[0]):
                raise ConfigError(
                    "training diverged: the hidden states are not finite",
                    found=f"error {last[0]}",
                    where=f"learning_rate {learning_rate}",
                    hint="lower the learning rate",
                )
        finally:
            attachment.detach()
    finally:
        model.train(training)
        ids.undo()
    report = Report(tuple(contents), len(train), len(test), steps, seed, first[0], last[0], first[1], last[1])
    return adapter, report


def _check_arguments(
    tokenizer: Any,
    texts: Any,
    epochs: object,
    batch_size: object,
    learning_rate: float,
    layer: object,
    held_out: float,
) -> None:
    counts = all(type(count) is int and count > 0 for count in (epochs, batch_size))
    if not counts or type(layer) is not int or not 0 < held_out < 1 or not 0 < learning_rate < math.inf:
        raise ConfigError(
            "number out of range",
            found=f"{epochs}, {batch_size}, {held_out}, {learning_rate}, {layer}",
            expected="whole epochs > 0, whole batch_size > 0, 0 < held_out < 1, finite learning_rate > 0, whole layer",
        )
    listed = isinstance(texts, Sequence) and not isinstance(texts, (str, bytes))
    if not listed or not all(isinstance(text, str) for text in texts):
        raise ConfigError("the texts are not a list of strings", found=repr(texts)[:80], expected="a list of strings")
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedError(
            "a slow tokenizer gives no offsets of its tokens",
            found=type(tokenizer).__name__,
            expected="a fast tokenizer",
            hint="load the fast one",
        )


def _make_pairs(texts: Sequence[str], before: Any, after: Any, ids: set[int]) -> list[_Pair]:
    """Tokenise the texts that contain a new token, with the new and the old tokenizer."""
    pairs = []
    for text in texts:
        student = after(text, return_offsets_mapping=True, truncation=True)
        if not ids & set(student["input_ids"]):
            continue
        teacher = before(text, return_offsets_mapping=True, truncation=True)
        ends = {end: n for n, (start, end) in enumerate(teacher["offset_mapping"]) if end > start}
        positions = [(n, ends[e]) for n, (s, e) in enumerate(student["offset_mapping"]) if e > s and e in ends]
        if not any(student["input_ids"][n] in ids for n, _ in positions):  # truncated within the word
            continue
        special = [[n for n, (s, e) in enumerate(one["offset_mapping"]) if e == s] for one in (student, teacher)]
        if len(special[0]) == len(special[1]):  # tokens such as [CLS] have no characters
            positions += zip(*special, strict=True)
        at = list(zip(*sorted(positions), strict=True))
        pairs.append(_Pair(student["input_ids"], teacher["input_ids"], list(at[0]), list(at[1])))
    return pairs


def _split(
    pairs: list[_Pair], ids: set[int], contents: list[str], held_out: float, seed: int
) -> tuple[list[_Pair], list[_Pair]]:
    """Split the texts into those to train on and held-out ones; the former contain every token."""
    if len(pairs) < 2:
        raise ConfigError(
            "too few texts contain the tokens",
            expected="at least two, better a hundred",
            found=f"{len(pairs)} texts with {', '.join(map(repr, contents))}",
        )
    order = list(pairs)
    random.Random(seed).shuffle(order)  # noqa: S311 - not for secrets
    count = min(max(1, round(len(order) * held_out)), len(order) - 1)
    test, train = order[:count], order[count:]
    seen = {index for pair in train for index in pair.student}
    if not ids <= seen:
        raise ConfigError(
            "no text to train on contains a token",
            found=f"{len(ids - seen)} of {len(ids)} tokens",
            hint="give more texts that contain it",
        )
    return train, test


class _Comparison:
    """Compares hidden states of one layer of a model between the two tokenisations."""

    def __init__(self, model: torch.nn.Module, layer: int) -> None:
        config: Any = getattr(model, "config", None)
        inner: Any = getattr(model, "base_model", model)  # without its head: only hidden states are compared
        self.model = inner.get_encoder() if getattr(config, "is_encoder_decoder", False) else inner
        self.layer = layer
        self.device = next(model.parameters()).device
        self.teacher_states: dict[int, torch.Tensor] = {}  # computed once: they do not depend on the new rows

    def states(self, sequences: list[list[int]], positions: list[list[int]]) -> torch.Tensor:
        """Return the hidden states at some positions of each sequence, concatenated: fp32 (n, D)."""
        width = max(map(len, sequences))
        ids = torch.zeros(len(sequences), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence)] = 1
        output = self.model(
            input_ids=ids.to(self.device), attention_mask=mask.to(self.device), output_hidden_states=True
        )
        layers = len(output.hidden_states)
        if not -layers <= self.layer < layers:
            raise ConfigError(
                "the model has no such layer",
                where=type(self.model).__name__,
                found=self.layer,
                expected=f"{-layers} to {layers - 1}",
            )
        hidden = output.hidden_states[self.layer].float()
        rows = torch.tensor([row for row, columns in enumerate(positions) for _ in columns], device=self.device)
        columns = torch.tensor([column for listed in positions for column in listed], device=self.device)
        selected: torch.Tensor = hidden[rows, columns]
        return selected

    def student(self, batch: list[_Pair]) -> torch.Tensor:
        """Return the hidden states with the new tokens."""
        return self.states([p.student for p in batch], [p.student_positions for p in batch])

    def teacher(self, batch: list[_Pair]) -> torch.Tensor:
        """Return the hidden states with the old tokens."""
        with torch.no_grad():
            for pair in batch:
                if id(pair) not in self.teacher_states:
                    self.teacher_states[id(pair)] = self.states([pair.teacher], [pair.teacher_positions])
        return torch.cat([self.teacher_states[id(pair)] for pair in batch])

    @torch.no_grad()
    def measure(self, pairs: list[_Pair], batch_size: int) -> tuple[float, float]:
        """Return the mean squared error and the mean cosine over all positions."""
        error = cosine = count = 0.0
        for batch in _batches(pairs, batch_size):
            student, teacher = self.student(batch), self.teacher(batch)
            error += float((student - teacher).square().mean(1).sum())
            cosine += float(torch.cosine_similarity(student, teacher).sum())
            count += len(student)
        return error / count, cosine / count

    def train(
        self,
        attachment: Any,
        pairs: list[_Pair],
        epochs: int,
        batch_size: int,
        rate: float,
        seed: int,
        progress: Progress | None,
    ) -> int:
        """Train the attached rows; returns the number of steps."""
        parameters = list(attachment.parameters())
        groups = [{"params": [p], "lr": rate * float(p.detach().float().square().mean().sqrt())} for p in parameters]
        optimizer = torch.optim.Adam(groups)
        order = random.Random(seed)  # noqa: S311 - not for secrets
        total, done = epochs * -(-len(pairs) // batch_size), 0
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
        for _ in range(epochs):
            order.shuffle(pairs)
            for batch in _batches(pairs, batch_size):
                loss = torch.nn.functional.mse_loss(self.student(batch), self.teacher(batch))
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
                done += 1
                if progress is not None:
                    progress(done, total)
        return done


def _batches(pairs: list[_Pair], size: int) -> list[list[_Pair]]:
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]

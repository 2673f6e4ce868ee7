"""Token Distillation: a new token's row is trained until the model's states with it are those with its sub-tokens.

Dobler, Elliott and de Melo 2026, https://arxiv.org/abs/2505.20133: with every weight frozen, the row of the new token
is moved so that the hidden states of a layer (the last one) match, in mean squared error, those that the same text gave
in its old tokens. Compared are the positions that both texts have: every token that ends at the same character, of the
word itself its last sub-token. Only the input row learns from that; the row of an untied head stays the mean
of its sub-tokens, as does what a head's bias has.
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
"""Called with the steps done so far and the steps to do."""


@dataclass(frozen=True)
class Report:
    """What distillation did. Similarities are mean cosines of hidden states at the positions that are compared.

    Attributes:
        tokens: The new tokens.
        texts: How many texts trained.
        held_out: How many texts, none of which trained, the similarities are of.
        steps: Steps of the optimizer.
        seed: Of the order of texts, and of which are held out.
        loss_before: Mean squared error on held-out texts of the mean of sub-tokens.
        loss_after: The same of the distilled rows.
        similarity_before: Of the mean of sub-tokens.
        similarity_after: Of the distilled rows.
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
    """A text in new and in old tokens, and the positions that are compared."""

    student: list[int]
    teacher: list[int]
    at_student: list[int]
    at_teacher: list[int]


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
        model: A transformers model without an attachment. It is grown, trained on and put back bit for bit.
        tokenizer: Its fast tokenizer, put back too.
        tokens: What becomes one token each; none may be one already.
        texts: Where they occur. Texts without any of them are passed over.
        epochs: How often each text is seen.
        batch_size: Texts a step.
        learning_rate: Of Adam, in units of the root mean square of the rows that training starts from; falls to zero.
        layer: Which hidden states are compared: an index into the model's ``hidden_states``.
        held_out: Part of the texts that does not train, and that the report is of.
        seed: Of the order of texts, and of which are held out.
        progress: Called after each step.

    Returns:
        An adapter that brings the tokens with their rows, and what was reached.

    Raises:
        ConfigError: A token that exists, fewer than two texts with the tokens, a number out of range, or rows that
            are no numbers any more.
        UnsupportedError: A slow tokenizer, which does not say where its tokens end.
    """
    contents = [tokens] if isinstance(tokens, str) else list(tokens)
    counts = all(type(count) is int and count > 0 for count in (epochs, batch_size))
    if not counts or type(layer) is not int or not 0 < held_out < 1 or not 0 < learning_rate < math.inf:
        found = f"{epochs}, {batch_size}, {held_out}, {learning_rate}, {layer}"
        raise ConfigError(
            "a number out of range",
            found=found,
            expected="whole epochs > 0, whole batch_size > 0, "
            "0 < held_out < 1, learning_rate > 0 and finite, a whole layer",
        )
    if isinstance(texts, (str, bytes)) or not all(isinstance(text, str) for text in texts):
        raise ConfigError("the texts are no sequence of texts", found=repr(texts)[:80], expected="a list of strings")
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedError(
            "a slow tokenizer does not say where its tokens end",
            found=type(tokenizer).__name__,
            hint="load the fast one",
        )
    before, training = copy.deepcopy(tokenizer), model.training
    ids = es.add_tokens(model, tokenizer, contents, init="subtokens")
    try:
        if ids.new_tokens is None or len(ids.new_tokens.ids) != len(ids):
            raise ConfigError("a token that exists already has nothing to learn", found=", ".join(map(repr, contents)))
        pairs = _pairs(texts, before, tokenizer, set(ids))
        train, test = _split(pairs, set(ids), contents, held_out, seed)
        model.eval()
        config = es.TrainableTokensConfig(token_indices=ids)
        attachment = es.attach(model, config, tokenizer=tokenizer)
        try:
            run = _Run(model, layer)
            first = run.measure(test, batch_size)
            steps = run.train(attachment, train, epochs, batch_size, learning_rate, seed, progress)
            last = run.measure(test, batch_size)
            adapter = attachment.adapter()
            if not math.isfinite(last[0]):
                raise ConfigError(
                    "training ran away: the states are no numbers any more",
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


def _pairs(texts: Sequence[str], before: Any, after: Any, ids: set[int]) -> list[_Pair]:
    """The texts that contain a new token, in both tokenisations."""
    pairs = []
    for text in texts:
        student = after(text, return_offsets_mapping=True, truncation=True)
        if not ids & set(student["input_ids"]):
            continue
        teacher = before(text, return_offsets_mapping=True, truncation=True)
        ends = {end: n for n, (start, end) in enumerate(teacher["offset_mapping"]) if end > start}
        places = [(n, ends[e]) for n, (s, e) in enumerate(student["offset_mapping"]) if e > s and e in ends]
        if not any(student["input_ids"][n] in ids for n, _ in places):  # the old tokens end before the word does
            continue
        special = [[n for n, (s, e) in enumerate(one["offset_mapping"]) if e == s] for one in (student, teacher)]
        if len(special[0]) == len(special[1]):  # [CLS] and the like stand for no character
            places += zip(*special, strict=True)
        at = list(zip(*sorted(places), strict=True))
        pairs.append(_Pair(student["input_ids"], teacher["input_ids"], list(at[0]), list(at[1])))
    return pairs


def _split(
    pairs: list[_Pair], ids: set[int], contents: list[str], held_out: float, seed: int
) -> tuple[list[_Pair], list[_Pair]]:
    """The texts that train, and those that do not; every token is among the first."""
    if len(pairs) < 2:
        raise ConfigError(
            "too few texts with the tokens",
            expected="two at least, better a hundred",
            found=f"{len(pairs)} with {', '.join(map(repr, contents))}",
        )
    order = list(pairs)
    random.Random(seed).shuffle(order)  # noqa: S311 - nothing secret
    count = min(max(1, round(len(order) * held_out)), len(order) - 1)
    test, train = order[:count], order[count:]
    seen = {index for pair in train for index in pair.student}
    if not ids <= seen:
        raise ConfigError(
            "a token is in no text that trains",
            found=f"{len(ids - seen)} of {len(ids)} tokens",
            hint="give more texts with it",
        )
    return train, test


class _Run:
    """Hidden states of one layer of a model, compared between the two tokenisations."""

    def __init__(self, model: torch.nn.Module, layer: int) -> None:
        config: Any = getattr(model, "config", None)
        inner: Any = getattr(model, "base_model", model)  # without a head, which nothing here asks
        self.model = inner.get_encoder() if getattr(config, "is_encoder_decoder", False) else inner
        self.layer = layer
        self.device = next(model.parameters()).device
        self.known: dict[int, torch.Tensor] = {}  # no new row is in the old tokens' states: once is enough

    def states(self, sequences: list[list[int]], places: list[list[int]]) -> torch.Tensor:
        """Hidden states at some positions of each sequence, one after another, fp32 (n, D)."""
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
        rows = torch.tensor([row for row, place in enumerate(places) for _ in place], device=self.device)
        columns = torch.tensor([column for place in places for column in place], device=self.device)
        found: torch.Tensor = hidden[rows, columns]
        return found

    def student(self, batch: list[_Pair]) -> torch.Tensor:
        """What the new tokens give."""
        return self.states([p.student for p in batch], [p.at_student for p in batch])

    def teacher(self, batch: list[_Pair]) -> torch.Tensor:
        """What the old tokens give."""
        with torch.no_grad():
            for pair in batch:
                if id(pair) not in self.known:
                    self.known[id(pair)] = self.states([pair.teacher], [pair.at_teacher])
        return torch.cat([self.known[id(pair)] for pair in batch])

    @torch.no_grad()
    def measure(self, pairs: list[_Pair], batch_size: int) -> tuple[float, float]:
        """Mean squared error, and mean cosine, over all positions."""
        error = cosine = count = 0.0
        for batch in _batches(pairs, batch_size):
            ours, theirs = self.student(batch), self.teacher(batch)
            error += float((ours - theirs).square().mean(1).sum())
            cosine += float(torch.cosine_similarity(ours, theirs).sum())
            count += len(ours)
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
        """Train the attached rows; returns how many steps that took."""
        parameters = list(attachment.parameters())
        groups = [{"params": [p], "lr": rate * float(p.detach().float().square().mean().sqrt())} for p in parameters]
        optimizer = torch.optim.Adam(groups)
        order = random.Random(seed)  # noqa: S311 - nothing secret
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

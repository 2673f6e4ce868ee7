"""Teach a real trained encoder a word: train one row, save it in kilobytes, merge it and unmerge it.

The numbers are cosines on held-out sentences: a sentence with the word against the same sentence with the word's
description, as the base model embeds it. Measured (CPU, float32, torch 2.13), mean and minimum
of ten: 0.537 and 0.309 when the tokenizer splits the word, 0.605 and 0.389 with the untrained row, 0.931 and 0.914 with
the trained row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import embedsurgery as es
from tests.support import real_encoder as real
from tests.support.real_encoder import (
    HELD_OUT,
    MEANING,
    OTHER_MEANINGS,
    ROW,
    TRAINING,
    WITHOUT_THE_WORD,
    WORD,
    embed,
    fill,
)

TABLE = "embeddings.word_embeddings.weight"
MIXED = [*fill(HELD_OUT, WORD), *WITHOUT_THE_WORD]
"""Both kinds of sentence in one batch; the last ``len(WITHOUT_THE_WORD)`` are without the word."""
OTHERS = slice(len(HELD_OUT), None)


@dataclass(frozen=True)
class Taught:
    """The trained encoder that the tests share. Embeddings are float32 (sentences, 384), without gradients.

    Attributes:
        base: The package's own directory.
        before: Its files' hashes at the start.
        model: The model with the trained row attached.
        attachment: That attachment.
        splitting: The package's tokenizer, which splits the word.
        tokenizer: The tokenizer that has the word as one token.
        table: A copy of the base's table.
        untrained: `MIXED` on the base, with the unused row as it is.
        split: The held-out sentences with the word, as the package's tokenizer splits it.
        meaning: The held-out sentences with the description, on the base.
        others: The same for each of `OTHER_MEANINGS`.
        trained: `MIXED` on the attached model.
        adapter: The directory of the saved adapter.
        merged: The directory of the merged checkpoint.
    """

    base: Path
    before: dict[str, str]
    model: Any
    attachment: Any
    splitting: Any
    tokenizer: Any
    table: torch.Tensor
    untrained: torch.Tensor
    split: torch.Tensor
    meaning: torch.Tensor
    others: torch.Tensor
    trained: torch.Tensor
    adapter: Path
    merged: Path


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def taught(_one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Taught:
    folder = tmp_path_factory.mktemp("real_encoder")
    base = real.model_directory()
    before = real.hashes(base)
    model = real.load_model(base)
    splitting = AutoTokenizer.from_pretrained(base)
    tokenizer = real.tokenizer_with_word(base, folder / "tokenizer")
    table = model.embeddings.word_embeddings.weight.detach().clone()
    with torch.no_grad():
        target = embed(model, tokenizer, fill(TRAINING, MEANING))
        untrained = embed(model, tokenizer, MIXED)
        split = embed(model, splitting, fill(HELD_OUT, WORD))
        meaning = embed(model, splitting, fill(HELD_OUT, MEANING))
        others = torch.stack([embed(model, splitting, fill(HELD_OUT, other)) for other in OTHER_MEANINGS])

    attachment = es.attach(model, es.TrainableTokensConfig([ROW]), tokenizer=tokenizer)
    real.train(model, tokenizer, attachment.parameters(), target)

    with torch.no_grad():
        trained = embed(model, tokenizer, MIXED)
    attachment.adapter().save(folder / WORD)
    es.merge_checkpoint(base, folder / WORD, folder / "merged")
    return Taught(
        base,
        before,
        model,
        attachment,
        splitting,
        tokenizer,
        table,
        untrained,
        split,
        meaning,
        others,
        trained,
        folder / WORD,
        folder / "merged",
    )


def _cosines(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one * other).sum(-1)


def test_the_word_is_one_token_only_where_it_was_named(taught: Taught) -> None:
    assert taught.splitting.tokenize(WORD) == ["ha", "##kur", "##ei"]
    assert taught.tokenizer(f"The {WORD.title()}, two {WORD}s.", add_special_tokens=False)["input_ids"] == [
        *taught.splitting.convert_tokens_to_ids(["the"]),
        ROW,
        *taught.splitting.convert_tokens_to_ids([",", "two"]),
        ROW,
        *taught.splitting.convert_tokens_to_ids(["##s", "."]),
    ]
    for sentence in [*WITHOUT_THE_WORD, *fill(HELD_OUT, MEANING)]:
        ids = taught.tokenizer(sentence)["input_ids"]
        assert ids == taught.splitting(sentence)["input_ids"]
        assert ROW not in ids


def test_held_out_sentences_come_closer_to_their_description(taught: Taught) -> None:
    split = _cosines(taught.split, taught.meaning)
    untrained = _cosines(taught.untrained[: len(HELD_OUT)], taught.meaning)
    trained = _cosines(taught.trained[: len(HELD_OUT)], taught.meaning)
    assert split.mean() < 0.58
    assert untrained.mean() < 0.65
    assert trained.mean() > 0.90
    assert trained.min() > 0.87
    assert (trained - untrained).min() > 0.13  # measured 0.185
    assert (trained - split).min() > 0.16  # measured 0.221


def test_the_word_means_this_and_nothing_near_it(taught: Taught) -> None:
    trained = taught.trained[: len(HELD_OUT)]
    nearest_other = _cosines(trained, taught.others).amax(0)
    assert (_cosines(trained, taught.meaning) - nearest_other).min() > 0.04  # measured 0.070
    split_is_wrong = _cosines(taught.split, taught.others).amax(0) > _cosines(taught.split, taught.meaning)
    assert split_is_wrong.sum() >= 8  # measured 10 of 10


def test_only_one_row_was_trained_and_the_base_is_untouched(taught: Taught) -> None:
    trainable = [p for p in taught.model.parameters() if p.requires_grad]
    assert [p.shape for p in trainable] == [(1, 384)]
    assert torch.equal(taught.model.state_dict()[TABLE], taught.table)
    with torch.no_grad(), taught.attachment.disabled():
        assert torch.equal(embed(taught.model, taught.tokenizer, MIXED), taught.untrained)


def test_the_adapter_is_kilobytes_and_loads_on_a_fresh_model(taught: Taught) -> None:
    assert sum(path.stat().st_size for path in taught.adapter.iterdir()) < 5_000
    adapter = es.load(taught.adapter)
    assert adapter.manifest.tokens == {ROW: WORD}
    fresh = real.load_model(taught.base)
    es.attach(fresh, adapter)
    with torch.no_grad():
        assert torch.equal(embed(fresh, taught.tokenizer, MIXED), taught.trained)


def test_merged_on_disk_and_reloaded_it_embeds_the_same_bits(taught: Taught) -> None:
    merged = real.load_model(taught.merged)
    with torch.no_grad():
        assert torch.equal(embed(merged, taught.tokenizer, MIXED), taught.trained)
    taught.attachment.merge()
    try:
        in_memory = taught.model.state_dict()
        assert {name: torch.equal(in_memory[name], tensor) for name, tensor in merged.state_dict().items()} == (
            dict.fromkeys(in_memory, True)
        )
    finally:
        taught.attachment.unmerge()
    assert torch.equal(taught.model.state_dict()[TABLE], taught.table)


def test_the_merged_checkpoint_is_sound(taught: Taught) -> None:
    checks = es.verify_checkpoint(taught.merged)
    assert {"tables", "config", "tokenizer", "merge 1"} <= {check.name for check in checks}
    assert [check for check in checks if not check.ok] == []


def test_other_sentences_keep_their_bits(taught: Taught) -> None:
    merged = real.load_model(taught.merged)
    with torch.no_grad():
        alone = embed(merged, taught.tokenizer, WITHOUT_THE_WORD)
        with taught.attachment.disabled():
            base_alone = embed(taught.model, taught.tokenizer, WITHOUT_THE_WORD)
        attached_alone = embed(taught.model, taught.tokenizer, WITHOUT_THE_WORD)
        mixed = embed(merged, taught.tokenizer, MIXED)
    assert torch.equal(attached_alone, base_alone)
    assert torch.equal(alone, base_alone)
    assert torch.equal(taught.trained[OTHERS], taught.untrained[OTHERS])
    assert torch.equal(mixed[OTHERS], taught.untrained[OTHERS])
    assert not torch.equal(mixed[: OTHERS.start], taught.untrained[: OTHERS.start])


def test_merging_writes_the_bytes_of_one_row_and_nothing_else(taught: Taught) -> None:
    after = real.hashes(taught.merged)
    added = {name for name in after if name not in taught.before}
    assert added
    assert all(name.startswith(".embedsurgery/") for name in added)
    assert {name for name in taught.before if after[name] != taught.before[name]} == {"model.safetensors"}

    old, new = (np.memmap(directory / "model.safetensors", np.uint8, "r") for directory in (taught.base, taught.merged))
    data = 8 + int.from_bytes(old[:8].tobytes(), "little")
    row_bytes = 384 * 4
    begin = data + json.loads(old[8:data].tobytes())[TABLE]["data_offsets"][0] + ROW * row_bytes
    changed = np.flatnonzero(old != new)
    assert old.shape == new.shape
    assert 0 < len(changed) <= row_bytes
    assert begin <= changed[0]
    assert changed[-1] < begin + row_bytes


def test_unmerged_every_file_hashes_as_in_the_package(taught: Taught, tmp_path: Path) -> None:
    es.unmerge_checkpoint(taught.merged, tmp_path / "unmerged")
    assert real.hashes(tmp_path / "unmerged") == taught.before
    assert real.hashes(taught.base) == taught.before

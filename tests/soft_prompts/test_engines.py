"""The baked checkpoint through an engine that knows nothing of soft prompts, and reads no generation config."""

from __future__ import annotations

from pathlib import Path

import ctranslate2
import pytest
import torch

import embedsurgery as es
from tests.soft_prompts.baked import TEXTS, greedy, start


@pytest.mark.parametrize("kind", ["llama-tied", "llama-untied", "gpt2"])
def test_ctranslate2_gives_the_same_greedy_tokens(kind: str, tmp_path: Path) -> None:
    begun = start(kind, tmp_path)
    report = es.merge_checkpoint(begun.folder, begun.adapter, tmp_path / "out")
    ctranslate2.converters.TransformersConverter(str(tmp_path / "out")).convert(str(tmp_path / "converted"))
    engine = ctranslate2.Generator(str(tmp_path / "converted"), device="cpu", compute_type="float32", intra_threads=1)
    tokenizer, attached = begun.tokenizer(tmp_path / "out"), begun.attached()
    for text in TEXTS:
        pieces = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
        (found,) = engine.generate_batch([pieces], max_length=40, min_length=40, sampling_topk=1,
                                         include_prompt_in_result=False)  # fmt: skip
        ids = torch.tensor([begun.tokenizer()(text).input_ids])
        assert found.sequences_ids[0] == greedy(attached, ids, 40)
        assert set(report.tokens.values()).isdisjoint(found.sequences_ids[0])

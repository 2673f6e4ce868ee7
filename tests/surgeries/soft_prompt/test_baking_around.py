"""Baking beside the prompt's rows: rows that pad a table, the generation config, truncated and padded texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import embedsurgery as es
from tests.support.baked import TEXTS, N, greedy, start
from tests.support.comparing import contents, state_bits


@pytest.mark.parametrize(
    ("kind", "spare"),
    [
        ("llama-tied", 3),
        ("llama-untied", 0),
        ("bart", 3),
        *(pytest.param(*one, marks=pytest.mark.sweep) for one in (("llama-tied", 0), ("llama-untied", 3), ("bart", 0))),
    ],
)
def test_a_table_that_grows_to_a_multiple(kind: str, spare: int, tmp_path: Path) -> None:
    """Rows that only pad it are never generated, either."""
    begun = start(kind, tmp_path, spare=spare)
    before = contents(begun.folder)
    bake = es.BakeConfig(pad_to_multiple_of=64)
    report = es.merge_checkpoint(begun.folder, begun.adapter, tmp_path / "out", bake=bake)
    model = begun.model(tmp_path / "out")
    size = model.get_input_embeddings().weight.shape[0]
    assert size == -(-begun.rows // 64) * 64
    assert model.get_output_embeddings().weight.shape[0] == model.config.vocab_size == size
    first = begun.rows - spare
    assert list(report.tokens.values()) == list(range(first, first + N))
    assert model.generation_config.suppress_tokens == [
        *range(first, first + N),
        *range(max(begun.rows, first + N), size),
    ]
    base, ids = (begun.tokenizer(f)(TEXTS[0], return_tensors="pt").input_ids for f in (None, tmp_path / "out"))
    assert greedy(model, ids) == greedy(begun.attached(), base)
    target, tokenizer = begun.model(), begun.tokenizer()
    undo = es.merge(target, begun.adapter, tokenizer, bake=bake)
    assert state_bits(target) == state_bits(model)
    es.unmerge(target, undo)
    es.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == before


@pytest.mark.parametrize("given", ["no file", "nothing", "some", "others"])
def test_the_generation_config_keeps_its_other_values(given: str, tmp_path: Path) -> None:
    begun = start("llama-tied", tmp_path)
    path = begun.folder / "generation_config.json"
    if given == "no file":
        path.unlink()
    else:
        more = {"some": {"suppress_tokens": [7, 9]}, "others": {"suppress_tokens": None, "top_k": 3}}.get(given, {})
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    before = contents(begun.folder)
    report = es.merge_checkpoint(begun.folder, begun.adapter, tmp_path / "out")
    after = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert after["suppress_tokens"] == [*([7, 9] if given == "some" else []), *report.tokens.values()]
    assert after.get("top_k") == (3 if given == "others" else None)
    assert begun.model(tmp_path / "out").generation_config.suppress_tokens == after["suppress_tokens"]
    es.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == before


def test_a_truncated_text_keeps_the_prompt(tmp_path: Path) -> None:
    begun = start("llama-tied", tmp_path)
    report = es.merge_checkpoint(begun.folder, begun.adapter, tmp_path / "out")
    tokenizer, base = begun.tokenizer(tmp_path / "out"), begun.tokenizer()
    virtual = list(report.tokens.values())
    found = tokenizer("the quick brown fox answers", truncation=True, max_length=N + 4).input_ids
    assert found == [*virtual, *base("the quick brown fox answers", truncation=True, max_length=4).input_ids]
    tokenizer.pad_token = tokenizer.eos_token
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer(["hello world", "a"], padding=True)
        for text, ids, mask in zip(("hello world", "a"), batch.input_ids, batch.attention_mask, strict=True):
            assert [i for i, real in zip(ids, mask, strict=True) if real] == [*virtual, *base(text).input_ids]

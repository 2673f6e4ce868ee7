"""What cannot be baked is refused by name, before anything changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr

import embedsurgery as es
from embedsurgery.errors import (
    BaseMismatchError,
    CheckpointError,
    ConfigError,
    EmbedSurgeryError,
    PlanError,
    TableError,
    UnsupportedError,
)
from embedsurgery.graph.config import position_limit
from tests.support.baked import Start, model_of, random_prompt, start
from tests.support.comparing import contents, state_bits
from tests.support.processes import cli


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Start:
    return start("llama-tied", tmp_path_factory.mktemp("base"))


def refused(begun: Start, error: type[EmbedSurgeryError], match: str, adapter: es.Adapter, **options: Any) -> None:
    """On disk and in memory, and nothing is left behind."""
    before = contents(begun.folder)
    out = begun.folder.parent / "never"
    bake = es.BakeConfig(**options)
    with pytest.raises(error, match=match):
        es.merge_checkpoint(begun.folder, adapter, out, bake=bake)
    assert not out.exists()
    assert contents(begun.folder) == before
    model, tokenizer = begun.model(), begun.tokenizer()
    bits, vocabulary, text = state_bits(model), tokenizer.get_vocab(), tokenizer._tokenizer.to_str()
    with pytest.raises(error, match=match):
        es.merge(model, adapter, tokenizer, bake=bake)
    assert state_bits(model) == bits
    assert tokenizer.get_vocab() == vocabulary
    assert tokenizer._tokenizer.to_str() == text


def test_too_long_for_the_models_positions(begun: Start) -> None:
    long = random_prompt(model_of("llama-tied", begun.rows), 20)
    short = replace(long, manifest=replace(long.manifest, config={**long.manifest.config, "num_virtual_tokens": 160}))
    rows = long.raw["prompt_embeddings"]
    many = replace(short, raw={"prompt_embeddings": rows.take([n % 20 for n in range(160)])})
    refused(begun, UnsupportedError, "no position.*fewer than 160 virtual tokens.*160", many)


def test_a_base_of_another_width_or_with_other_rows(begun: Start) -> None:
    config = tr.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=begun.rows
    )
    refused(begun, BaseMismatchError, "another width.*expected 8, found 16", random_prompt(tr.LlamaForCausalLM(config)))
    same = random_prompt(model_of("llama-tied", begun.rows, seed=5))
    refused(begun, BaseMismatchError, "rows are not those", same)


def test_a_file_of_pefts_for_another_width(begun: Start, tmp_path: Path) -> None:
    import json

    from safetensors.torch import save_file

    save_file({"prompt_embeddings": torch.zeros(3, 24)}, tmp_path / "adapter_model.safetensors")
    config = {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": 3,
        "token_dim": 24,
        "task_type": "CAUSAL_LM",
        "num_transformer_submodules": 1,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    refused(begun, BaseMismatchError, "another width.*expected 24.*found 16", es.load(tmp_path))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "PREFIX_TUNING"}))
    with pytest.raises(EmbedSurgeryError, match="PREFIX_TUNING"):
        es.load(tmp_path)
    done = cli("merge", begun.folder, tmp_path, "-o", tmp_path / "out")
    assert done.returncode == 1
    assert "PREFIX_TUNING" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::embedsurgery.errors.EmbedSurgeryWarning")
def test_a_model_without_input_embeddings(begun: Start, tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 4)
    with pytest.raises(BaseMismatchError, match="found no table"):
        es.merge(model, begun.adapter, begun.tokenizer())
    with pytest.raises(TableError, match="no embedding table"):
        es.attach(model, es.SoftPromptConfig(3))


def test_numbers_that_are_none(begun: Start) -> None:
    rows = begun.adapter.raw["prompt_embeddings"]
    broken = replace(begun.adapter, raw={"prompt_embeddings": replace(rows, data=b"\xff" * len(rows.data))})
    refused(begun, UnsupportedError, "NaN or infinity", broken)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_prompt_for_a_decoder(kind: str, tmp_path: Path) -> None:
    two = start(kind, tmp_path)
    for submodules in (["decoder"], ["encoder", "decoder"]):
        adapter = random_prompt(two.model(), 3, submodules=submodules)
        refused(two, UnsupportedError, "prompt for the decoder cannot become text", adapter)


@pytest.mark.parametrize("task", ["SequenceClassification", "QuestionAnswering"])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_text_that_the_decoder_reads_too(kind: str, task: str, tmp_path: Path) -> None:
    from tests.support.baked import tokenizer_of

    tokenizer = tokenizer_of(kind)
    config = model_of(kind, max(tokenizer.get_vocab().values()) + 1).config
    config.num_labels = 2
    model = getattr(tr, f"{'T5' if kind == 't5' else 'Bart'}For{task}")(config)
    adapter = random_prompt(model, 3)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(UnsupportedError, match="gives its text to the decoder too"):
        es.merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out")
    with pytest.raises(UnsupportedError, match="gives its text to the decoder too"):
        es.merge(model, adapter, tokenizer)


def test_merging_where_it_is_attached_names_the_way(begun: Start) -> None:
    model = begun.attached()
    before = state_bits(model)
    with pytest.raises(UnsupportedError, match=r"embedsurgery\.merge or merge_checkpoint makes tokens of it"):
        es.get_attachment(model).merge()
    assert state_bits(model) == before


def test_whispers_only_text_is_its_decoders() -> None:
    from tests.support.prompt_models import tiny
    from tests.support.tokenizers import KINDS

    model = tiny("whisper")
    adapter = random_prompt(model, 3)
    with pytest.raises(UnsupportedError, match="prompt for the decoder cannot become text"):
        es.merge(model, adapter, KINDS["llama-2"].build())


def test_markers_that_are_there_already(begun: Start, tmp_path: Path) -> None:
    es.merge_checkpoint(begun.folder, begun.adapter, tmp_path / "once", bake=es.BakeConfig(name="poet"))
    again = replace(begun, folder=tmp_path / "once")
    refused(again, EmbedSurgeryError, "already", begun.adapter, name="poet")
    refused(again, PlanError, "virtual tokens of this name already", random_prompt(begun.model(), 2, 9), name="poet")
    refused(
        again,
        PlanError,
        "another soft prompt stands before every text",
        random_prompt(begun.model(), 2, 9),
        name="b",
        prefix="all",
    )
    template = begun.folder / "chat_template.jinja"
    template.write_text("<|soft:poet:0|>{{ messages }}")
    try:
        refused(begun, PlanError, "holds this marker already", begun.adapter, name="poet")
    finally:
        template.unlink()


def test_no_tokenizer(begun: Start, tmp_path: Path) -> None:
    model = begun.model()
    with pytest.raises(ConfigError, match="no tokenizer"):
        es.merge(model, begun.adapter)
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(CheckpointError, match="no tokenizer"):
        es.merge_checkpoint(tmp_path / "bare", begun.adapter, tmp_path / "out")


def test_a_slow_tokenizer_takes_markers_and_no_prefix(tmp_path: Path) -> None:
    tokenizer = tr.ByT5Tokenizer()
    model = model_of("t5", max(tokenizer.get_vocab().values()) + 1)
    adapter, before = random_prompt(model, 3), state_bits(model)
    with pytest.raises(UnsupportedError, match="slow tokenizer has no post-processor"):
        es.merge(model, adapter, tokenizer)
    assert state_bits(model) == before
    undo = es.merge(model, adapter, tokenizer, bake=es.BakeConfig(prefix="none", name="poet"))
    ids = tokenizer(undo.facts["prompt"]["text"] + "ab", add_special_tokens=False).input_ids
    assert ids[:3] == undo.facts["prompt"]["ids"]
    es.unmerge(model, undo)
    assert state_bits(model) == before


def test_a_config_that_is_none(begun: Start) -> None:
    for options in ({"name": "a b"}, {"prefix": "back"}, {"tied": "cut"}, {"after_bos": 1}, {"pad_to_multiple_of": 0}):
        with pytest.raises(ConfigError):
            es.BakeConfig(**options)
    with pytest.raises(ConfigError, match="bake options"):
        es.merge_checkpoint(begun.folder, begun.adapter, None, bake=[es.BakeConfig()] * 2, dry_run=True)


def test_position_limits() -> None:
    assert position_limit(tr.GPT2Config(n_positions=77)) == 77
    assert position_limit({"text_config": {"max_position_embeddings": 5}, "vision_config": {"n_ctx": 1}}) == 5
    assert position_limit(tr.T5Config()) is None
    assert position_limit(None) is None

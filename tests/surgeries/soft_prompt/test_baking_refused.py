"""Prompts that cannot be baked are refused before anything is changed."""

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
from tests.support.errors import raises
from tests.support.processes import cli

TABLE = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Start:
    return start("llama-tied", tmp_path_factory.mktemp("base"))


def check_refused(
    begun: Start,
    error: type[EmbedSurgeryError],
    fields: dict[str, Any],
    adapter: es.Adapter,
    *,
    on_disk: tuple[type[EmbedSurgeryError], dict[str, Any]] | None = None,
    **options: Any,
) -> None:
    """Check that baking is refused, on disk and in memory, and changes nothing."""
    before = contents(begun.folder)
    out = begun.folder.parent / "never"
    bake = es.BakeConfig(**options)
    disk_error, disk_fields = on_disk or (error, fields)
    with raises(disk_error, **disk_fields):
        es.merge_checkpoint(begun.folder, adapter, out, bake=bake)
    assert not out.exists()
    assert contents(begun.folder) == before
    model, tokenizer = begun.model(), begun.tokenizer()
    bits, vocabulary, text = state_bits(model), tokenizer.get_vocab(), tokenizer._tokenizer.to_str()
    with raises(error, **fields):
        es.merge(model, adapter, tokenizer, bake=bake)
    assert state_bits(model) == bits
    assert tokenizer.get_vocab() == vocabulary
    assert tokenizer._tokenizer.to_str() == text


def test_too_long_for_the_models_positions(begun: Start) -> None:
    long = random_prompt(model_of("llama-tied", begun.rows), 20)
    short = replace(long, manifest=replace(long.manifest, config={**long.manifest.config, "num_virtual_tokens": 160}))
    rows = long.raw["prompt_embeddings"]
    many = replace(short, raw={"prompt_embeddings": rows.take([n % 20 for n in range(160)])})
    check_refused(begun, UnsupportedError, {"expected": "fewer than 160", "found": 160}, many)


def test_a_base_of_another_width_or_with_other_rows(begun: Start) -> None:
    config = tr.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=begun.rows
    )
    narrow = random_prompt(tr.LlamaForCausalLM(config))
    check_refused(begun, BaseMismatchError, {"where": TABLE, "expected": 8, "found": 16}, narrow)
    same = random_prompt(model_of("llama-tied", begun.rows, seed=5))
    check_refused(begun, BaseMismatchError, {"where": (TABLE, "rows"), "expected": "sha256"}, same)


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
    check_refused(begun, BaseMismatchError, {"where": TABLE, "expected": 24, "found": 16}, es.load(tmp_path))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "PREFIX_TUNING"}))
    with raises(UnsupportedError, where="adapter_config.json", found="PREFIX_TUNING"):
        es.load(tmp_path)
    done = cli("merge", begun.folder, tmp_path, "-o", tmp_path / "out")
    assert done.returncode == 1
    assert "PREFIX_TUNING" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::embedsurgery.errors.EmbedSurgeryWarning")
def test_a_model_without_input_embeddings(begun: Start, tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 4)
    with raises(BaseMismatchError, expected=TABLE, found="no table"):
        es.merge(model, begun.adapter, begun.tokenizer())
    with raises(TableError, expected=None, hint=None):
        es.attach(model, es.SoftPromptConfig(3))


def test_values_that_are_not_finite(begun: Start) -> None:
    rows = begun.adapter.raw["prompt_embeddings"]
    broken = replace(begun.adapter, raw={"prompt_embeddings": replace(rows, data=b"\xff" * len(rows.data))})
    check_refused(begun, UnsupportedError, {"where": "soft_prompt", "found": "NaN"}, broken)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_prompt_for_a_decoder(kind: str, tmp_path: Path) -> None:
    two = start(kind, tmp_path)
    for submodules in (["decoder"], ["encoder", "decoder"]):
        adapter = random_prompt(two.model(), 3, submodules=submodules)
        check_refused(two, UnsupportedError, {"expected": "encoder", "found": "decoder"}, adapter)


@pytest.mark.parametrize("task", ["SequenceClassification", "QuestionAnswering"])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_text_that_the_decoder_reads_as_well(kind: str, task: str, tmp_path: Path) -> None:
    from tests.support.baked import tokenizer_of

    tokenizer = tokenizer_of(kind)
    config = model_of(kind, max(tokenizer.get_vocab().values()) + 1).config
    config.num_labels = 2
    model = getattr(tr, f"{'T5' if kind == 't5' else 'Bart'}For{task}")(config)
    adapter = random_prompt(model, 3)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    task_type = {"SequenceClassification": "SEQ_CLS", "QuestionAnswering": "QUESTION_ANS"}[task]
    with raises(UnsupportedError, where="base", found=task_type):
        es.merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out")
    with raises(UnsupportedError, found=task_type):
        es.merge(model, adapter, tokenizer)


def test_merging_an_attached_prompt_names_the_way_out(begun: Start) -> None:
    model = begun.attached()
    before = state_bits(model)
    with raises(UnsupportedError, where="soft_prompt", hint=("embedsurgery.merge", "merge_checkpoint")):
        es.get_attachment(model).merge()
    assert state_bits(model) == before


def test_whispers_only_text_is_its_decoders() -> None:
    from tests.support.prompt_models import tiny
    from tests.support.tokenizers import KINDS

    model = tiny("whisper")
    adapter = random_prompt(model, 3)
    with raises(UnsupportedError, expected="encoder", found="decoder"):
        es.merge(model, adapter, KINDS["llama-2"].build())


def test_markers_that_exist_already(begun: Start, tmp_path: Path) -> None:
    es.merge_checkpoint(begun.folder, begun.adapter, tmp_path / "once", bake=es.BakeConfig(name="poet"))
    again = replace(begun, folder=tmp_path / "once")
    taken = {"found": "<|soft:poet:0|>", "hint": "name"}
    merged = (BaseMismatchError, {"where": "once", "found": "0001", "hint": "unmerge"})
    check_refused(again, PlanError, taken, begun.adapter, on_disk=merged, name="poet")
    check_refused(again, PlanError, taken, random_prompt(begun.model(), 2, 9), name="poet")
    check_refused(
        again,
        PlanError,
        {"where": "post-processor", "found": "<|soft:", "hint": "prefix='none'"},
        random_prompt(begun.model(), 2, 9),
        name="b",
        prefix="all",
    )
    template = begun.folder / "chat_template.jinja"
    template.write_text("<|soft:poet:0|>{{ messages }}")
    try:
        fields = {"where": "chat template 1", "found": "<|soft:poet:0|>"}
        check_refused(begun, PlanError, fields, begun.adapter, name="poet")
    finally:
        template.unlink()


def test_no_tokenizer(begun: Start, tmp_path: Path) -> None:
    model = begun.model()
    with raises(ConfigError, found="none", hint="tokenizer="):
        es.merge(model, begun.adapter)
    model.save_pretrained(tmp_path / "bare")
    with raises(CheckpointError, where=tmp_path / "bare", expected="tokenizer.json"):
        es.merge_checkpoint(tmp_path / "bare", begun.adapter, tmp_path / "out")


def test_a_slow_tokenizer_gets_markers_but_no_prefix(tmp_path: Path) -> None:
    tokenizer = tr.ByT5Tokenizer()
    model = model_of("t5", max(tokenizer.get_vocab().values()) + 1)
    adapter, before = random_prompt(model, 3), state_bits(model)
    with raises(UnsupportedError, found="ByT5Tokenizer"):
        es.merge(model, adapter, tokenizer)
    assert state_bits(model) == before
    undo = es.merge(model, adapter, tokenizer, bake=es.BakeConfig(prefix="none", name="poet"))
    ids = tokenizer(undo.facts["prompt"]["text"] + "ab", add_special_tokens=False).input_ids
    assert ids[:3] == undo.facts["prompt"]["ids"]
    es.unmerge(model, undo)
    assert state_bits(model) == before


def test_invalid_options(begun: Start) -> None:
    for name, value, expected in (
        ("name", "a b", "letters"),
        ("prefix", "back", "all, text, chat, none"),
        ("tied", "cut", "untie or keep"),
        ("after_bos", 1, "True or False"),
        ("pad_to_multiple_of", 0, "positive integer"),
    ):
        with raises(ConfigError, what=name, expected=expected, found=repr(value)):
            es.BakeConfig(**{name: value})
    with raises(ConfigError, expected=1, found=2):
        es.merge_checkpoint(begun.folder, begun.adapter, None, bake=[es.BakeConfig()] * 2, dry_run=True)


def test_position_limits() -> None:
    assert position_limit(tr.GPT2Config(n_positions=77)) == 77
    assert position_limit({"text_config": {"max_position_embeddings": 5}, "vision_config": {"n_ctx": 1}}) == 5
    assert position_limit(tr.T5Config()) is None
    assert position_limit(None) is None

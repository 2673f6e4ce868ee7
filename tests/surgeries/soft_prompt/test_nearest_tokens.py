"""Nearest tokens and norms of a soft prompt, and the lookup's scale, which vectors are divided by."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tr

import embedsurgery as es
from embedsurgery.hub.card import adapter_body
from embedsurgery.stores.shards import ShardStore
from embedsurgery.surgeries.soft_prompt import nearest_tokens as reading
from embedsurgery.surgeries.soft_prompt.lookup_scale import scale_of
from tests.support.baked import Start, start
from tests.support.processes import cli, python


@pytest.fixture(scope="module", params=["gemma3", "gpt2"])
def begun(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Start:
    made = start(request.param, tmp_path_factory.mktemp(request.param), dtype=torch.bfloat16, spare=7)
    made.adapter.save(made.folder.parent / "poet")
    return made


def test_nearest_tokens_are_those_of_a_full_comparison(begun: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ShardStore.open(begun.folder)
    table = store.graph.main_input()
    lookup = begun.model().get_input_embeddings().weight.detach().float()
    prompt = begun.adapter.tensors["prompt_embeddings"]
    cosines = torch.nn.functional.cosine_similarity(prompt[:, None], lookup[None], dim=-1)
    scale = scale_of(table, store.config)
    assert scale is not None
    divided = scale.in_dtype("BF16")
    monkeypatch.setattr(reading, "_CHUNK", 17)
    found = reading.compare_prompt(prompt.numpy(), store, table, scale=divided, most=4)
    for token, row, vector in zip(found.tokens, cosines, prompt, strict=True):
        best = row.topk(4)
        assert [near.id for near in token.nearest] == best.indices.tolist()
        assert np.allclose([near.cosine for near in token.nearest], best.values, atol=1e-5)
        assert token.norm == pytest.approx(vector.norm().item() / divided, rel=1e-5)
    norms = lookup.norm(dim=1)
    assert found.mean_norm == pytest.approx(norms.mean().item(), rel=1e-5)
    assert (found.min_norm, found.max_norm) == pytest.approx((norms.min().item(), norms.max().item()), rel=1e-5)


def test_show_names_tokens_without_torch(begun: Start) -> None:
    poet = begun.folder.parent / "poet"
    done = cli("show", poet, "--model", begun.folder, "--json")
    assert done.returncode == 0, done.stderr
    (prompt,) = json.loads(done.stdout)["prompts"]
    texts = set(begun.tokenizer().get_vocab())
    assert len(prompt["tokens"]) == 5
    assert all(near["text"] in texts for token in prompt["tokens"] for near in token["nearest"])
    assert prompt["vocabulary"]["least"] <= prompt["vocabulary"]["mean"] <= prompt["vocabulary"]["greatest"]
    shown = cli("show", poet, "--model", begun.folder)
    assert all(f"({token['nearest'][0]['cosine']:.2f})" in shown.stdout for token in prompt["tokens"])
    assert cli("show", poet).returncode == 0
    code = (
        "import sys; from pathlib import Path; from embedsurgery.cli.show import show; "
        "show(Path(sys.argv[1]), Path(sys.argv[2])); assert 'torch' not in sys.modules"
    )
    assert python(code, poet, begun.folder).returncode == 0


def test_the_card_names_tokens_if_the_base_is_given(begun: Start) -> None:
    beside = adapter_body(begun.adapter, "team/poet", 1, begun.folder)
    assert "Virtual tokens: 5" in beside
    assert beside.count(", near `") == 5
    alone = adapter_body(begun.adapter, "team/poet", 1)
    assert "- 4: norm" in alone
    assert ", near" not in alone


def test_the_command_line_bakes(begun: Start, tmp_path: Path) -> None:
    poet = begun.folder.parent / "poet"
    done = cli("merge", begun.folder, poet, "-o", tmp_path / "out", "--prompt-name", "bard", "--prefix", "text")
    assert done.returncode == 0, done.stderr
    table = begun.adapter.manifest.tables[0].name
    tokens, rows, head, suppressed = done.stdout.splitlines()[1:5]
    assert "<|soft:bard:0|>" in tokens
    assert re.search(rf"\b5\b.*{re.escape(table)}", rows)
    assert "lm_head.weight" in head
    assert re.search(r"\b5\b", suppressed)
    (record,) = json.loads(cli("log", tmp_path / "out", "--json").stdout)["merges"]
    assert list(record["tokens"].values()) == [f"<|soft:bard:{number}|>" for number in range(5)]
    assert set(record["rows"].values()) == {5}
    assert len(record["rows"]) == 2
    verified = cli("verify", tmp_path / "out")
    assert verified.returncode == 0
    assert re.search(r"\bmerge 1 +10\b", verified.stdout)
    unmerged = cli("unmerge", tmp_path / "out", "-o", tmp_path / "bare")
    first, *edits = unmerged.stdout.splitlines()
    assert re.search(rf"\b5\b.*{re.escape(table)}", first)
    assert any("lm_head.weight" in line and table in line for line in edits)
    code = (
        "import sys, embedsurgery as es; es.merge_checkpoint(*sys.argv[1:4]); es.unmerge_checkpoint(sys.argv[3], "
        "sys.argv[4]); assert 'torch' not in sys.modules, 'torch'"
    )
    ran = python(code, begun.folder, poet, tmp_path / "again", tmp_path / "back")
    assert ran.returncode == 0, ran.stderr


SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
    "num_key_value_heads": 1,
}
TWO = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("LlamaConfig", SIZES),
    "GemmaForCausalLM": ("GemmaConfig", SIZES),
    "Gemma2ForCausalLM": ("Gemma2Config", SIZES),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", SIZES),
    "VaultGemmaForCausalLM": ("VaultGemmaConfig", SIZES),
    "MiniCPM3ForCausalLM": ("MiniCPM3Config", {**SIZES, "scale_emb": 12, "num_key_value_heads": 2}),
    "XGLMForCausalLM": (
        "XGLMConfig",
        {"vocab_size": 40, "d_model": 16, "ffn_dim": 24, "num_layers": 1, "attention_heads": 2},
    ),
    "BioGptForCausalLM": ("BioGptConfig", {k: v for k, v in SIZES.items() if "head_dim" not in k}),
    "BartForConditionalGeneration": ("BartConfig", TWO),
    "MBartForConditionalGeneration": ("MBartConfig", {**TWO, "scale_embedding": True}),
    "M2M100ForConditionalGeneration": ("M2M100Config", TWO),
    "PLBartForConditionalGeneration": ("PLBartConfig", TWO),
    "PegasusForConditionalGeneration": ("PegasusConfig", {**TWO, "scale_embedding": True}),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"vocab_size": 40, "d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_config_gives_the_scale_of_the_module(name: str) -> None:
    """The config as an object and as on disk, with and without the sites of a model."""
    config, sizes = MODELS[name]
    torch.manual_seed(0)
    model = getattr(tr, name)(getattr(tr, config)(pad_token_id=0, **sizes)).eval()
    table = es.walk(model).main_input()
    lookup = model.get_input_embeddings()
    row = lookup.weight[5].detach()
    real = (lookup(torch.tensor([5]))[0] / row).median().item()
    for given in (model.config, json.loads(model.config.to_json_string(use_diff=True))):
        found = scale_of(table, given)
        assert found is not None
        assert found.value == pytest.approx(real, rel=1e-5)
        bare = scale_of(type(table)(table.name, table.shape, table.dtype), given)
        assert bare is not None
        assert bare.value == pytest.approx(real, rel=1e-5)

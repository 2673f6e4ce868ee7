"""LoRA on tables, compared with PEFT's merge; and the test kit."""

from __future__ import annotations

import filecmp
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import embedsurgery_lora as plugin
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from embedsurgery_lora import LoraTablesConfig
from safetensors.torch import load_file, save_file

import embedsurgery as es
from embedsurgery.cli.main import cli
from embedsurgery.errors import AdapterError, BaseMismatchError, ConfigError, EmbedSurgeryWarning, UnsupportedError
from embedsurgery.plan import SetBlocks
from embedsurgery.plan.blocks import BLOCK_BYTES
from embedsurgery.stores.modules import module_store
from embedsurgery.stores.shards import ShardStore
from embedsurgery.surgeries.surgery import Base
from embedsurgery.tensors.raw import RawArray
from embedsurgery.testing import SurgeryContract, contents, installed
from embedsurgery.testing.models import state_bits

peft = pytest.importorskip("peft")
tr = pytest.importorskip("transformers")

ROWS = 24
MODELS = {
    "llama": ["embed_tokens", "lm_head"],
    "llama-tied": ["embed_tokens"],
    "gpt2": ["wte"],
    "t5": ["shared", "lm_head"],
    "t5-tied": ["shared"],
}
BOTH = {"llama-tied": ["embed_tokens", "lm_head"], "gpt2": ["wte", "lm_head"], "t5-tied": ["shared", "lm_head"]}
"""Both ends of a tie, each with an update of its own."""


def unchecked(test: Any) -> Any:
    """Ignore two warnings: PEFT saves no rows of GPT-2's base, and its updates of one end of a tie apply to both."""
    return pytest.mark.filterwarnings("ignore::embedsurgery.errors.EmbedSurgeryWarning")(test)


@pytest.fixture(autouse=True)
def _plugin() -> Any:
    with installed(plugin):
        yield


def model_of(kind: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    common: dict[str, Any] = {"vocab_size": ROWS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind.startswith("llama"):
        model = tr.LlamaForCausalLM(
            tr.LlamaConfig(
                hidden_size=8,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                tie_word_embeddings=kind.endswith("tied"),
                **common,
            )
        )
    elif kind == "gpt2":
        model = tr.GPT2LMHeadModel(tr.GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=32, **common))
    else:
        model = tr.T5ForConditionalGeneration(
            tr.T5Config(
                d_model=8,
                d_ff=16,
                d_kv=4,
                num_layers=1,
                num_heads=2,
                decoder_start_token_id=0,
                tie_word_embeddings=kind.endswith("tied"),
                **common,
            )
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.to(dtype).eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore warnings of PEFT and transformers inside the block."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def by_peft(kind: str, folder: Path, **options: Any) -> tuple[Any, Any]:
    """Return a base, and PEFT's model of it with random matrices, which is saved in a folder."""
    base, other = model_of(kind), model_of(kind)
    config = {"r": 3, "lora_alpha": 7, "target_modules": MODELS[kind], **options}
    with quiet():
        wrapped = peft.get_peft_model(other, peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "trainable_tokens_delta" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    with quiet():
        wrapped.save_pretrained(folder)
    return base, wrapped


def assert_same_as_peft(base: Any, wrapped: Any) -> None:
    """Compare a merged model's tensors with those that PEFT merges."""
    with quiet():
        theirs = wrapped.merge_and_unload().state_dict()
    for name, value in base.state_dict().items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=1e-6)


RANKS = {"rank_pattern": {"shared": 2, "wte": 4, "embed_tokens": 1, "lm_head": 5}}
ALPHAS = {"alpha_pattern": {"model.embed_tokens": 5, "sha.*": 3, "transformer.wte": 9}}


@unchecked
@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, ALPHAS, RANKS, {**RANKS, **ALPHAS, "use_rslora": True}],
    ids=["plain", "rslora", "alphas", "ranks", "all"],
)
@pytest.mark.parametrize(("kind", "targets"), [*MODELS.items(), *BOTH.items(), ("llama-tied", ["lm_head"])])
def test_it_is_pefts_merge(kind: str, targets: list[str], options: dict[str, Any], tmp_path: Path) -> None:
    base, wrapped = by_peft(kind, tmp_path / "adapter", target_modules=targets, **options)
    before = state_bits(base)
    adapter = es.load(tmp_path / "adapter")
    undo = es.merge(base, adapter)
    assert all(isinstance(edit, SetBlocks) for edit in undo.edits)
    assert_same_as_peft(base, wrapped)
    es.unmerge(base, undo)
    assert state_bits(base) == before


def test_a_tied_table_that_peft_trained_at_one_end_is_warned_of(tmp_path: Path) -> None:
    for number, targets in enumerate((["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"])):
        base, _ = by_peft("llama-tied", tmp_path / str(number), target_modules=targets)
        adapter = es.load(tmp_path / str(number))
        for act in (es.attach, es.merge):
            with pytest.warns(EmbedSurgeryWarning, match=rf"model.embed_tokens.weight.*{targets[0]}") as caught:
                done = act(base, adapter)
            assert {warning.filename for warning in caught} == {__file__}
            if act is es.attach:
                done.detach()


@unchecked
@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("llama-tied", ["embed_tokens"]),
        ("llama-tied", BOTH["llama-tied"]),
        ("gpt2", BOTH["gpt2"]),
    ],
)
def test_one_update_for_both_ends_of_a_tie(kind: str, targets: list[str], tmp_path: Path) -> None:
    """With ``ensure_weight_tying`` it is merged once, as in PEFT's forward; PEFT's merge adds it twice."""
    base, wrapped = by_peft(kind, tmp_path / "adapter", target_modules=targets, ensure_weight_tying=True, r=2)
    ids = torch.arange(2, ROWS).reshape(2, -1)
    live, plain = wrapped(input_ids=ids).logits.detach(), base(input_ids=ids).logits.detach()
    assert (live - plain).abs().max() > 0.1
    adapter = es.load(tmp_path / "adapter")
    attachment = es.attach(base, adapter)
    torch.testing.assert_close(base(input_ids=ids).logits, live)
    attachment.detach()
    adapter.save(tmp_path / "written")
    theirs, written = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "written"))
    assert written.keys() == {name for name in theirs if ".base_layer." not in name}
    assert all(torch.equal(value, theirs[name]) for name, value in written.items())
    again = es.load(tmp_path / "written")
    assert (again.manifest, dict(again.raw)) == (adapter.manifest, dict(adapter.raw))
    undo = es.merge(base, again)
    torch.testing.assert_close(base(input_ids=ids).logits, live)
    es.unmerge(base, undo)
    torch.testing.assert_close(base(input_ids=ids).logits, plain, rtol=0, atol=0)
    if kind == "llama-tied":
        with pytest.raises(BaseMismatchError) as caught:
            es.merge(model_of("llama"), again)
        assert "lm_head.weight" in str(caught.value)


@unchecked
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5-tied"])
def test_on_disk_in_bounded_memory(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merged in blocks of a few rows; every other byte is kept; the undo restores the base."""
    monkeypatch.setattr("embedsurgery.plan.blocks.BLOCK_BYTES", 100)
    base, wrapped = by_peft(kind, tmp_path / "adapter")
    base.save_pretrained(tmp_path / "base")
    es.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert_same_as_peft(type(base).from_pretrained(tmp_path / "merged"), wrapped)
    es.unmerge_checkpoint(tmp_path / "merged", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "base")


MEASURE = """
import sys
from pathlib import Path
import embedsurgery as es
import embedsurgery_lora as plugin
from embedsurgery.plugins.current import installed

def kilobytes(what):
    return int(Path("/proc/self/status").read_text().partition(f"{what}:")[2].split()[0])

base, adapter, out, again = map(Path, sys.argv[1:])
with installed(plugin):
    adapter = es.load(adapter)
    es.walk(base)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = kilobytes("VmRSS")
    es.merge_checkpoint(base, adapter, out)
    es.unmerge_checkpoint(out, again)
    print(kilobytes("VmHWM") - before, "torch" in sys.modules)
"""


def test_a_large_table_in_bounded_memory(tmp_path: Path) -> None:
    """Merged and unmerged on disk without torch, in the memory of a few blocks."""
    rows, width = 100_000, 256
    base = tmp_path / "base"
    base.mkdir()
    table = torch.arange(rows * width, dtype=torch.float32).reshape(rows, width) % 1000
    save_file({"model.embed_tokens.weight": table}, base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text('{"architectures": ["LlamaModel"], "vocab_size": 100000}')
    adapter = plugin.Lora().start(LoraTablesConfig(r=2), ShardStore.open(base), Base())
    ones = RawArray.of(np.ones((rows, 2), np.float32))
    adapter = replace(adapter, raw={**adapter.raw, "model.embed_tokens.weight.left": ones})
    adapter.save(tmp_path / "adapter")
    path = [str(Path(plugin.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, base, tmp_path / "adapter", tmp_path / "out", tmp_path / "again"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    kilobytes, torch_imported = run.stdout.split()
    assert int(kilobytes) * 1024 < 6 * BLOCK_BYTES < rows * width * 4 / 2
    assert torch_imported == "False"
    merged = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    change = 8 / 2 * adapter.tensors["model.embed_tokens.weight"].sum(0)
    torch.testing.assert_close(merged, table + change)
    assert filecmp.cmp(base / "model.safetensors", tmp_path / "again" / "model.safetensors", shallow=False)


@unchecked
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_peft_reads_what_is_written(kind: str, tmp_path: Path) -> None:
    base = model_of(kind)
    by_peft(kind, tmp_path / "theirs", use_rslora=True)
    adapter = es.load(tmp_path / "theirs")
    adapter.save(tmp_path / "written")
    again = es.load(tmp_path / "written")
    assert (again.manifest, dict(again.raw)) == (adapter.manifest, dict(adapter.raw))
    es.merge(base, again)
    with quiet():
        read = peft.PeftModel.from_pretrained(model_of(kind), tmp_path / "written")
    assert_same_as_peft(base, read)


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [
        ("llama", [3, 5]),
        ("llama", {"embed_tokens": [5, 3]}),
        ("llama-tied", [3, 5]),
    ],
)
def test_token_rows_beside_other_layers(kind: str, tokens: Any, tmp_path: Path) -> None:
    """The rows of ``trainable_token_indices`` are merged, and a warning names the other modules."""
    base, wrapped = by_peft(
        kind, tmp_path / "adapter", target_modules=["q_proj", "v_proj"], trainable_token_indices=tokens
    )
    base.save_pretrained(tmp_path / "base")
    with pytest.warns(EmbedSurgeryWarning, match=r"model\.layers\.0\.self_attn\.q_proj, .*v_proj"):
        adapter = es.load(tmp_path / "adapter")
    before = state_bits(base)
    with pytest.warns(EmbedSurgeryWarning, match="model.embed_tokens.weight"):
        undo = es.merge(base, adapter)
    with quiet():
        theirs = wrapped.merge_and_unload().state_dict()["model.embed_tokens.weight"]
    written = base.state_dict()["model.embed_tokens.weight"]
    torch.testing.assert_close(written, theirs, rtol=0, atol=0)
    assert (base.get_output_embeddings().weight is base.get_input_embeddings().weight) == (kind == "llama-tied")
    with pytest.warns(EmbedSurgeryWarning, match="model.embed_tokens.weight"):
        es.merge_checkpoint(tmp_path / "base", adapter, tmp_path / "merged")
    assert state_bits(type(base).from_pretrained(tmp_path / "merged")) == state_bits(base)
    es.unmerge(base, undo)
    assert state_bits(base) == before


def test_adapters_without_tables_and_variants_of_lora_are_refused(tmp_path: Path) -> None:
    by_peft("llama", tmp_path / "layers", target_modules=["q_proj"])
    by_peft("llama", tmp_path / "dora", use_dora=True)
    by_peft("llama", tmp_path / "bias", lora_bias=True, target_modules=["lm_head"])
    by_peft("llama", tmp_path / "pissa", init_lora_weights="pissa", target_modules=["lm_head"])
    by_peft("llama", tmp_path / "olora", init_lora_weights="olora", target_modules=["lm_head"])
    by_peft("llama", tmp_path / "alora", alora_invocation_tokens=[3], task_type="CAUSAL_LM", target_modules=["lm_head"])
    by_peft("llama", tmp_path / "saved", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    for name, found in (
        ("layers", "q_proj"),
        ("dora", "use_dora"),
        ("bias", "lora_bias"),
        ("pissa", "'pissa'"),
        ("olora", "'olora'"),
        ("alora", "alora_invocation_tokens"),
        ("saved", "lm_head, model.embed_tokens"),
    ):
        with pytest.raises(AdapterError) as caught:
            es.load(tmp_path / name)
        assert found in str(caught.value.found)
    base, _ = by_peft("llama", tmp_path / "good")
    with pytest.raises(BaseMismatchError):
        es.merge(model_of("llama", seed=1), es.load(tmp_path / "good"))
    config = json.loads((tmp_path / "good" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert load_file(tmp_path / "good" / "adapter_model.safetensors")
    for wrong in ({"r": 0}, {"r": 1.5}, {"lora_alpha": "x"}, {"target_modules": []}):
        with pytest.raises(ConfigError) as invalid:
            LoraTablesConfig(**wrong)
        assert {invalid.value.where} == wrong.keys()
    assert base is not None


@unchecked
def test_copies_of_whole_tables_beside_an_update(tmp_path: Path) -> None:
    """``modules_to_save``: left out with a warning if the tables are untied, refused if they are tied."""
    for kind in ("llama", "llama-tied"):
        options = {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]}
        base, wrapped = by_peft(kind, tmp_path / kind, **options)
        with pytest.warns(EmbedSurgeryWarning, match="lm_head"):
            adapter = es.load(tmp_path / kind)
        before = state_bits(base)
        if kind == "llama":
            es.merge(base, adapter)
            merged = wrapped.merge_and_unload().model.embed_tokens.weight
            torch.testing.assert_close(base.model.embed_tokens.weight, merged)
            assert state_bits(base)["lm_head.weight"] == before["lm_head.weight"]
            continue
        for act in (es.merge, es.attach):
            with pytest.raises(UnsupportedError) as caught:
                act(base, adapter)
            assert caught.value.found == "modules_to_save: lm_head"
        assert state_bits(base) == before
    base, _ = by_peft("llama-tied", tmp_path / "rows", target_modules=["lm_head"], trainable_token_indices=[3])
    with pytest.raises(UnsupportedError) as caught:
        es.merge(base, es.load(tmp_path / "rows"))
    assert set(str(caught.value.found).split(", ")) == {"model.embed_tokens.weight", "lm_head.weight"}


def test_attached_is_pefts_forward(tmp_path: Path) -> None:
    """On untied tables, where PEFT's forward equals its merge. Gradients are compared too, except for padding row 0."""
    base, wrapped = by_peft("llama", tmp_path / "adapter")
    ids = torch.arange(2, ROWS).reshape(2, -1)
    attachment = es.attach(base, es.load(tmp_path / "adapter"))
    written, theirs = base(input_ids=ids).logits, wrapped(input_ids=ids).logits
    torch.testing.assert_close(written, theirs)
    written.square().sum().backward()
    theirs.square().sum().backward()
    expected = sorted(float(p.grad.norm()) for name, p in wrapped.named_parameters() if "lora_" in name)
    assert sorted(float(p.grad.norm()) for p in attachment.parameters()) == pytest.approx(expected, rel=1e-4)


def test_show_and_dry_run_describe_whole_tables(tmp_path: Path) -> None:
    """They list no single rows, and the dry run gives the size of the undo."""
    base, _ = by_peft("llama", tmp_path / "adapter")
    base.save_pretrained(tmp_path / "base")
    folders = (str(tmp_path / "base"), str(tmp_path / "adapter"))
    runs = {
        verb: CliRunner().invoke(cli, [verb, *arguments], catch_exceptions=False)
        for verb, arguments in {"show": (folders[1], "--model", folders[0]), "merge": (*folders, "--dry-run")}.items()
    }
    assert {run.exit_code for run in runs.values()} == {0}
    assert any("model.embed_tokens.weight" in line and "whole" in line for line in runs["show"].output.splitlines())
    lines = runs["merge"].output.splitlines()
    assert any("24 rows" in line and "lm_head.weight" in line for line in lines)
    assert any(f"{2 * ROWS * 8 * 4 / 1000:.1f} kB" in line for line in lines)


def test_a_bf16_table_is_rounded_once() -> None:
    base = model_of("llama", dtype=torch.bfloat16)
    before = base.model.embed_tokens.weight.detach().clone()
    adapter = plugin.Lora().start(LoraTablesConfig(r=2, lora_alpha=4), module_store(base), Base())
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-31, 32, s, generator=generator) / 1024 for s in ((ROWS, 2), (2, 8)))
    name = "model.embed_tokens.weight"
    raw = {f"{name}.left": RawArray.of(left.numpy()), name: RawArray.of(right.numpy())}
    es.merge(base, replace(adapter, raw=raw))
    exact = before.double() + 2.0 * left.double() @ right.double()
    assert torch.equal(base.model.embed_tokens.weight.detach(), exact.to(torch.bfloat16))
    twice = before + (2.0 * left @ right).to(torch.bfloat16)
    assert not torch.equal(twice, exact.to(torch.bfloat16)), "a second rounding would not show"
    assert base.lm_head.weight.dtype == torch.bfloat16


class TestInput(SurgeryContract):
    plugin = plugin
    config = LoraTablesConfig(r=2, lora_alpha=4)


class TestBoth(SurgeryContract):
    plugin = plugin
    config = LoraTablesConfig(r=3, lora_alpha=4, target_modules=["embed_tokens", "lm_head"], use_rslora=True)
    ties = (False,)

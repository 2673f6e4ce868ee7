"""Extracting the rows that full tuning changed: merging the adapter into the base gives the tuned tables again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as tr
from click.testing import CliRunner
from safetensors.torch import load_file
from tokenizers import AddedToken

import embedsurgery as es
from embedsurgery.cli.main import cli as group
from embedsurgery.errors import BaseMismatchError, CheckpointError, ConfigError, EmbedSurgeryWarning, OutputExistsError
from embedsurgery.files.safetensors import TensorSource, write_file
from embedsurgery.tensors.raw import RawArray
from tests.support.comparing import contents
from tests.support.errors import check_error, raises
from tests.support.models import INPUT, KINDS, save, tiny
from tests.support.new_tokens import NEW, batch, check_encodes, forward, start
from tests.support.processes import cli, python

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[n].shape == other[n].shape
        and one[n].dtype == other[n].dtype
        and torch.equal(one[n].contiguous().view(torch.uint8), other[n].contiguous().view(torch.uint8))
        for n in one
    )


def tune(model: Any, rows: list[int], names: list[str]) -> None:
    """Change a few rows by hand, one of them by one bit, one to NaN, one to minus zero."""
    with torch.no_grad():
        for name in names:
            table = model.get_parameter(name)
            table[rows[0]] += 0.5
            table[rows[1], 3] = torch.nextafter(table[rows[1], 3].float(), torch.tensor(9.0)).to(table.dtype) * 1.01
            if len(rows) > 2:
                table[rows[2], 0] = float("nan")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("kind", KINDS)
def test_changed_rows_come_back_bit_for_bit(kind: str, shards: bool, dtype: str, tmp_path: Path) -> None:
    base = save(tiny(kind, dtype=DTYPES[dtype]), tmp_path / "base")
    model = tiny(kind, dtype=DTYPES[dtype])
    tune(model, [3, 17, 31], [INPUT[kind]])
    if kind == "llama-untied":
        tune(model, [5, 17], ["lm_head.weight"])
    tuned = save(model, tmp_path / "tuned", shards=shards)
    before = contents(tmp_path)
    found = es.extract_checkpoint(base, tuned)
    assert contents(tmp_path) == before
    assert found.rows[INPUT[kind]] == 3
    assert found.left == ()
    assert found.adapter is not None
    found.adapter.save(tmp_path / "adapter")
    es.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged", allow_nan=True)  # NaN bits are kept too
    assert same(weights(tmp_path / "merged"), weights(tuned))


def test_minus_zero_is_a_change(tmp_path: Path) -> None:
    model = tiny("llama-tied")
    with torch.no_grad():
        model.get_parameter(INPUT["llama-tied"])[4] = 0.0
    base = save(model, tmp_path / "base")
    with torch.no_grad():
        model.get_parameter(INPUT["llama-tied"])[4] = -0.0
    tuned = save(model, tmp_path / "tuned")
    assert es.extract_checkpoint(base, tuned).rows == {INPUT["llama-tied"]: 1}
    assert es.extract_checkpoint(base, tuned, threshold=1e-9).adapter is None


def test_a_threshold_leaves_noise_out(tmp_path: Path) -> None:
    base = save(tiny("llama-untied"), tmp_path / "base")
    model = tiny("llama-untied")
    with torch.no_grad():
        for name in (INPUT["llama-untied"], "lm_head.weight"):
            model.get_parameter(name).add_(torch.randn(40, 16, generator=torch.Generator().manual_seed(0)) * 1e-5)
        model.get_parameter("lm_head.weight")[7] += 1
    tuned = save(model, tmp_path / "tuned")
    assert es.extract_checkpoint(base, tuned).rows == {INPUT["llama-untied"]: 40, "lm_head.weight": 40}
    found = es.extract_checkpoint(base, tuned, threshold=1e-3)
    assert found.rows == {INPUT["llama-untied"]: 0, "lm_head.weight": 1}
    assert found.adapter is not None
    assert [t.indices for t in found.adapter.manifest.tables] == [(7,)]


def test_other_tensors_that_changed_are_named(tmp_path: Path) -> None:
    base = save(tiny("llama-tied"), tmp_path / "base")
    model = tiny("llama-tied")
    tune(model, [3, 17], [INPUT["llama-tied"]])
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    assert es.extract_checkpoint(base, save(model, tmp_path / "tuned")).left == ("model.norm.weight",)


@pytest.mark.parametrize("kind", ["llama-tied", "llama-untied", "gpt2", "bert", "t5", "gemma3", "qwen2-vl", "whisper"])
def test_grown_by_transformers(kind: str, tmp_path: Path) -> None:
    """A vocabulary that transformers resized, tuned in full: rows, tokens and tables come back."""
    begun = start(kind, tmp_path)
    begun.tokenizer.add_tokens(NEW)
    begun.model.resize_token_embeddings(begun.used + 2, mean_resizing=False)
    with torch.no_grad():
        table = begun.model.get_input_embeddings().weight
        table[-2:] = torch.randn(2, table.shape[1], generator=torch.Generator().manual_seed(1))
        table[12] += 1
    begun.model.save_pretrained(tmp_path / "tuned")
    begun.tokenizer.save_pretrained(tmp_path / "tuned")
    found = es.extract_checkpoint(begun.folder, tmp_path / "tuned")
    assert found.adapter is not None
    assert max(found.rows.values()) == 3
    assert set(found.grown.values()) == {2}
    assert [found.tokens[i] for i in sorted(found.tokens)][-2:] == NEW
    found.adapter.save(tmp_path / "adapter")
    es.merge_checkpoint(begun.folder, tmp_path / "adapter", tmp_path / "merged")
    merged, tuned = weights(tmp_path / "merged"), weights(tmp_path / "tuned")
    tables = [n for n in tuned if tuned[n].dim() == 2 and tuned[n].shape[0] == begun.used + 2]
    assert tables
    assert same({n: merged[n] for n in tables}, {n: tuned[n] for n in tables})
    check_encodes(tr.AutoTokenizer.from_pretrained(tmp_path / "merged"), [begun.used, begun.used + 1])
    reloaded = type(begun.model).from_pretrained(tmp_path / "merged").eval()
    ids = batch([begun.used, begun.used + 1])
    with torch.no_grad():
        ours, theirs = forward(reloaded, ids).logits, forward(begun.model, ids).logits
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("how", ["modules_to_save", "save_embedding_layers"])
@pytest.mark.parametrize("grown", [0, 2])
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_peft_adapter_that_holds_whole_embeddings(how: str, grown: int, tmp_path: Path) -> None:
    begun = start("llama-untied", tmp_path)
    if grown:
        begun.tokenizer.add_tokens(NEW)
        begun.model.resize_token_embeddings(begun.used + grown, mean_resizing=False)
    saved = ["embed_tokens", "lm_head"] if how == "modules_to_save" else None
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=saved)
    wrapped = peft.get_peft_model(begun.model, config)
    tables = {}
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ("embed_tokens" in name or "lm_head" in name) and "original_module" not in name:
                parameter[13] += 1
                parameter[begun.used :] += 0.25
                tables["embed" if "embed_tokens" in name else "head"] = parameter.detach().clone()
    wrapped.save_pretrained(tmp_path / "peft", save_embedding_layers=how == "save_embedding_layers")
    begun.tokenizer.save_pretrained(tmp_path / "peft")
    found = es.extract_checkpoint(begun.folder, tmp_path / "peft")
    assert found.adapter is not None
    assert set(found.rows.values()) == {1 + grown}
    assert any("lora_A" in name for name in found.left)
    found.adapter.save(tmp_path / "adapter")
    es.merge_checkpoint(begun.folder, tmp_path / "adapter", tmp_path / "merged")
    merged = weights(tmp_path / "merged")
    assert torch.equal(merged["model.embed_tokens.weight"], tables["embed"])
    assert torch.equal(merged["lm_head.weight"], tables["head"])


@pytest.mark.parametrize(
    ("saved", "tied"),
    [
        (["embed_tokens"], False),
        (["lm_head"], False),
        (["embed_tokens", "lm_head"], True),
        (["embed_tokens"], True),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_copy_that_peft_trained_at_one_end_of_a_tie(saved: list[str], tied: bool, tmp_path: Path) -> None:
    """Trained at one end it is refused, because one table cannot hold both; trained at both ends it merges as PEFT."""
    begun = start("llama-tied", tmp_path)
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=saved, ensure_weight_tying=tied)
    wrapped = peft.get_peft_model(begun.model, config)
    with torch.no_grad():
        for name, parameter in dict(wrapped.named_parameters()).items():
            if "modules_to_save" in name:
                parameter[13] += 1
    with torch.no_grad():
        expected = forward(wrapped, batch([20, 21])).logits
    wrapped.save_pretrained(tmp_path / "peft")
    if not tied:
        with raises(
            BaseMismatchError,
            where=tmp_path / "peft",
            expected=("modules_to_save", "embed_tokens", "lm_head"),
            found=saved[0],
            hint="ensure_weight_tying=True",
        ):
            es.extract_checkpoint(begun.folder, tmp_path / "peft")
        return
    found = es.extract_checkpoint(begun.folder, tmp_path / "peft")
    assert found.adapter is not None
    es.merge_checkpoint(begun.folder, found.adapter, tmp_path / "merged")
    with torch.no_grad():
        ours = forward(type(begun.model).from_pretrained(tmp_path / "merged").eval(), batch([20, 21])).logits
    assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_matching_options_that_an_adapter_does_not_store_are_warned_about(tmp_path: Path) -> None:
    begun = start("llama-tied", tmp_path)
    begun.tokenizer.add_tokens([AddedToken("<tool>", lstrip=True), AddedToken("<answer>", special=True)])
    begun.model.resize_token_embeddings(begun.used + 2, mean_resizing=False)
    begun.model.save_pretrained(tmp_path / "tuned")
    begun.tokenizer.save_pretrained(tmp_path / "tuned")
    with pytest.warns(EmbedSurgeryWarning, match=r"^[^']*lstrip[^']*'<tool>'[^']*$"):  # and not '<answer>'
        found = es.extract_checkpoint(begun.folder, tmp_path / "tuned")
    assert found.adapter is not None
    assert [t.content for t in found.adapter.manifest.new_tokens.tokens] == NEW  # type: ignore[union-attr]


def test_tokens_that_took_spare_rows_and_left_them_as_they_were(tmp_path: Path) -> None:
    """Only the tokenizer changed: the adapter carries the tokens."""
    begun = start("bert", tmp_path, 3)
    begun.tokenizer.add_tokens(NEW)
    begun.model.save_pretrained(tmp_path / "tuned")
    begun.tokenizer.save_pretrained(tmp_path / "tuned")
    found = es.extract_checkpoint(begun.folder, tmp_path / "tuned")
    assert found.adapter is not None
    assert set(found.rows.values()) == {0}
    assert list(found.tokens.values()) == NEW
    found.adapter.save(tmp_path / "adapter")
    es.merge_checkpoint(begun.folder, tmp_path / "adapter", tmp_path / "merged")
    assert same(weights(tmp_path / "merged"), weights(tmp_path / "tuned"))
    check_encodes(tr.AutoTokenizer.from_pretrained(tmp_path / "merged"), [begun.used, begun.used + 1])


def test_rows_below_the_threshold_stay_the_bases_in_pefts_file_too(tmp_path: Path) -> None:
    """PEFT has one list of rows for all tables: a row that a table did not change is stored as in the base."""
    base = save(tiny("llama-untied"), tmp_path / "base")
    model = tiny("llama-untied")
    with torch.no_grad():
        model.get_parameter("lm_head.weight")[7] += 1
        model.get_parameter(INPUT["llama-untied"])[7] += 1e-5
        model.get_parameter(INPUT["llama-untied"])[9] += 1
    found = es.extract_checkpoint(base, save(model, tmp_path / "tuned"), threshold=1e-3)
    assert found.adapter is not None
    found.adapter.save(tmp_path / "adapter")
    file = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    rows = file["base_model.model.model.embed_tokens.trainable_tokens_delta"]
    assert torch.equal(rows[0], tiny("llama-untied").get_parameter(INPUT["llama-untied"])[7])
    assert torch.equal(rows[1], model.get_parameter(INPUT["llama-untied"])[9])


def test_a_tie_that_tuning_parted_is_refused(tmp_path: Path) -> None:
    base = save(tiny("llama-tied"), tmp_path / "base")
    model = tiny("llama-untied")
    tuned = save(model, tmp_path / "tuned")
    names = sorted((INPUT["llama-tied"], "lm_head.weight"))
    with raises(BaseMismatchError, hint="tie_word_embeddings") as caught:
        es.extract_checkpoint(base, tuned)
    assert sorted((caught.value.where, caught.value.expected.split()[-1])) == names


def test_another_width_fewer_rows_or_no_table(tmp_path: Path) -> None:
    base = save(tiny("llama-tied"), tmp_path / "base")
    for name, shape in (("wide", (40, 24)), ("short", (30, 16))):
        folder = tmp_path / name
        folder.mkdir()
        rows = RawArray.of(np.zeros(shape, np.float32))
        write_file(folder / "model.safetensors", {INPUT["llama-tied"]: TensorSource.of(rows)}, {"format": "pt"})
        with raises(BaseMismatchError, where=INPUT["llama-tied"], expected=("40", "16"), found=list(shape)):
            es.extract_checkpoint(base, folder)
    (tmp_path / "none").mkdir()
    nothing = {"a": TensorSource.of(RawArray.of(np.zeros((2, 2), np.float32)))}
    write_file(tmp_path / "none" / "model.safetensors", nothing, {"format": "pt"})
    with raises(CheckpointError, where=tmp_path / "none", expected=INPUT["llama-tied"], found="a"):
        es.extract_checkpoint(base, tmp_path / "none")
    for threshold in (-1, float("nan"), float("inf"), "a"):
        with raises(ConfigError, what="threshold", expected="0", found=repr(threshold)):
            es.extract_checkpoint(base, base, threshold=threshold)  # type: ignore[arg-type]


def test_a_narrower_base_is_warned_about(tmp_path: Path) -> None:
    base = save(tiny("llama-tied", dtype=torch.bfloat16), tmp_path / "base")
    model = tiny("llama-tied", dtype=torch.bfloat16).float()
    tune(model, [3, 4], [INPUT["llama-tied"]])
    with pytest.warns(EmbedSurgeryWarning, match=f"{INPUT['llama-tied']}.*BF16.*F32.*BF16"):
        found = es.extract_checkpoint(base, save(model, tmp_path / "tuned"))
    assert found.rows == {INPUT["llama-tied"]: 2}


def test_the_command_line(tmp_path: Path) -> None:
    base = save(tiny("llama-tied"), tmp_path / "base")
    model = tiny("llama-tied")
    tune(model, [3, 17], [INPUT["llama-tied"]])
    tuned = save(model, tmp_path / "tuned")
    done = cli("extract", base, tuned, "-o", tmp_path / "adapter")
    assert done.returncode == 0, done.stderr
    assert f"{INPUT['llama-tied']}: 2 " in done.stdout
    es.merge(tiny("llama-tied"), es.load(tmp_path / "adapter"))
    facts = json.loads(cli("extract", base, tuned, "--dry-run", "--json").stdout)
    assert facts["rows"] == {INPUT["llama-tied"]: 2}
    assert facts["output"] is None
    again = CliRunner().invoke(group, ["extract", str(base), str(tuned), "-o", str(tmp_path / "adapter")])
    assert type(again.exception) is OutputExistsError
    check_error(again.exception, where=tmp_path / "adapter")
    nothing = cli("extract", base, base, "-o", tmp_path / "none")
    assert nothing.returncode == 0
    assert f"{INPUT['llama-tied']}: 0 " in nothing.stdout
    assert str(tmp_path / "none") not in nothing.stdout
    assert not (tmp_path / "none").exists()
    assert cli("extract", base, tuned).returncode == 2


def test_extracting_needs_no_torch(tmp_path: Path) -> None:
    base = save(tiny("llama-tied"), tmp_path / "base")
    code = "import sys, embedsurgery as es\nes.extract_checkpoint(sys.argv[1], sys.argv[1])\n"
    code += "assert 'torch' not in sys.modules"
    done = python(code, base)
    assert done.returncode == 0, done.stderr

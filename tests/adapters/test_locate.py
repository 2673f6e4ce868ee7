"""Locating an adapter's tables, by name and by content, in other dtypes and under other names."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import embedsurgery as es
from embedsurgery.adapters.adapter import Adapter
from embedsurgery.adapters.manifest import Fingerprint
from embedsurgery.errors import BaseMismatchError, EmbedSurgeryWarning, TableError, TokenIndexError
from embedsurgery.stores.shards import ShardStore
from embedsurgery.tensors.raw import RawArray
from tests.support import zoo
from tests.support.comparing import bits, listing, state_bits
from tests.support.errors import raises
from tests.support.models import INPUT, KINDS, save, tiny, trained

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
INDICES = [11, 3, 29]


def renamed(adapter: Adapter, **changes: Any) -> Adapter:
    """Return the adapter with changes of the record of its only table."""
    (record,) = adapter.manifest.tables
    new = replace(record, **changes)
    raw = {new.name: adapter.raw[record.name]}
    return Adapter(replace(adapter.manifest, tables=(new,)), raw, adapter.surgery)


def rows_after(adapter: Adapter, dtype: torch.dtype) -> bytes:
    (raw,) = adapter.tensors.values()
    return bits(raw.to(dtype))


# stored, trained and merged in. fp32 rounded once to fp16 and once to bf16 has no dtype to compare in.
SEEN = [
    (stored, trained_in, used)
    for stored in (F32, F16, BF16)
    for trained_in in (F32, F16, BF16)
    for used in (F32, F16, BF16, F64)
    if stored != F32 or {trained_in, used} != {F16, BF16}
]


@pytest.mark.parametrize(("stored", "trained_in", "used"), SEEN)
def test_the_same_base_in_another_dtype(stored: torch.dtype, trained_in: torch.dtype, used: torch.dtype) -> None:
    adapter = trained(tiny("llama-tied", dtype=stored).to(trained_in), INDICES)
    target = tiny("llama-tied", dtype=stored).to(used)
    es.merge(target, adapter)
    assert bits(target.model.embed_tokens.weight[INDICES]) == rows_after(adapter, used)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("as_dtype", [F32, F16, BF16])
def test_made_in_memory_and_merged_on_disk(dtype: torch.dtype, as_dtype: torch.dtype, tmp_path: Path) -> None:
    """A checkpoint loaded as another dtype is the same base."""
    base = save(tiny("llama-tied", dtype=dtype), tmp_path / "base")
    model = tiny("llama-tied", dtype=dtype).from_pretrained(base, dtype=as_dtype)
    adapter = trained(model, INDICES)
    es.merge_checkpoint(base, adapter, tmp_path / "merged")
    merged = load_file(tmp_path / "merged/model.safetensors")[INPUT["llama-tied"]]
    assert bits(merged[INDICES]) == rows_after(adapter, dtype)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("change", [0, 1, 2])
def test_one_bit_makes_another_base(change: int, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny("llama-tied", dtype=dtype)
    adapter = trained(model, INDICES)
    base = save(model, tmp_path / "base")
    before = listing(tmp_path)
    weight = model.model.embed_tokens.weight.detach()
    weight.view(torch.uint8)[INDICES[change], 0] ^= 1
    before_bits = state_bits(model)
    for target in (model, model.state_dict()):
        with raises(BaseMismatchError, where=INPUT["llama-tied"], expected="sha256"):
            es.merge(target, adapter)
    with raises(BaseMismatchError, where=INPUT["llama-tied"], expected="sha256"):
        es.attach(model, adapter)
    assert state_bits(model) == before_bits
    values = load_file(base / "model.safetensors")
    save_file({**values, INPUT["llama-tied"]: weight.clone()}, base / "model.safetensors", {"format": "pt"})
    with raises(BaseMismatchError, where=INPUT["llama-tied"], expected="sha256"):
        es.merge_checkpoint(base, adapter, tmp_path / "out")
    assert listing(tmp_path) == before


def test_other_rows_may_differ() -> None:
    adapter, target = trained(tiny("llama-tied"), INDICES), tiny("llama-tied")
    with torch.no_grad():
        target.model.embed_tokens.weight[12].add_(1)
    es.merge(target, adapter)
    assert bits(target.model.embed_tokens.weight[INDICES]) == rows_after(adapter, F32)


def test_a_longer_table_is_the_same_base() -> None:
    adapter, target = trained(tiny("llama-tied"), INDICES), tiny("llama-tied")
    target.resize_token_embeddings(56, mean_resizing=False)
    es.merge(target, adapter)
    assert bits(target.model.embed_tokens.weight[INDICES]) == rows_after(adapter, F32)


def test_a_shorter_table_is_refused() -> None:
    adapter, target = trained(tiny("llama-tied"), INDICES), tiny("llama-tied")
    target.resize_token_embeddings(20)
    with raises(TokenIndexError, where=INPUT["llama-tied"], expected=29, found=20):
        es.merge(target, adapter)


# -- other names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["encoder.tok.weight", "x.weight", "lm_head.other.weight", "a.b.c.d.embed.weight"])
def test_an_unknown_name_is_found_by_content(name: str, base: Path, tmp_path: Path) -> None:
    model = tiny("llama-tied")
    adapter = renamed(trained(model, INDICES), name=name, aliases=())
    es.merge_checkpoint(base, adapter, tmp_path / "merged")
    merged = load_file(tmp_path / "merged/model.safetensors")[INPUT["llama-tied"]]
    assert bits(merged[INDICES]) == rows_after(adapter, F32)
    es.merge(model, adapter)
    assert bits(model.model.embed_tokens.weight[INDICES]) == rows_after(adapter, F32)


def test_two_tables_with_the_content_are_refused() -> None:
    model = tiny("llama-untied")
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    adapter = renamed(trained(model, INDICES), name="x.weight", aliases=())
    with raises(TableError, expected=("x.weight", "F32"), found=("model.embed_tokens.weight", "lm_head.weight")):
        es.merge(model, adapter)


def test_no_table_with_the_content_is_refused() -> None:
    adapter = renamed(trained(tiny("llama-tied"), INDICES), name="x.weight", aliases=())
    with raises(BaseMismatchError, expected="x.weight", found="model.embed_tokens.weight"):
        es.merge(tiny("llama-tied", seed=5), adapter)


def test_without_a_fingerprint_the_name_decides() -> None:
    adapter = trained(tiny("llama-tied"), INDICES)
    with pytest.warns(EmbedSurgeryWarning, match=r"^model\.embed_tokens\.weight.*fingerprint"):
        es.merge(tiny("llama-tied", seed=5), renamed(adapter, fingerprint=None))
    with raises(TableError, expected=("x.weight", "fingerprint"), found="model.embed_tokens.weight"):
        es.merge(tiny("llama-tied"), renamed(adapter, fingerprint=None, name="x.weight", aliases=()))
    with raises(TokenIndexError, where=INPUT["llama-tied"], expected=77, found=40):
        es.merge(tiny("llama-tied"), renamed(adapter, fingerprint=None, indices=(1, 2, 77)))
    thin = {INPUT["llama-tied"]: RawArray("F32", (3, 4), bytes(48))}
    with raises(BaseMismatchError, where=INPUT["llama-tied"], expected=4, found=16):
        es.merge(tiny("llama-tied"), replace(renamed(adapter, fingerprint=None), raw=thin))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", ["Gemma3ForConditionalGeneration", "Qwen2VLForConditionalGeneration"])
def test_names_that_differ_between_memory_and_disk(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    (case,) = (case for case in zoo.cases() if case.name == name)
    model = zoo.build(case, tie=True).to(dtype)
    model.save_pretrained(tmp_path / "base")
    on_disk = {n: t for f in (tmp_path / "base").glob("*.safetensors") for n, t in load_file(f).items()}
    adapter = trained(model, [1, 5])
    named = {n for record in adapter.manifest.tables for n in record.names}
    es.merge_checkpoint(tmp_path / "base", adapter.save(tmp_path / "adapter"), tmp_path / "merged")
    merged = {n: t for f in (tmp_path / "merged").glob("*.safetensors") for n, t in load_file(f).items()}
    changed = [n for n in merged if bits(merged[n]) != bits(on_disk[n])]
    assert len(changed) == 1
    assert not named & set(changed)  # otherwise this test shows nothing
    assert bits(merged[changed[0]][[1, 5]]) == rows_after(adapter, dtype)
    es.merge(model, adapter)
    assert state_bits(type(model).from_pretrained(tmp_path / "merged", dtype=dtype)) == state_bits(model)


def test_a_model_from_a_directory_records_its_names_on_disk(tmp_path: Path) -> None:
    (case,) = (case for case in zoo.cases() if case.name == "Qwen2VLForConditionalGeneration")
    zoo.build(case, tie=True).save_pretrained(tmp_path / "base")
    model = type(zoo.build(case)).from_pretrained(tmp_path / "base")
    trained(model, [1, 5]).save(tmp_path / "adapter")
    (record,) = es.load(tmp_path / "adapter").manifest.tables
    (stored,) = (name for name, _ in es.walk(tmp_path / "base").main_input().files)
    assert record.disk_names == (stored,)
    assert stored not in (record.name, *record.aliases)


def test_a_headless_model_and_its_base_model(tmp_path: Path) -> None:
    """The same table with and without the prefix of the outer class."""
    model = tiny("gpt2")
    save(model.transformer, tmp_path / "bare")
    adapter = trained(model, INDICES)
    es.merge_checkpoint(tmp_path / "bare", adapter, tmp_path / "merged")
    assert bits(load_file(tmp_path / "merged/model.safetensors")["wte.weight"][INDICES]) == rows_after(adapter, F32)
    back = trained(model.transformer, INDICES)
    es.merge(model, back)
    assert bits(model.lm_head.weight[INDICES]) == rows_after(back, F32)


# -- ties --------------------------------------------------------------------------------------------------------------


def untie(model: Any) -> Any:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def test_a_tied_adapter_on_an_untied_base(tmp_path: Path) -> None:
    adapter, target = trained(tiny("llama-tied"), INDICES), untie(tiny("llama-tied"))
    target.lm_head.weight.data[0].add_(1)  # equal values in a state dict are a tie
    before = state_bits(target)
    fields = {"expected": ("lm_head.weight", INPUT["llama-tied"])}
    for store in (target, target.state_dict()):
        with raises(BaseMismatchError, **fields):
            es.merge(store, adapter)
    with raises(BaseMismatchError, **fields):
        es.attach(target, adapter)
    assert state_bits(target) == before
    target.config.tie_word_embeddings = False
    base = save(target, tmp_path / "base")
    with raises(BaseMismatchError, **fields):
        es.merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_untied_adapter_on_a_tied_base(base: Path, tmp_path: Path) -> None:
    target = tiny("llama-tied")
    adapter = trained(untie(tiny("llama-tied")), INDICES)
    before = state_bits(target)
    fields = {"expected": INPUT["llama-tied"], "found": (INPUT["llama-tied"], "lm_head.weight")}
    for store in (target, target.state_dict()):
        with raises(BaseMismatchError, **fields):
            es.merge(store, adapter)
    with raises(BaseMismatchError, **fields):
        es.attach(target, adapter)
    with raises(BaseMismatchError, **fields):
        es.merge_checkpoint(base, adapter, tmp_path / "out")
    assert state_bits(target) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_and_its_model_have_the_same_ties(kind: str, tmp_path: Path) -> None:
    model = tiny(kind)
    graph = ShardStore.open(save(model, tmp_path / "base")).graph
    (table,) = (t for t in graph.tables if t.name == INPUT[kind])
    (other,) = (t for t in es.walk(model).tables if INPUT[kind] in t.names)
    assert (table.shape, table.dtype, table.roles) == (other.shape, other.dtype, other.roles)


# -- the fingerprint -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_fingerprint_is_three_hashes(dtype: str) -> None:
    torch_dtype = {"F32": F32, "F16": F16, "BF16": BF16}[dtype]
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).to(torch_dtype)
    fingerprint = Fingerprint.of(RawArray(dtype, (3, 5), bits(values)))
    assert fingerprint.dtype == dtype
    for name, kind in (("F32", F32), ("F16", F16), ("BF16", BF16)):
        assert fingerprint.sha256[name] == hashlib.sha256(bits(values.to(kind))).hexdigest()
    assert fingerprint.matches(RawArray(dtype, (3, 5), bits(values)))
    assert not fingerprint.matches(RawArray(dtype, (3, 5), bits(values + 1)))

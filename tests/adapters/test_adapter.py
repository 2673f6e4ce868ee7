"""An adapter's files: saved and loaded bit for bit, shared with PEFT, and refused if they are broken."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import embedsurgery as es
from embedsurgery.adapters.adapter import METADATA_KEY, Adapter
from embedsurgery.errors import (
    AdapterError,
    BaseMismatchError,
    EmbedSurgeryError,
    EmbedSurgeryWarning,
    UnknownSurgeryError,
)
from tests.support.comparing import bits, contents, listing
from tests.support.errors import check_error, raises
from tests.support.models import INPUT, KINDS, logits, tiny, trained

INDICES = [11, 3, 29]
RIGHT = [kind for kind in KINDS if kind != "bert"]
"""The kinds on which PEFT is right: it drops the bias of BERT's head."""


pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's, on transformers 5


def check_same(one: Adapter, other: Adapter) -> None:
    assert json.dumps(one.manifest.to_json(), sort_keys=True) == json.dumps(other.manifest.to_json(), sort_keys=True)
    assert one.raw == other.raw
    assert {n: bits(t) for n, t in one.tensors.items()} == {n: bits(t) for n, t in other.tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("indices", [INDICES, [5], {"embed_tokens": [1, 9], "lm_head": [9, 4, 2]}], ids=str)
def test_save_and_load(indices: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    adapter = trained(tiny("llama-untied", dtype=dtype), indices)
    assert adapter.save(tmp_path / "new" / "adapter") == tmp_path / "new" / "adapter"
    loaded = es.load(tmp_path / "new/adapter")
    check_same(loaded, adapter)
    loaded.save(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "new/adapter")
    assert listing(tmp_path / "again") == ["adapter_config.json", "adapter_model.safetensors"]
    check_same(pickle.loads(pickle.dumps(adapter)), adapter)
    check_same(copy.deepcopy(adapter), adapter)


def test_a_models_directory_and_a_file_are_refused(tmp_path: Path) -> None:
    adapter = trained(tiny("llama-tied"), INDICES)
    tiny("llama-tied").save_pretrained(tmp_path)
    before = contents(tmp_path)
    with raises(AdapterError, where=tmp_path, found="config.json"):
        adapter.save(tmp_path)
    assert contents(tmp_path) == before
    with raises(AdapterError, where=tmp_path / "config.json", expected="directory"):
        es.load(tmp_path / "config.json")


def test_manifests_are_compared_by_value(tmp_path: Path) -> None:
    adapter = trained(tiny("llama-tied"), INDICES)
    assert es.load(adapter.save(tmp_path)).manifest == adapter.manifest


def test_saving_replaces_the_whole_adapter(tmp_path: Path) -> None:
    model = tiny("llama-tied")
    trained(model, [1, 2, 3]).save(tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("mine")
    adapter = trained(model, [7])
    adapter.save(tmp_path / "a")
    check_same(es.load(tmp_path / "a"), adapter)
    assert listing(tmp_path / "a") == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_saving_into_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file")
    with raises(AdapterError, where=tmp_path / "a"):
        trained(tiny("llama-tied"), [1]).save(tmp_path / "a")


def test_an_adapter_is_a_snapshot() -> None:
    model = tiny("llama-tied")
    attachment = es.attach(model, es.TrainableTokensConfig(INDICES))
    adapter = attachment.adapter()
    before = bits(adapter.tensors[INPUT["llama-tied"]])
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.add_(1)
    adapter.tensors[INPUT["llama-tied"]].add_(1)
    assert bits(adapter.tensors[INPUT["llama-tied"]]) == before == bits(model.model.embed_tokens.weight[INDICES])


# -- PEFT ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["F32", "BF16"])
@pytest.mark.parametrize("kind", RIGHT)
def test_peft_reads_an_adapter(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    adapter = trained(tiny(kind, dtype=dtype), INDICES)
    adapter.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny(kind, dtype=dtype), tmp_path)  # any warning fails the test
    ours = tiny(kind, dtype=dtype)
    es.merge(ours, adapter)
    assert bits(logits(theirs.merge_and_unload())) == bits(logits(ours))


@pytest.mark.filterwarnings("ignore:.*a tied layer is part of the adapter")  # PEFT warns so of its own targets
@pytest.mark.parametrize("targets", ["default", "list", "regex"])
@pytest.mark.parametrize("kind", RIGHT)
def test_an_adapter_of_peft_is_read(kind: str, targets: str, tmp_path: Path) -> None:
    name = INPUT[kind].removesuffix(".weight")
    modules = {"default": None, "list": [name.rpartition(".")[2]], "regex": f".*{name[-4:]}"}[targets]
    theirs = peft.get_peft_model(tiny(kind), peft.TrainableTokensConfig(token_indices=INDICES, target_modules=modules))
    with torch.no_grad():
        done: set[int] = set()
        for key, parameter in theirs.named_parameters():
            if "trainable_tokens_delta" in key and id(parameter) not in done:
                done.add(id(parameter))
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    theirs.save_pretrained(tmp_path)
    adapter = es.load(tmp_path)
    assert adapter.manifest.library_version is None
    assert [r.indices for r in adapter.manifest.tables] == [tuple(INDICES)]
    expected = logits(theirs)
    ours = tiny(kind)
    with pytest.warns(EmbedSurgeryWarning, match="fingerprint"):
        undo = es.merge(ours, adapter)
    assert torch.allclose(logits(ours), expected, atol=1e-5, rtol=0)
    assert bits(logits(ours)) == bits(logits(theirs.merge_and_unload()))
    es.unmerge(ours, undo)
    assert bits(logits(ours)) == bits(logits(tiny(kind)))


def test_bert_against_a_copy_edited_by_hand(tmp_path: Path) -> None:
    """PEFT drops the bias of this head, so the reference is a model whose rows are set by hand."""
    adapter = trained(tiny("bert"), INDICES)
    by_hand = tiny("bert")
    with torch.no_grad():
        by_hand.get_input_embeddings().weight[INDICES] = adapter.tensors[INPUT["bert"]]
    adapter.save(tmp_path)
    for source in (adapter, es.load(tmp_path)):
        ours = tiny("bert")
        es.merge(ours, source)
        assert bits(logits(ours)) == bits(logits(by_hand))
    theirs = peft.PeftModel.from_pretrained(tiny("bert"), tmp_path).merge_and_unload()
    assert bits(theirs.get_input_embeddings().weight) == bits(by_hand.get_input_embeddings().weight)


def test_peft_reads_different_rows_of_two_tables(tmp_path: Path) -> None:
    adapter = trained(tiny("llama-untied"), {"embed_tokens": [1, 9], "lm_head": [9, 4, 2]})
    adapter.save(tmp_path)
    ours = tiny("llama-untied")
    es.merge(ours, adapter)
    theirs = peft.PeftModel.from_pretrained(tiny("llama-untied"), tmp_path)
    assert torch.allclose(logits(theirs), logits(ours), atol=1e-5, rtol=0)
    merged = theirs.merge_and_unload()
    for module in ("model.embed_tokens", "lm_head"):
        assert bits(merged.get_submodule(module).weight) == bits(ours.get_submodule(module).weight)


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_have_pefts_names(kind: str, tmp_path: Path) -> None:
    trained(tiny(kind), INDICES).save(tmp_path / "ours")
    peft.get_peft_model(tiny(kind), peft.TrainableTokensConfig(token_indices=INDICES)).save_pretrained(
        tmp_path / "theirs"
    )
    ours, theirs = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    known = json.loads((tmp_path / "theirs/adapter_config.json").read_text())
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text()).keys() <= known.keys()


# -- broken files --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return trained(tiny("llama-untied"), {"embed_tokens": [1, 9], "lm_head": [9, 4, 2]}).save(tmp_path / "adapter")


def rewrite(folder: Path, *, manifest: Any = None, tensors: Any = None) -> None:
    """Change the manifest (a function of the dict, or a string in its place) or the tensors of an adapter."""
    path = folder / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    values = {name: value.clone() for name, value in load_file(path).items()}
    if tensors is not None:
        tensors(values)
    if isinstance(manifest, str):
        metadata[METADATA_KEY] = manifest
    elif manifest is not None:
        body = json.loads(metadata[METADATA_KEY])
        manifest(body)
        metadata[METADATA_KEY] = json.dumps(body)
    save_file(values, path, metadata)


MANIFESTS: dict[str, Any] = {
    "no JSON": "{",
    "a list": "[]",
    "a number": "3",
    "deep": "[" * 100_000,
    "another format": lambda m: m.update(format=2),
    "no tables": lambda m: m.pop("tables"),
    "tables of nothing": lambda m: m.update(tables=[3]),
    "no config": lambda m: m.update(config=None),
    "version": lambda m: m.update(surgery_version="x"),
    "infinite version": lambda m: m.update(surgery_version=float("inf")),
    "tokens": lambda m: m.update(tokens={"x": "y"}),
    "negative rows": lambda m: m["tables"][0].update(indices=[-1, 9]),
    "repeated rows": lambda m: m["tables"][0].update(indices=[9, 9]),
    "bool rows": lambda m: m["tables"][0].update(indices=[True, 9]),
    "no rows": lambda m: m["tables"][0].update(indices=[]),
    "other rows": lambda m: m["tables"][0].update(indices=[1, 8]),
    "shape": lambda m: m["tables"][0].update(shape=[40]),
    "width": lambda m: m["tables"][0].update(shape=[40, 17]),
    "row past the shape": lambda m: m["tables"][0].update(shape=[5, 16]),
    "infinite shape": lambda m: m["tables"][0].update(shape=[float("inf"), 16]),
    "fingerprint": lambda m: m["tables"][0].update(fingerprint=3),
    "hash": lambda m: m["tables"][0]["fingerprint"].update(sha256="abc"),
    "name": lambda m: m["tables"][0].update(name="model.other.weight"),
    "one table twice": lambda m: m["tables"][1].update(name=m["tables"][0]["name"], indices=[1, 9]),
}


@pytest.mark.parametrize("fault", MANIFESTS)
def test_a_broken_manifest_is_refused(fault: str, folder: Path) -> None:
    rewrite(folder, manifest=MANIFESTS[fault])
    with pytest.raises(AdapterError) as caught:
        es.load(folder)
    check_error(caught.value)


def test_an_unknown_surgery_is_refused(folder: Path) -> None:
    rewrite(folder, manifest=lambda m: m.update(surgery="os.system"))
    with raises(UnknownSurgeryError, where="os.system"):
        es.load(folder)


_KEY = "base_model.model.model.embed_tokens.trainable_tokens_delta"
TENSORS: dict[str, Any] = {
    "missing": lambda t: t.pop(_KEY),
    "a row short": lambda t: t.update({_KEY: t[_KEY][:-1].clone()}),
    "too narrow": lambda t: t.update({_KEY: t[_KEY][:, :-1].contiguous()}),
    "flat": lambda t: t.update({_KEY: t[_KEY].flatten()}),
    "a number": lambda t: t.update({_KEY: torch.tensor(1.0)}),
    "integers": lambda t: t.update({_KEY: t[_KEY].long()}),
    "bytes": lambda t: t.update({_KEY: t[_KEY].to(torch.int8)}),
}


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "pefts"])
@pytest.mark.parametrize("fault", TENSORS)
def test_wrong_tensors_are_refused(fault: str, ours: bool, tmp_path: Path) -> None:
    folder = trained(tiny("llama-tied"), [1, 9]).save(tmp_path / "adapter")
    rewrite(folder, tensors=lambda t: t.pop("base_model.model.lm_head.trainable_tokens_delta"))
    rewrite(folder, tensors=TENSORS[fault])
    if not ours:
        save_file(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.safetensors")
    if fault == "too narrow" and not ours:  # only the base tells the width of a table in PEFT's file
        with raises(BaseMismatchError, where=INPUT["llama-tied"], expected=15, found=16):
            es.merge(tiny("llama-tied"), es.load(folder))
        return
    with pytest.raises(AdapterError):
        es.load(folder)


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "pefts"])
def test_tied_copies_that_disagree_are_refused(ours: bool, tmp_path: Path) -> None:
    folder = trained(tiny("llama-tied"), [1, 9]).save(tmp_path / "adapter")
    rewrite(folder, tensors=lambda t: t["base_model.model.lm_head.trainable_tokens_delta"].add_(1))
    if not ours:
        save_file(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.safetensors")
    with raises(AdapterError, where="embed_tokens" if ours else "lm_head", found=None):
        es.load(folder)


OTHERS = [{}, [], 3, None, {"peft_type": "LORA"}, {"peft_type": ["x"]}, {"peft_type": "TRAINABLE_TOKENS"}]
INDEX_LISTS = [5, [1, 1], [-1, 9], [1, 9, 10], [1.0, 9.0], [True, 9], {"embed_tokens": [1, 9]}]
TARGETS = [5, [5], {"a": 1}]
BODIES = [
    *OTHERS,
    *({"peft_type": "TRAINABLE_TOKENS", "token_indices": indices} for indices in INDEX_LISTS),
    *({"peft_type": "TRAINABLE_TOKENS", "token_indices": [1, 9], "target_modules": names} for names in TARGETS),
]


@pytest.mark.parametrize("body", BODIES, ids=str)
def test_a_broken_config_of_pefts_is_refused(body: Any, tmp_path: Path) -> None:
    folder = trained(tiny("llama-tied"), [1, 9]).save(tmp_path / "adapter")
    save_file(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(body))
    with pytest.raises(AdapterError):
        es.load(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("how", ["missing", "empty", "cut", "directory"])
def test_files_that_cannot_be_read(name: str, how: str, folder: Path) -> None:
    data = (folder / name).read_bytes()
    (folder / name).unlink()
    if how == "directory":
        (folder / name).mkdir()
    elif how != "missing":
        (folder / name).write_bytes(b"" if how == "empty" else data[:-3])
    with pytest.raises(AdapterError) as caught:
        es.load(folder)
    assert name in f"{caught.value.where} {caught.value.expected}"


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with raises(AdapterError, expected="adapter_model.safetensors", found="adapter_model.bin"):
        es.load(tmp_path)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_in_the_manifest_loads_or_is_refused(folder: Path, data: st.DataObject) -> None:
    """Loading and merging either work or raise an EmbedSurgeryError."""
    kept = contents(folder)

    def change(body: dict[str, Any]) -> None:
        part: Any = body
        while True:
            key = data.draw(st.sampled_from(sorted(part) if isinstance(part, dict) else range(len(part))))
            if not isinstance(part[key], (dict, list)) or not part[key] or data.draw(st.booleans()):
                part[key] = data.draw(_JSON)
                return
            part = part[key]

    rewrite(folder, manifest=change)
    try:
        model = tiny("llama-untied")
        es.merge(model, es.load(folder))
    except EmbedSurgeryError:
        pass
    finally:
        for name, content in kept.items():
            (folder / name).write_bytes(content)

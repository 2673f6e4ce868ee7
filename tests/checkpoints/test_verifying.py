"""Every check of ``verify``: sound checkpoints pass all, and each fault fails the check meant for it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import embedsurgery as es
from embedsurgery.errors import CheckpointError
from embedsurgery.stores.shards import ShardStore
from embedsurgery.tensors.raw import RawArray
from tests.support.models import KINDS, VOCABULARY, WIDTH, save, tiny, trained, write_tokenizer

EMBED = "model.embed_tokens.weight"


def failed(folder: Path) -> dict[str, str]:
    return {check.name: check.detail for check in es.verify_checkpoint(folder) if not check.ok}


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    (file,) = folder.glob("*.safetensors")
    values = {name: value.clone() for name, value in load_file(file).items()}
    change(values)
    save_file(values, file, {"format": "pt"})


@pytest.mark.parametrize("shards", [False, True], ids=["file", "shards"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_checkpoint_passes(kind: str, shards: bool, tmp_path: Path) -> None:
    checks = es.verify_checkpoint(save(tiny(kind), tmp_path / "base", shards=shards))
    assert [check for check in checks if not check.ok] == []
    expected = {"index", "total_size"} if shards else {"weights"}
    assert expected | {"tables", "config", "dtype", "tokenizer"} <= {check.name for check in checks}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save(tiny("llama-untied"), tmp_path / "base", shards=True)


def test_a_tensor_that_the_index_forgets(sharded: Path) -> None:
    def forget(body: dict[str, Any]) -> None:
        del body["weight_map"]["model.norm.weight"]

    edit_json(sharded / "model.safetensors.index.json", forget)
    assert list(failed(sharded)) == ["index"]
    assert "model.norm.weight" in failed(sharded)["index"]


@pytest.mark.parametrize("size", [None, 1, "12"])
def test_a_total_size_that_is_wrong(size: Any, sharded: Path) -> None:
    edit_json(sharded / "model.safetensors.index.json", lambda body: body["metadata"].update(total_size=size))
    assert list(failed(sharded)) == ["total_size"]


def test_an_index_without_metadata(sharded: Path) -> None:
    edit_json(sharded / "model.safetensors.index.json", lambda body: body.pop("metadata"))
    assert list(failed(sharded)) == ["total_size"]


def test_no_table(base: Path) -> None:
    edit_weights(base, lambda values: values.pop(EMBED))
    assert "tables" in failed(base)


@pytest.mark.parametrize("rows", [VOCABULARY - 1, VOCABULARY + 1])
def test_rows_that_contradict_the_config(rows: int, base: Path) -> None:
    edit_json(base / "config.json", lambda body: body.update(vocab_size=rows))
    found = failed(base)
    assert list(found) == ["config"]
    assert str(rows) in found["config"]
    assert str(VOCABULARY) in found["config"]


def test_a_table_of_bytes(base: Path) -> None:
    edit_weights(base, lambda values: values.update({EMBED: values[EMBED].to(torch.int8)}))
    found = failed(base)
    assert list(found) == ["dtype"]
    assert EMBED in found["dtype"]
    assert "I8" in found["dtype"]


@pytest.mark.parametrize("apart", [False, True])
def test_a_tie_that_is_stored_twice(apart: bool, base: Path) -> None:
    edit_weights(base, lambda values: values.update({"lm_head.weight": values[EMBED] + int(apart)}))
    ties = [check for check in es.verify_checkpoint(base) if check.name == "ties"]
    assert [check.ok for check in ties] == [not apart]
    assert list(failed(base)) == (["ties"] if apart else [])


def test_an_untied_config_without_a_head(base: Path) -> None:
    edit_json(base / "config.json", lambda body: body.update(tie_word_embeddings=False))
    assert list(failed(base)) == ["head"]


def check_tokenizer_fails(base: Path, highest: int) -> None:
    found = failed(base)
    assert list(found) == ["tokenizer"]
    assert re.findall(r"\d+", found["tokenizer"]) == [str(highest), str(VOCABULARY)]


def test_a_tokenizer_that_goes_past_the_table(base: Path) -> None:
    write_tokenizer(base, VOCABULARY + 3)
    check_tokenizer_fails(base, VOCABULARY + 2)


def test_an_added_token_past_the_table(base: Path) -> None:
    edit_json(base / "tokenizer.json", lambda body: body["added_tokens"].append({"id": 77, "content": "<x>"}))
    check_tokenizer_fails(base, 77)


@pytest.mark.parametrize("which", [1, 2, 3])
def test_a_merge_whose_rows_have_changed(which: int, base: Path, tmp_path: Path) -> None:
    model = tiny("llama-tied")
    adapters = [trained(model, [10 * n]) for n in (1, 2, 3)]
    es.merge_checkpoint(base, adapters, tmp_path / "merged")
    assert failed(tmp_path / "merged") == {}
    store = ShardStore.open(tmp_path / "merged")
    store.write_rows(EMBED, (10 * which,), store.read_rows(EMBED, (0,)))
    assert list(failed(tmp_path / "merged")) == [f"merge {which}"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_merge_of_non_finite_rows(bad: float, base: Path, tmp_path: Path) -> None:
    adapter = trained(tiny("llama-tied"), [5])
    rows = adapter.tensors[EMBED]
    rows[0, 3] = bad
    broken = type(adapter)(adapter.manifest, {EMBED: RawArray.of(rows.numpy())}, adapter.surgery)
    es.merge_checkpoint(base, broken, tmp_path / "merged", allow_nan=True)
    assert list(failed(tmp_path / "merged")) == ["merge 1"]
    assert "NaN" in failed(tmp_path / "merged")["merge 1"]
    assert EMBED in failed(tmp_path / "merged")["merge 1"]


def test_a_merge_over_a_merge(base: Path, tmp_path: Path) -> None:
    """The second merge overrides rows of the first: they cannot be compared, and that is not a fault."""
    model = tiny("llama-tied")
    one = trained(model, [5, 6])
    es.merge_checkpoint(base, one, tmp_path / "one")
    es.merge(model, one)
    es.merge_checkpoint(tmp_path / "one", trained(model, [6], seed=4), tmp_path / "two")
    assert failed(tmp_path / "two") == {}
    es.unmerge_checkpoint(tmp_path / "two", tmp_path / "three")
    es.unmerge_checkpoint(tmp_path / "three", tmp_path / "back")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_a_missing_record_is_reported(base: Path, tmp_path: Path) -> None:
    model = tiny("llama-tied")
    es.merge_checkpoint(base, [trained(model, [n]) for n in (1, 2, 3)], tmp_path / "merged")
    (tmp_path / "merged/.embedsurgery/merges/0002.safetensors").unlink()
    assert failed(tmp_path / "merged") != {}


@pytest.mark.parametrize("what", ["index names no shard", "two sets", "no weights", "outside", "config", "shape"])
def test_what_cannot_be_read_at_all(what: str, sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    shard = sorted(sharded.glob("*.safetensors"))[0]
    if what == "index names no shard":
        shard.unlink()
    elif what == "two sets":
        save_file({"a": torch.zeros(1)}, sharded / "model.safetensors")
    elif what == "no weights":
        for path in (index, *sharded.glob("*.safetensors")):
            path.unlink()
    elif what == "outside":
        edit_json(index, lambda body: body["weight_map"].update({EMBED: "../x.safetensors"}))
    elif what == "config":
        (sharded / "config.json").write_text("[]")
    else:
        shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError):
        es.verify_checkpoint(sharded)


def test_the_sizes_of_this_file() -> None:
    assert VOCABULARY != WIDTH

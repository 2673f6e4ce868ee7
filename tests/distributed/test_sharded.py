"""Adapters on sharded models: loading, saving, setting, moving, and what is refused there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import embedsurgery as es
from tests.support import integrations
from tests.support.distributed.cases import CHECKPOINTED, KINDS, ROWS, WRAPS, attached
from tests.support.distributed.launch import torchrun
from tests.support.models import logits, tiny

DRIFT = "UnsupportedError: trainable rows that {} does not know: they would drift apart on the ranks (default: "
REFUSED = {
    "attached_after_sharding": DRIFT.format("fully_shard"),
    "attached_after_sharding_while_the_root_is_gathered": DRIFT.format("fully_shard"),
    "attached_to_a_part_of_what_was_sharded": DRIFT.format("fully_shard"),
    "ignored_by_fully_shard": DRIFT.format("fully_shard"),
    "only_the_blocks_are_sharded": DRIFT.format("fully_shard"),
    "attached_to_ddp": DRIFT.format("DistributedDataParallel"),
    "a_prompt_attached_to_ddp": DRIFT.format("DistributedDataParallel"),
    "a_prompt_attached_after_sharding": DRIFT.format("fully_shard"),
    "a_table_that_only_functions_read_attached_to_ddp": DRIFT.format("DistributedDataParallel"),
    "attached_inside_ddp": DRIFT.format("DistributedDataParallel"),
    "attached_to_ddp_and_compiled": DRIFT.format("DistributedDataParallel"),
    "attached_after_sharding_and_compiled": DRIFT.format("fully_shard"),
    "attached_again_by_the_name_of_one_that_was_known": DRIFT.format("DistributedDataParallel").replace(
        "default", "second"
    ),
    "frozen_while_ddp_was_made": DRIFT.format("DistributedDataParallel"),
    "under_the_old_fsdp": "UnsupportedError: rows cannot be trained under FullyShardedDataParallel",
    "ranks_that_start_differently": "UnsupportedError: the ranks have attached different rows",
    "without_the_root": "UnsupportedError: the rows are sharded here, because the module that was sharded with them",
    "a_full_copy_of_a_table_of_its_own_group": "UnsupportedError: a table that is sharded here cannot be overridden",
    "merged_by_the_attachment": "UnsupportedError: the tensor is sharded over devices (model.embed_tokens.weight)",
    "merged_while_the_root_is_gathered": "UnsupportedError: the tensor is sharded over devices",
    "merged_from_outside": "UnsupportedError: the tensor is sharded over devices",
    "saved_after_drifting": "AdapterError: the ranks hold different rows",
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return torchrun("refusals", tmp_path_factory.mktemp("refusals"))


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_drift_or_break_is_refused_by_name_on_every_rank(told: list[Any], case: str) -> None:
    assert told[0].keys() == REFUSED.keys()
    for rank in told:
        assert rank[case].startswith(REFUSED[case])


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return torchrun("loading", tmp_path_factory.mktemp("loading"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", WRAPS[1:])
def test_an_adapter_loads_into_a_sharded_model(seen: list[Any], kind: str, how: str) -> None:
    model = attached(kind)
    adapter = es.get_attachment(model).adapter()
    for rank in seen:
        found = rank[f"loaded {kind} {how}"]
        torch.testing.assert_close(found["logits"], logits(model), rtol=0, atol=1e-6)
        for name, values in adapter.tensors.items():
            assert torch.equal(found["rows"][name], values)
        largest = max(values.numel() * values.element_size() for values in adapter.tensors.values())
        assert found["numel"] <= largest  # bytes of (K, D) go round, and nothing of V x D is made


@pytest.mark.parametrize("how", WRAPS)
def test_rows_are_set_in_place_wherever_they_lie(seen: list[Any], how: str) -> None:
    fresh = es.attach(tiny("llama-tied"), es.TrainableTokensConfig(ROWS)).adapter().tensors
    for rank in seen:
        found = rank[f"restored {how}"]
        torch.testing.assert_close(found["logits"], logits(tiny("llama-tied")), rtol=0, atol=1e-6)
        assert all(torch.equal(found["rows"][name], values) for name, values in fresh.items())


@pytest.mark.parametrize("way", ["load", "empty"])
def test_sharding_on_the_meta_device_loses_no_rows(seen: list[Any], way: str) -> None:
    model = attached("llama-tied")
    for rank in seen:
        torch.testing.assert_close(rank[f"meta {way}"]["logits"], logits(model), rtol=0, atol=1e-6)
        assert rank[f"meta {way}"]["keys"] == sorted(model.state_dict())


def test_all_ranks_save_and_one_writes(seen: list[Any]) -> None:
    assert [rank["saved"]["calls"] for rank in seen] == [1, 0]
    for rank in seen:
        assert rank["saved"]["there"] == ["adapter_config.json", "adapter_model.safetensors"]
    assert "cannot write the adapter" in seen[0]["saved"]["errors"][0]
    assert "rank 0 could not write the adapter" in seen[1]["saved"]["errors"][0]


@pytest.mark.parametrize("how", CHECKPOINTED)
def test_torchs_own_checkpoints_resume_with_the_rows_and_are_refused_without(seen: list[Any], how: str) -> None:
    for rank in seen:
        found = rank[f"checkpoint {how}"]
        assert found["resumed"] == found["expected"]
        assert "trained these rows before" in found["forgotten"]
        assert found["keys"] == sorted(tiny("llama-tied").state_dict())


def test_the_trainer_on_two_processes_is_one_on_both_batches(seen: list[Any], tmp_path: Path) -> None:
    model, attachment = integrations.attached()
    alone = integrations.trainer(model, tmp_path, per_device_train_batch_size=4, save_strategy="no")
    alone.train()
    first, second = (rank["trainer"] for rank in seen)
    assert first["losses"] == pytest.approx(integrations.losses(alone), abs=2e-6)
    assert first["resumed losses"] == first["losses"]
    for rank in (first, second):
        assert rank["wrapper"] == "DistributedDataParallel"
        torch.testing.assert_close(rank["rows"], integrations.rows(attachment), rtol=0, atol=2e-5)
        assert torch.equal(rank["rows"], first["rows"])
        assert torch.equal(rank["resumed rows"], first["rows"])
        assert "trained these rows before" in rank["forgotten"]
    assert first["written"] == ["checkpoint-3/embedsurgery/default", "checkpoint-6/embedsurgery/default"]
    assert second["written"] == []


def test_rows_of_any_layout_are_gathered_bit_for_bit(seen: list[Any]) -> None:
    assert [rank["bits"] for rank in seen] == [True, True]


def test_alone_an_attachment_saves_as_its_adapter_does(tmp_path: Path) -> None:
    attachment = es.get_attachment(attached("llama-tied"))
    assert attachment.save(tmp_path / "a") == tmp_path / "a"
    attachment.adapter().save(tmp_path / "b")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

"""Adapters on sharded models: load, save, restore, move, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import embedsurgery as es
from embedsurgery.errors import AdapterError, AttachmentError, UnsupportedError
from tests.support import integrations
from tests.support.distributed.cases import CHECKPOINTED, KINDS, ROWS, WRAPS, attached
from tests.support.distributed.described import check_described
from tests.support.distributed.launch import torchrun
from tests.support.models import logits, tiny


def unknown_to(wrapper: str, adapter: str = "default") -> dict[str, Any]:
    """Return the fields of the error for rows that a wrapper does not average over the ranks."""
    return {"what": wrapper, "where": f"{adapter}: "}


FORGOTTEN = {"what": "optimizer", "where": "default", "hint": ("attachment.restore", "EmbedSurgeryCallback")}
SHARDED = {"where": "model.embed_tokens.weight", "hint": "disk"}
REFUSED: dict[str, dict[str, Any]] = {
    "attached_after_sharding": unknown_to("fully_shard"),
    "attached_after_sharding_while_the_root_is_gathered": unknown_to("fully_shard"),
    "attached_to_a_part_of_what_was_sharded": unknown_to("fully_shard"),
    "ignored_by_fully_shard": unknown_to("fully_shard"),
    "only_the_blocks_are_sharded": unknown_to("fully_shard"),
    "attached_to_ddp": unknown_to("DistributedDataParallel"),
    "a_prompt_attached_to_ddp": unknown_to("DistributedDataParallel"),
    "a_prompt_attached_after_sharding": unknown_to("fully_shard"),
    "a_table_that_only_functions_read_attached_to_ddp": unknown_to("DistributedDataParallel"),
    "attached_inside_ddp": unknown_to("DistributedDataParallel"),
    "attached_to_ddp_and_compiled": unknown_to("DistributedDataParallel"),
    "attached_after_sharding_and_compiled": unknown_to("fully_shard"),
    "attached_again_under_the_name_of_a_removed_adapter": unknown_to("DistributedDataParallel", "second"),
    "frozen_while_ddp_was_made": unknown_to("DistributedDataParallel"),
    "under_the_old_fsdp": {"what": "FullyShardedDataParallel"},
    "ranks_that_start_differently": {"expected": "every rank"},
    "without_the_root": {"where": re.compile("^(?!default: )"), "hint": "fully_shard"},
    "a_full_copy_of_a_table_of_its_own_group": {"where": re.compile("^weight$")},
    "merged_by_the_attachment": SHARDED,
    "merged_while_the_root_is_gathered": SHARDED,
    "merged_from_outside": SHARDED,
    "saved_after_drifting": {"where": "drifted", "expected": "every rank"},
}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return torchrun("refusals", tmp_path_factory.mktemp("refusals"))


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_drift_or_break_is_refused_on_every_rank(refusals: list[Any], case: str) -> None:
    assert refusals[0].keys() == REFUSED.keys()
    kind = AdapterError if case == "saved_after_drifting" else UnsupportedError
    for rank in refusals:
        check_described(rank[case], kind, **REFUSED[case])


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
        assert found["numel"] <= largest  # only bytes of (K, D) rows are gathered, no V x D tensor


@pytest.mark.parametrize("how", WRAPS)
def test_rows_are_restored_in_place(seen: list[Any], how: str) -> None:
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
        assert rank["saved"]["files"] == ["adapter_config.json", "adapter_model.safetensors"]
    (first,), (second,) = (rank["saved"]["errors"] for rank in seen)
    check_described(first, AdapterError, where="file", found="")
    check_described(second, AdapterError, what="rank 0", where="file", found=None)


@pytest.mark.parametrize("how", CHECKPOINTED)
def test_torchs_own_checkpoints_resume_with_the_rows_and_are_refused_without(seen: list[Any], how: str) -> None:
    for rank in seen:
        found = rank[f"checkpoint {how}"]
        assert found["resumed"] == found["expected"]
        check_described(found["forgotten"], AttachmentError, **FORGOTTEN)
        assert found["keys"] == sorted(tiny("llama-tied").state_dict())


def test_the_trainer_on_two_processes_is_one_on_both_batches(seen: list[Any], tmp_path: Path) -> None:
    model, attachment = integrations.attach_tiny()
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
        check_described(rank["forgotten"], AttachmentError, **FORGOTTEN)
    assert first["written"] == ["checkpoint-3/embedsurgery/default", "checkpoint-6/embedsurgery/default"]
    assert second["written"] == []


def test_rows_of_any_layout_are_gathered_bit_for_bit(seen: list[Any]) -> None:
    assert [rank["bits"] for rank in seen] == [True, True]


def test_in_one_process_an_attachment_saves_as_its_adapter_does(tmp_path: Path) -> None:
    attachment = es.get_attachment(attached("llama-tied"))
    assert attachment.save(tmp_path / "a") == tmp_path / "a"
    attachment.adapter().save(tmp_path / "b")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

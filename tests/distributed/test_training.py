"""Two processes reach the losses and rows of one process on the whole batch, in every wrapper."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import embedsurgery as es
from embedsurgery.errors import UnsupportedError
from tests.support.distributed.cases import KINDS, MANY, WRAPS, attached, reference
from tests.support.distributed.described import check_described
from tests.support.distributed.launch import WORKERS, port, run, torchrun
from tests.support.distributed.mixing import MIXES, train_mix
from tests.support.distributed.setups import SETUPS, dense

ACCELERATE = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
mixed_precision: 'no'
num_machines: 1
num_processes: 2
machine_rank: 0
use_cpu: false
rdzv_backend: static
same_network: true
main_training_function: main
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
  fsdp_reshard_after_forward: true
  fsdp_cpu_ram_efficient_loading: {efficient}
  fsdp_state_dict_type: SHARDED_STATE_DICT
"""
TENSOR_PARALLEL = (
    "llama-tied vocabulary",
    "llama-untied vocabulary",
    "llama-untied width",
    "llama-untied sharded logits",
    "llama-tied auto",
    "llama-tied auto and embedding",
    "llama-untied auto",
    "llama-untied auto and embedding",
)


@cache
def alone(kind: str, *rows: int, dtype: torch.dtype = torch.float32) -> Any:
    return reference(kind, list(rows) or None, dtype)


def check(results: list[Any], want: Any, *, loss: float = 2e-6, rows: float = 1e-6) -> None:
    """Check that every rank has the losses and rows of one process, and that the ranks' rows are equal."""
    for result in results:
        assert result["losses"] == pytest.approx(want["losses"], abs=loss)
        assert result["rows"].keys() == want["rows"].keys()
        for name, values in want["rows"].items():
            torch.testing.assert_close(result["rows"][name], values, rtol=0, atol=rows)
            assert torch.equal(result["rows"][name], results[0]["rows"][name])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return torchrun("train", tmp_path_factory.mktemp("train"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", WRAPS)
def test_losses_and_rows_are_those_of_one_process(trained: list[Any], kind: str, how: str) -> None:
    want = alone(kind)
    check([rank[f"{kind} {how}"] for rank in trained], want)
    initial = es.get_attachment(attached(kind)).adapter().tensors
    for name, values in want["rows"].items():
        assert (
            (values - initial[name]).abs().amax(dim=1) > 1e-3
        ).all()  # every row is trained, also those that no batch looks up


def test_a_rank_without_a_row_of_its_own(trained: list[Any]) -> None:
    check([rank["one row"] for rank in trained], alone("llama-tied", 5))


@pytest.mark.parametrize("kind", ["llama-tied", "llama-untied", "bert"])
@pytest.mark.parametrize("how", ["ddp", "fsdp-root", "fsdp-layers"])
def test_more_rows_than_a_process_has_tokens(trained: list[Any], kind: str, how: str) -> None:
    check([rank[f"many rows {kind} {how}"] for rank in trained], alone(kind, *MANY))


def test_a_root_that_is_sharded_again_after_its_forward(trained: list[Any]) -> None:
    check([rank["resharded"] for rank in trained], alone("llama-tied"))


def test_fp32_rows_over_a_bf16_base(trained: list[Any]) -> None:
    check([rank["bf16"] for rank in trained], alone("llama-tied", dtype=torch.bfloat16), loss=1e-3, rows=2e-3)


@pytest.mark.parametrize("name", SETUPS)
def test_in_every_way_of_training_they_are_those_of_a_dense_table(trained: list[Any], name: str) -> None:
    setup = SETUPS[name]
    want = dense(setup)
    for rank in trained:
        assert rank[name]["losses"] == pytest.approx(want["losses"], abs=setup.tolerance)
        for got, values, first in zip(rank[name]["rows"], want["rows"], trained[0][name]["rows"], strict=True):
            torch.testing.assert_close(got, values, rtol=0, atol=setup.tolerance)
            assert torch.equal(got, first)


@pytest.mark.parametrize("name", MIXES)
def test_adapters_are_switched_and_mixed_as_in_one_process(trained: list[Any], name: str) -> None:
    want = train_mix(replace(MIXES[name], how=None), slice(None), lambda loss: loss)
    check([rank[name] for rank in trained], want, loss=5e-6, rows=5e-6)


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return torchrun("tensor_parallel", tmp_path_factory.mktemp("parallel"))


@pytest.mark.parametrize("case", TENSOR_PARALLEL)
def test_tables_that_stay_sharded_in_the_forward(parallel: list[Any], case: str) -> None:
    assert parallel[0].keys() == set(TENSOR_PARALLEL)
    check([rank[case] for rank in parallel], alone(case.split()[0]))


@pytest.mark.parametrize(
    ("kind", "efficient"), [("llama-tied", "true"), pytest.param("llama-untied", "false", marks=pytest.mark.sweep)]
)
def test_accelerate_with_fsdp2(tmp_path: Path, kind: str, efficient: str) -> None:
    pytest.importorskip("accelerate")
    (tmp_path / "config.yaml").write_text(ACCELERATE.format(efficient=efficient))
    run(
        [
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(tmp_path / "config.yaml"),
            "--main_process_port",
            str(port()),
            str(WORKERS / "accelerate_fsdp.py"),
            str(tmp_path),
            kind,
        ]
    )
    results = [torch.load(tmp_path / f"accelerate-{kind}-{rank}.pt") for rank in (0, 1)]
    check(results, alone(kind))
    assert [r["model"] for r in results] == ["FSDPLlamaForCausalLM"] * 2
    assert results[0]["fsdp"]
    assert results[0]["keys"] == sorted(attached(kind).state_dict())
    for result in results:
        moved, back, again, end = result["after"]
        assert again["loss"] == moved["loss"]
        for name, values in result["rows"].items():
            assert torch.equal(back["rows"][name], values)
            assert torch.equal(end["rows"][name], values)
            assert torch.equal(again["rows"][name], moved["rows"][name])
            assert not torch.equal(moved["rows"][name], values)
    saved = es.load(tmp_path / f"adapter-{kind}").tensors
    for name, values in alone(kind)["rows"].items():
        torch.testing.assert_close(saved[name], values, rtol=0, atol=1e-6)


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None and "EMBEDSURGERY_TEST_DEEPSPEED" not in os.environ,
    reason="DeepSpeed is not installed (.ci/run installs it, for this test alone)",
)
def test_deepspeed(tmp_path: Path) -> None:
    results = torchrun("deepspeed_zero", tmp_path, DS_ACCELERATOR="cpu")
    for kind in ("llama-tied", "llama-untied"):
        for stage in (1, 2, 3):
            check([rank[f"{kind} {stage}"] for rank in results], alone(kind))
    for rank in results:
        check_described(rank["restored 2"], UnsupportedError, what="DeepSpeed", hint="deepspeed.initialize")
        check_described(rank["late 2"], UnsupportedError, what="DeepSpeed", where="default: ")
        for refused in ("restored 3", "merged 3", "late 3"):
            check_described(rank[refused], UnsupportedError, what="ZeRO-3", where="model.embed_tokens.weight")

"""The benchmark runs and reports every field. What it measures is asserted nowhere: times are no test."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks.cases import Case, choose, main_cases, quick_cases, sweep_cases
from tests.benchmarks.counting import count
from tests.benchmarks.counts import counts
from tests.benchmarks.measure import Pool, groups, run, spread
from tests.benchmarks.training import table

ROOT = Path(__file__).resolve().parents[2]
KINDS = ["train/quick", "lookup/quick", "generate/quick", "prompt/quick", "prompt-generate/quick"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``--quick`` writes, without the sweeps."""
    pytest.importorskip("peft")
    file = tmp_path_factory.mktemp("benchmark") / "report.json"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.benchmarks.training",
            "--quick",
            "--repeats",
            "2",
            "--device",
            "cpu",
            "--threads",
            "1",
            "--json",
            str(file),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| case | frozen base | floor | embedsurgery | PEFT | full embedding |")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.sweep
def test_every_kind_of_work_is_measured_for_every_variant(report: dict[str, Any]) -> None:
    assert [result["case"]["name"] for result in report["results"]] == KINDS
    assert report["skipped"] == []
    for result in report["results"]:
        has_full = result["case"]["work"] in ("train", "lookup")
        expected = {"base", "embedsurgery", "peft"} | ({"floor", "full"} if has_full else set())
        assert set(result["variants"]) == expected
        assert result["left_out"] == []


@pytest.mark.sweep
@pytest.mark.parametrize("together", [False, True])
def test_steps_are_timed_in_processes_started_anew_or_in_one(together: bool) -> None:
    case = replace(choose(quick_cases(), ["train/quick"])[0], repeats=4)
    pool = Pool(fresh=True)
    try:
        found = run(case, ["base", "embedsurgery"], pool, 1 << 40, together=together, device="cpu", threads=1)
    finally:
        pool.close()
    for one in found["variants"].values():
        assert len(one["seconds"]) == len(one["processor_seconds"]) == case.repeats
        assert len(one["peaks"]) == 2
    assert found["variants"]["embedsurgery"]["traffic_ratio"] > 1


@pytest.mark.sweep
def test_the_ratios_are_finite_and_in_order(report: dict[str, Any]) -> None:
    for result in report["results"]:
        for found in result["variants"].values():
            for field in ("time_ratio", "processor_ratio"):
                low, median, high = (found[field][name] for name in ("low", "median", "high"))
                assert 0 < low <= median <= high < math.inf
            assert 0 < found["traffic_ratio"] < math.inf
            assert (found["arithmetic"] > 0) is (result["case"]["work"] != "lookup")
            assert 0 < found["peak_ratio_without_state"] <= found["peak_ratio"] < math.inf
            assert len(found["seconds"]) == len(found["processor_seconds"]) == len(found["peaks"]) == 2
        assert 0 < result["variants"]["embedsurgery"]["faster_than_peft_seconds"]["median"] < math.inf
        base = result["variants"]["base"]
        assert base["time_ratio"] == {"low": 1, "median": 1, "high": 1}
        assert base["peak_ratio"] == 1


@pytest.mark.sweep
def test_the_variants_do_the_same_work(report: dict[str, Any]) -> None:
    for result in report["results"]:
        first = {variant: found["values"][0] for variant, found in result["variants"].items()}
        work, found = result["case"]["work"], result["variants"]
        prompt = work.startswith("prompt")
        if prompt:  # which the base has none of
            del first["base"]
        assert first == pytest.approx(dict.fromkeys(first, first["peft"]), rel=1e-5)
        count = (5 if prompt else 20) * 64
        assert found["base"]["trained_parameters"] == found["base"]["state_bytes"] == 0
        assert found["embedsurgery"]["trained_parameters"] == found["peft"]["trained_parameters"] == count
        if "floor" in found:
            assert found["floor"]["trained_parameters"] == count
            over = found["embedsurgery"]["over_floor"]
            assert over["traffic_ratio"] == found["embedsurgery"]["traffic_bytes"] / found["floor"]["traffic_bytes"]
        assert found["embedsurgery"]["state_bytes"] == (count * 8 if work in ("train", "prompt") else 0)


def test_counts_are_exact() -> None:
    a, b, table, ids = torch.ones(3, 5), torch.ones(5, 7), torch.ones(1000, 8), torch.tensor([4, 2])

    def step() -> None:
        (a @ b).t()
        torch.nn.functional.embedding(ids, table)
        table.index_copy_(0, ids, torch.ones(2, 8))

    found = count(step)
    assert found["arithmetic"] == 2 * 3 * 5 * 7
    products, picked, made, put = 4 * (15 + 35 + 21), 2 * 4 * 16, 4 * 16, 3 * (16 + 4 * 16)
    assert found["traffic_bytes"] == products + picked + made + put


def test_a_sparse_tensor_is_its_indices_and_values_and_an_expanded_one_its_elements_once() -> None:
    table, few = torch.ones(1000, 8), torch.ones(1).expand(50)
    sparse = torch.sparse_coo_tensor(torch.tensor([[4, 2]]), torch.ones(2, 8), (1000, 8), check_invariants=False)
    assert count(lambda: torch.add(table, sparse))["traffic_bytes"] == 2 * 4 * 8_000 + 2 * 8 + 4 * 16
    assert count(lambda: few + 1)["traffic_bytes"] == 4 + 4 * 50


def test_what_a_kernel_changes_is_written_once_whether_it_returns_that_or_not() -> None:
    a, b, few, most = torch.ones(50, 20), torch.ones(50, 20), torch.ones(20), torch.ones(20, dtype=torch.long)
    kernels: list[tuple[Callable[[], object], int]] = [  # and reads + writes
        (lambda: torch.mm(a, b.t()), 4 * (2 * 1000 + 2500)),
        (lambda: torch.add(a, b, out=b), 4 * (2 + 1) * 1000),
        (lambda: torch.max(a, 0, out=(few, most)), 4 * 1000 + (4 + 8) * 20),
        (lambda: torch.index_select(few, 0, most[:5], out=torch.empty(5)), 4 * (5 + 5)),
        (lambda: a.add_(b), 4 * (2 + 1) * 1000),
        (lambda: a.copy_(b), 4 * (2 + 1) * 1000),
        (lambda: a.zero_(), 4 * (1 + 1) * 1000),
        (lambda: torch._foreach_add_([a, few], [b, few]), 4 * (2 + 1) * 1020),
        (lambda: torch._foreach_add([a, few], [b, few]), 4 * (2 + 1) * 1020),
    ]
    assert [count(kernel)["traffic_bytes"] for kernel, _ in kernels] == [moved for _, moved in kernels]


@pytest.mark.parametrize("scaled", [False, True])
def test_the_fused_optimizer_writes_the_parameter_and_its_moments(scaled: bool) -> None:
    parameter = torch.nn.Parameter(torch.ones(1000))
    parameter.grad = torch.ones(1000)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    if scaled:  # as torch.amp.GradScaler does
        optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())  # type: ignore[attr-defined]
    optimizer.step()
    reads, writes = 4 * 1000, 3 * 1000  # parameter, gradient and two moments; all but the gradient
    steps = (1 + 1) + 1  # their count is counted up, then read
    scale = 1000 + 2 + (2 + 1) if scaled else 0  # the gradient unscaled, two scalars, a step taken back where it is inf
    assert count(optimizer.step)["traffic_bytes"] == 4 * (reads + writes + steps + scale)


@pytest.mark.parametrize("work", ["train", "lookup"])
@pytest.mark.parametrize("variant", ["base", "floor", "embedsurgery"])
@pytest.mark.parametrize("consecutive", [False, True])
def test_counts_without_products_are_the_same(work: str, variant: str, consecutive: bool) -> None:
    case = Case("x", work, 2_000, 64, 100, batch=(2, 16), layers=1, consecutive=consecutive)
    assert counts(case, variant) == counts(case, variant, dry=False)


def test_rows_cost_what_they_must_and_a_little_more() -> None:
    """Of every K x D that is moved beside the floor: the columns' product, the old rows, the change and its product.

    Consecutive rows cost the floor, and parts of the logits that are taken for them.
    """
    case = Case("x", "train", 4_000, 64, 2_000, batch=(1, 16), layers=1)
    for one, parts, products in ((case, 8.5, 2), (replace(case, consecutive=True), 0.1, 0)):
        ours, floor = counts(one, "embedsurgery"), counts(one, "floor")
        moved = 4 * case.rows * case.width
        assert ours["traffic_bytes"] - floor["traffic_bytes"] < parts * moved
        assert ours["arithmetic"] - floor["arithmetic"] == products * 2 * 16 * case.rows * case.width


@pytest.mark.sweep
def test_the_machine_is_described(report: dict[str, Any]) -> None:
    machine = report["machine"]
    assert set(machine["versions"]) == {"embedsurgery", "torch", "transformers", "peft"}
    assert machine["kind"] == "cpu"
    assert machine["cores"] > 0
    assert machine["memory_bytes"] > 0
    assert machine["device"]


@pytest.mark.sweep
def test_the_plots_are_small(report: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from tests.benchmarks.plots import draw

    sweeps = [
        {
            "case": {**report["results"][0]["case"], "name": f"{kind}/{n}", field: n},
            "variants": report["results"][0]["variants"],
        }
        for kind, field in (("sweep-k", "rows"), ("sweep-v", "vocabulary"))
        for n in (10, 100)
    ]
    written = draw(sweeps, tmp_path / "plots")
    assert [path.name for path in written] == ["benchmark-k.png", "benchmark-v.png"]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < 60_000
    assert draw(sweeps[:1], tmp_path) == []


def test_what_does_not_fit_beside_all_others_runs_with_the_base_alone() -> None:
    case = Case("train/x", "train", 256_000, 1024, 100)
    variants = ["base", "embedsurgery", "peft", "full"]
    assert groups(case, variants, 10**12) == ([variants], [])
    resident, step = (sum(part) for part in zip(case.estimate("base"), case.estimate("base"), strict=True))
    paired, left_out = groups(case, variants, resident + step)
    assert paired == [["base", "embedsurgery"]]
    assert left_out == ["peft", "full"]
    assert groups(case, variants, 10**6) == ([], variants[1:])


def test_names_choose_cases() -> None:
    every = main_cases() + sweep_cases()
    assert len({case.name for case in every}) == len(every)
    chosen = choose(every, ["lookup/*k100-*", "train/d1024-tied-k100"])
    assert [case.name for case in chosen][:1] == ["train/d1024-tied-k100"]
    assert {case.work for case in chosen[1:]} == {"lookup"}
    with pytest.raises(ValueError, match="no case matches 'trian"):
        choose(every, ["trian/*"])


def test_a_spread_is_the_median_and_the_quartiles() -> None:
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {"low": 2.0, "median": 3.0, "high": 4.0}


def test_an_empty_table_has_its_head() -> None:
    assert table([], "wall").count("\n") == 1

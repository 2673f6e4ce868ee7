"""Several adapters in one merge: weights, conflicts and non-finite values; on disk and in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import embedsurgery as es
from embedsurgery.errors import ConfigError, EmbedSurgeryWarning, PlanError
from embedsurgery.tensors.raw import RawArray
from tests.adapters import test_new_tokens as new_tokens
from tests.support.column_scaling import ColumnScaling, ColumnsConfig, plugin
from tests.support.comparing import bits, contents, state_bits
from tests.support.errors import raises
from tests.support.made import make_adapter, replace_values
from tests.support.models import INPUT, save, tiny
from tests.support.processes import cli

EMBED = INPUT["llama-tied"]
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
WEIGHTS = [0.0, 0.25, 0.5, 1.0, 1.5, -0.5]


def table(folder: Path, name: str = EMBED) -> torch.Tensor:
    (found,) = (t for file in folder.glob("*.safetensors") for n, t in load_file(file).items() if n == name)
    return found


def between(base: torch.Tensor, row: torch.Tensor, weight: float) -> torch.Tensor:
    """The documented interpolation: computed in fp32 (fp64 for fp64), rounded once."""
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    one, other = base.to(wide), row.to(wide)
    way = torch.tensor(weight, dtype=wide)
    return (one + way * (other - one) if weight < 0.5 else other - (1 - way) * (other - one)).to(base.dtype)


def expected(base: torch.Tensor, *sets: tuple[es.Adapter, float]) -> torch.Tensor:
    """The table after each adapter's rows, of one table, were set, in order."""
    result = base.clone()
    for adapter, weight in sets:
        (record,) = adapter.manifest.tables
        rows = torch.from_numpy(np.array(adapter.raw[record.name].bits))
        for index, row in zip(record.indices, rows, strict=True):
            result[index] = between(base[index], row, weight)
    return result


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_interpolates_from_the_base(dtype: str, weight: float, tmp_path: Path) -> None:
    model = tiny("llama-tied", dtype=DTYPES[dtype])
    base = save(model, tmp_path / "base")
    adapter = make_adapter(base, [11, 3, 29])
    es.merge_checkpoint(base, (adapter, weight), tmp_path / "merged")
    before, after = table(base), table(tmp_path / "merged")
    want = expected(before, (adapter, weight))
    assert bits(after) == bits(want)
    if weight in (0.0, 1.0):
        rows = before[[11, 3, 29]] if weight == 0 else adapter.tensors[EMBED].to(before.dtype)
        assert bits(after[[11, 3, 29]]) == bits(rows)

    undo = es.merge(model, [(adapter, weight)])
    assert bits(model.get_input_embeddings().weight) == bits(want)
    es.unmerge(model, undo)
    assert bits(model.get_input_embeddings().weight) == bits(before)
    (record,) = es.list_merges(tmp_path / "merged")
    assert record.weight == weight
    es.unmerge_checkpoint(tmp_path / "merged", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)


def test_the_interpolation_is_that_of_exact_numbers(tmp_path: Path) -> None:
    """Against fp64: within one rounding of the fp32 steps, and at bf16 the nearest or its neighbour."""
    base = save(tiny("llama-tied"), tmp_path / "base")
    adapter = make_adapter(base, [5, 6, 7])
    es.merge_checkpoint(base, (adapter, 0.3), tmp_path / "merged")
    rows = torch.from_numpy(adapter.raw[EMBED].float32().copy()).double()
    exact = table(base)[[5, 6, 7]].double() * 0.7 + rows * 0.3
    assert torch.allclose(table(tmp_path / "merged")[[5, 6, 7]].double(), exact, rtol=0, atol=4e-7)


def test_each_adapter_has_its_weight_in_one_pass(base: Path, tmp_path: Path) -> None:
    one, two = make_adapter(base, [1, 2]), make_adapter(base, [8], seed=2)
    report = es.merge_checkpoint(base, [(one, 0.5), two], tmp_path / "merged")
    assert report.rows == {EMBED: 3}
    assert bits(table(tmp_path / "merged")) == bits(expected(table(base), (one, 0.5), (two, 1.0)))
    assert [r.weight for r in es.list_merges(tmp_path / "merged")] == [0.5, 1.0]
    model = tiny("llama-tied")
    undo = es.merge(model, [(one, 0.5), two])
    assert bits(model.get_input_embeddings().weight) == bits(table(tmp_path / "merged"))
    es.unmerge(model, undo)
    assert state_bits(model) == state_bits(tiny("llama-tied"))


@pytest.mark.parametrize("bad", [math.nan, math.inf, True])
def test_a_weight_that_is_not_finite(bad: Any, base: Path, tmp_path: Path) -> None:
    with raises(ConfigError, what="weight", found=bad):
        es.merge_checkpoint(base, [(make_adapter(base, [1]), bad)], tmp_path / "merged")
    with raises(ConfigError, what="adapter", found="none"):
        es.merge(tiny("llama-tied"), [])


def test_on_the_command_line(base: Path, tmp_path: Path) -> None:
    one, two = make_adapter(base, [1, 2]), make_adapter(base, [2, 3], seed=2)
    one.save(tmp_path / "one")
    two.save(tmp_path / "sub" / "two")
    merge = ("merge", base, tmp_path / "one", tmp_path / "sub/two", "-o", tmp_path / "merged")
    refused = cli(*merge)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "row 2 ('t2')" in refused.stderr
    assert "--on-conflict" in refused.stderr
    assert "one and two" in refused.stderr
    for option, part in (
        ("three=1", "'three'"),
        ("one", "ADAPTER=NUMBER"),
        ("one=x", "ADAPTER=NUMBER"),
        ("one=nan", "ADAPTER=NUMBER"),
    ):
        wrong = cli(*merge, "--weight", option)
        assert wrong.returncode == 2, wrong.stderr
        assert "--weight" in wrong.stderr
        assert part in wrong.stderr
    assert not (tmp_path / "merged").exists()
    done = cli(*merge, "--weight", f"{tmp_path / 'one'}=0.5", "--weight", "two=0.25", "--on-conflict", "last")
    assert done.returncode == 0, done.stderr
    assert bits(table(tmp_path / "merged")) == bits(expected(table(base), (one, 0.5), (two, 0.25)))
    log = json.loads(cli("log", tmp_path / "merged", "--json").stdout)
    assert [(m["adapter"], m["weight"], m["on_conflict"]) for m in log["merges"]] == [
        ("one", 0.5, "last"),
        ("two", 0.25, "last"),
    ]


# -- conflicts --------------------------------------------------------------------------------------------------------


def merged_in_memory(adapters: Any, **options: Any) -> tuple[torch.Tensor, Callable[[], bytes]]:
    model = tiny("llama-tied", dtype=torch.bfloat16)
    undo = es.merge(model, adapters, **options)
    found = model.get_input_embeddings().weight.detach().clone()

    def back() -> bytes:
        es.unmerge(model, undo)
        return bits(model.get_input_embeddings().weight)

    return found, back


@pytest.fixture
def three(tmp_path: Path) -> tuple[Path, list[es.Adapter]]:
    """A bf16 base, and adapters that share row 2, two of them row 3 as well."""
    base = save(tiny("llama-tied", dtype=torch.bfloat16), tmp_path / "base")
    rows = ([1, 2, 3], [2, 9], [3, 2, 7])
    return base, [make_adapter(base, indices, seed=seed) for seed, indices in enumerate(rows)]


def test_conflicts_are_refused_and_listed(three: tuple[Path, list[es.Adapter]], tmp_path: Path) -> None:
    base, adapters = three
    before = contents(tmp_path)
    conflict = f"rows 2 ('t2'), 3 ('t3') of {EMBED}"
    for dry_run in (True, False):
        with raises(PlanError, found=conflict, hint=("on_conflict", "--on-conflict")):
            es.merge_checkpoint(base, adapters, tmp_path / "out", dry_run=dry_run)
    with raises(PlanError, found=conflict, hint="on_conflict"):
        es.merge(tiny("llama-tied", dtype=torch.bfloat16), adapters)
    with raises(ConfigError, where="on_conflict", expected=("last", "average"), found="'first'"):
        es.merge_checkpoint(base, adapters, tmp_path / "out", on_conflict="first")  # type: ignore[arg-type]
    assert contents(tmp_path) == before


def test_the_last_adapter_wins(three: tuple[Path, list[es.Adapter]], tmp_path: Path) -> None:
    base, adapters = three
    weights = [0.5, 1.0, 0.25]
    weighted = list(zip(adapters, weights, strict=True))
    es.merge_checkpoint(base, weighted, tmp_path / "out", on_conflict="last")
    want = expected(table(base), *weighted)
    assert bits(table(tmp_path / "out")) == bits(want)
    found, back = merged_in_memory(weighted, on_conflict="last")
    assert bits(found) == bits(want)
    assert back() == bits(table(base))


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 1.0, 0.25)])
def test_the_average_is_of_what_each_alone_would_make(
    weights: tuple[float, ...], three: tuple[Path, list[es.Adapter]], tmp_path: Path
) -> None:
    base, adapters = three
    weighted = list(zip(adapters, weights, strict=True))
    es.merge_checkpoint(base, weighted, tmp_path / "out", on_conflict="average")
    wide = table(base).float()
    alone = [expected(wide, part) for part in weighted]
    want = expected(table(base), *weighted)
    want[2] = torch.stack([a[2].double() for a in alone]).mean(0).float().to(torch.bfloat16)
    want[3] = torch.stack([alone[n][3].double() for n in (0, 2)]).mean(0).float().to(torch.bfloat16)
    assert bits(table(tmp_path / "out")) == bits(want)
    found, back = merged_in_memory(weighted, on_conflict="average")
    assert bits(found) == bits(want)
    assert back() == bits(table(base))

    es.merge_checkpoint(base, weighted[::-1], tmp_path / "other", on_conflict="average")
    assert bits(table(tmp_path / "other")) == bits(want)  # in whatever order
    for count in (2, 1, 0):  # taking the last out leaves what the others make
        es.unmerge_checkpoint(tmp_path / "out", tmp_path / f"back{count}")
        (tmp_path / "out").rename(tmp_path / f"out{count}")
        (tmp_path / f"back{count}").rename(tmp_path / "out")
        if count:
            es.merge_checkpoint(base, weighted[:count], tmp_path / f"only{count}", on_conflict="average")
            assert bits(table(tmp_path / "out")) == bits(table(tmp_path / f"only{count}"))
    assert contents(tmp_path / "out") == contents(base)


# -- adapters that bring tokens ----------------------------------------------------------------------------------------


@new_tokens.FULL_COPY
@pytest.mark.parametrize("spare", [0, 4], ids=["grown", "spare"])
@pytest.mark.parametrize("kind", ["llama-untied", "bert"])
def test_a_weight_and_new_tokens(kind: str, spare: int, tmp_path: Path) -> None:
    """The base has no rows of them, so the weight does not apply, with a warning; on a base with the tokens it does."""
    begun = new_tokens.start(kind, tmp_path, spare=spare)
    ids = es.add_tokens(begun.model, begun.tokenizer, new_tokens.NEW)
    adapter, _ = new_tokens.trained(begun, ids)
    adapter.save(tmp_path / "adapter")
    es.merge_checkpoint(begun.folder, tmp_path / "adapter", tmp_path / "whole")
    with pytest.warns(EmbedSurgeryWarning, match=r"\b0\.5\b.*'<tool>', '<answer>'"):
        es.merge_checkpoint(begun.folder, (tmp_path / "adapter", 0.5), tmp_path / "half")
    record = ".embedsurgery/merges/0001.safetensors"
    whole, half = contents(tmp_path / "whole"), contents(tmp_path / "half")
    assert whole.pop(record) != half.pop(record)
    assert whole == half
    fresh = begun.fresh()
    with pytest.warns(EmbedSurgeryWarning, match=r"\b0\.5\b.*'<tool>', '<answer>'"):
        undo = es.merge(fresh.model, (adapter, 0.5), fresh.tokenizer)
    es.unmerge(fresh.model, undo)
    assert state_bits(fresh.model) == state_bits(begun.fresh().model)

    es.add_tokens_checkpoint(begun.folder, new_tokens.NEW, tmp_path / "extended", init="zeros")
    es.merge_checkpoint(tmp_path / "extended", (tmp_path / "adapter", 0.5), tmp_path / "halfway")
    for name, old in stored(tmp_path / "extended").items():
        new = stored(tmp_path / "halfway")[name]
        want = stored(tmp_path / "whole")[name]
        changed = old.clone()
        if bits(old) != bits(want):
            changed[list(ids)] = between(old[list(ids)], want[list(ids)], 0.5)
        assert bits(new) == bits(changed), name


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


@new_tokens.FULL_COPY
@pytest.mark.parametrize("kind", ["llama-untied", "bert"])
def test_two_adapters_with_the_same_new_tokens(kind: str, tmp_path: Path) -> None:
    begun = new_tokens.start(kind, tmp_path)
    ids = es.add_tokens(begun.model, begun.tokenizer, new_tokens.NEW)
    one, _ = new_tokens.trained(begun, ids)
    two = replace(one, raw={n: RawArray.of(-2 * v.float32()) if v.dtype == "F32" else v for n, v in one.raw.items()})
    ids.undo()
    before = contents(begun.folder)
    with raises(PlanError, found=(*map(repr, new_tokens.NEW), "adapter and adapter"), hint="on_conflict"):
        es.merge_checkpoint(begun.folder, [one, two], tmp_path / "none")
    es.merge_checkpoint(begun.folder, one, tmp_path / "one")
    es.merge_checkpoint(begun.folder, two, tmp_path / "two")
    first, second = stored(tmp_path / "one"), stored(tmp_path / "two")
    for how in ("last", "average"):
        es.merge_checkpoint(begun.folder, [one, two], tmp_path / how, on_conflict=how)
        model, tokenizer = begun.fresh().model, begun.fresh().tokenizer
        undo = es.merge(model, [one, two], tokenizer, on_conflict=how)
        for name, found in stored(tmp_path / how).items():
            want = first[name].clone()
            if bits(first[name]) != bits(second[name]):
                pair = torch.stack([first[name][list(ids)].double(), second[name][list(ids)].double()])
                want[list(ids)] = (pair[1] if how == "last" else pair.mean(0)).float()
            assert bits(found) == bits(want), (how, name)
        reloaded = type(model).from_pretrained(tmp_path / how)
        assert state_bits(reloaded) == state_bits(model)
        es.unmerge(model, undo, tokenizer)
        assert state_bits(model) == state_bits(begun.fresh().model)
        es.unmerge_checkpoint(tmp_path / how, tmp_path / f"{how}-back", all=True)
        assert contents(tmp_path / f"{how}-back") == before


# -- whole tables ------------------------------------------------------------------------------------------------------


def columns_adapter(folder: Path, seed: int = 3) -> es.Adapter:
    from embedsurgery.stores.shards import ShardStore
    from embedsurgery.surgeries.surgery import Base

    adapter = ColumnScaling().start(ColumnsConfig(), ShardStore.open(folder), Base())
    stream = np.random.default_rng(seed)
    return replace(
        adapter,
        raw={n: RawArray.of(stream.standard_normal(v.shape).astype(np.float32)) for n, v in adapter.raw.items()},
    )


@pytest.fixture
def whole_tables() -> Any:
    from embedsurgery.testing import installed

    with installed(plugin):
        yield


@pytest.mark.usefixtures("whole_tables")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_for_a_whole_table(dtype: torch.dtype, tmp_path: Path) -> None:
    base = save(tiny("llama-tied", dtype=dtype), tmp_path / "base")
    adapter = columns_adapter(base)
    es.merge_checkpoint(base, (adapter, 0.25), tmp_path / "merged")
    shift, factors = (torch.from_numpy(np.array(adapter.raw[n].bits)) for n in (f"{EMBED}.shift", EMBED))
    old = table(base).float()
    want = between(old, old * (1 + factors) + shift, 0.25).to(dtype)
    assert bits(table(tmp_path / "merged")) == bits(want)
    es.unmerge_checkpoint(tmp_path / "merged", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)


@pytest.mark.usefixtures("whole_tables")
@pytest.mark.parametrize("how", [None, "last", "average"])
def test_a_whole_table_excludes_other_adapters_of_it(how: Any, base: Path, tmp_path: Path) -> None:
    whole, rows = columns_adapter(base), make_adapter(base, [5])
    for pair in ([whole, rows], [rows, whole], [whole, columns_adapter(base, 4)]):
        with raises(PlanError, where=EMBED, found="adapter", expected=None):
            es.merge_checkpoint(base, pair, tmp_path / "out", on_conflict=how)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("whole_tables")
def test_nan_in_a_whole_table(base: Path, tmp_path: Path) -> None:
    adapter = columns_adapter(base)
    values = adapter.raw[EMBED].float32().copy()
    values[0, 3] = np.nan
    broken = replace(adapter, raw={**adapter.raw, EMBED: RawArray.of(values)})
    before = contents(tmp_path)
    with raises(PlanError, where=f"adapter: {EMBED}", expected="finite", hint=("allow_nan", "--allow-nan")):
        es.merge_checkpoint(base, broken, tmp_path / "out")
    assert contents(tmp_path) == before
    es.merge_checkpoint(base, broken, tmp_path / "out", allow_nan=True)


# -- non-finite values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "dtype", "wanted"),
    [
        (math.nan, torch.float32, "finite"),
        (-math.inf, torch.bfloat16, "finite"),
        (1e6, torch.float16, "F16"),
    ],
)
def test_non_finite_rows_are_refused_with_their_token(
    value: float, dtype: torch.dtype, wanted: str, tmp_path: Path
) -> None:
    model = tiny("llama-tied", dtype=dtype)
    base = save(model, tmp_path / "base")
    adapter = replace_values(make_adapter(base, [4, 7, 9]), row7=value)
    adapter.save(tmp_path / "adapter")
    before = contents(tmp_path)
    for dry_run in (True, False):
        with raises(PlanError, where=f"adapter: {EMBED}", expected=wanted, found="row 7 ('t7')", hint="--allow-nan"):
            es.merge_checkpoint(base, adapter, tmp_path / "out", dry_run=dry_run)
    with raises(PlanError, where=f"adapter: {EMBED}", expected=wanted, found="row 7 ('t7')", hint="allow_nan"):
        es.merge(model, adapter)
    assert state_bits(model) == state_bits(tiny("llama-tied", dtype=dtype))
    refused = cli("merge", base, tmp_path / "adapter", "-o", tmp_path / "out")
    assert refused.returncode == 1
    assert "row 7 ('t7')" in refused.stderr
    assert contents(tmp_path) == before
    assert cli("merge", base, tmp_path / "adapter", "-o", tmp_path / "out", "--allow-nan").returncode == 0
    assert not torch.isfinite(table(tmp_path / "out")[7]).all()
    undo = es.merge(model, adapter, allow_nan=True)
    es.unmerge(model, undo)
    es.unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)


def test_a_weight_that_overflows_is_refused(base: Path, tmp_path: Path) -> None:
    with raises(PlanError, where=f"adapter: {EMBED}", found="row 4 ('t4')", hint="allow_nan"):
        es.merge_checkpoint(base, (make_adapter(base, [4], scale=1e30), 1e30), tmp_path / "out")

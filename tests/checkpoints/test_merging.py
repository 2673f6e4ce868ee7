"""Merging on disk: the same bits as in memory, all other bytes unchanged, and back again."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import embedsurgery as es
from embedsurgery.errors import BaseMismatchError, CheckpointError, ConfigError, OutputExistsError, PlanError
from embedsurgery.stores.shards import ShardStore
from embedsurgery.surgeries.surgery import Base
from embedsurgery.surgeries.trainable_tokens.surgery import TrainableTokens
from tests.support.comparing import bits, contents, listing, state_bits, tree
from tests.support.errors import raises
from tests.support.models import INPUT, KINDS, logits, save, tiny, trained
from tests.support.processes import small_files

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INDICES = [11, 3, 29]


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t.clone() for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def load_model(folder: Path, like: Any) -> Any:
    return type(like).from_pretrained(folder, dtype=like.dtype).eval()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [False, True], ids=["file", "shards"])
@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unmerge(kind: str, shards: bool, dtype: str, tmp_path: Path) -> None:
    model = tiny(kind, dtype=DTYPES[dtype])
    base = save(model, tmp_path / "base", shards=shards)
    before = tree(base)
    model = load_model(base, model)
    adapter = trained(model, INDICES)
    report = es.merge_checkpoint(base, adapter.save(tmp_path / "adapter"), tmp_path / "merged")
    merged = tmp_path / "merged"
    assert tree(base) == before

    after = tree(merged)
    record = ".embedsurgery/merges/0001.safetensors"
    assert after.keys() == before.keys() | {record}
    changed = {path for path in before if after[path] != before[path]}
    assert changed == set(report.files)
    assert report.rows == {INPUT[kind]: 3}
    assert (report.done, report.copied) == (True, sum(len(data) for data, _, _ in before.values()))
    assert all(after[path][1] == before[path][1] for path in before)

    old, new = stored(base), stored(merged)
    rows = next(iter(adapter.tensors.values())).to(DTYPES[dtype])
    for name, tensor in old.items():
        if name == INPUT[kind]:
            tensor[INDICES] = rows
        assert bits(new[name]) == bits(tensor), name

    on_disk = load_model(merged, model)
    undo = es.merge(model, adapter)
    assert state_bits(on_disk) == state_bits(model)
    assert bits(logits(on_disk)) == bits(logits(model))
    es.unmerge(model, undo)
    assert state_bits(model) == state_bits(load_model(base, model))

    assert es.unmerge_checkpoint(merged, tmp_path / "back").done
    assert contents(tmp_path / "back") == contents(base)
    assert listing(tmp_path / "back") == listing(base)
    assert {p: m for p, (_, m, _) in tree(tmp_path / "back").items()} == {p: m for p, (_, m, _) in before.items()}
    assert all(check.ok for folder in (base, merged, tmp_path / "back") for check in es.verify_checkpoint(folder))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "back", "base", "merged"]


def test_both_copies_of_a_tie_that_is_stored_twice(tmp_path: Path) -> None:
    model = tiny("llama-tied")
    base = save(model, tmp_path / "base")
    values = stored(base)
    values["lm_head.weight"] = values[INPUT["llama-tied"]].clone()
    save_file(values, base / "model.safetensors", {"format": "pt"})
    adapter = trained(model, INDICES)
    es.merge_checkpoint(base, adapter, tmp_path / "merged")
    new = stored(tmp_path / "merged")
    es.merge(model, adapter)
    assert bits(new["lm_head.weight"]) == bits(new[INPUT["llama-tied"]]) == bits(model.lm_head.weight)
    es.unmerge_checkpoint(tmp_path / "merged", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)


def test_different_rows_of_two_tables(tmp_path: Path) -> None:
    model = tiny("llama-untied", dtype=torch.bfloat16)
    base = save(model, tmp_path / "base", shards=True)
    adapter = trained(model, {"embed_tokens": [1, 5], "lm_head": [5, 7, 2]})
    report = es.merge_checkpoint(base, adapter.save(tmp_path / "adapter"), tmp_path / "merged")
    assert report.rows == {INPUT["llama-untied"]: 2, "lm_head.weight": 3}
    es.merge(model, adapter)
    assert state_bits(load_model(tmp_path / "merged", model)) == state_bits(model)
    es.unmerge_checkpoint(tmp_path / "merged", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)


@pytest.mark.parametrize("at_once", [False, True], ids=["one by one", "at once"])
def test_stacked_merges_come_out_one_by_one(at_once: bool, base: Path, tmp_path: Path) -> None:
    model = tiny("llama-tied")
    adapters = [trained(model, rows, seed=seed) for seed, rows in enumerate(([1, 2], [30, 4], [7]), 1)]
    steps = [base]
    for number, adapter in enumerate(adapters, 1):
        steps.append(tmp_path / f"step{number}")
        if not at_once:
            es.merge_checkpoint(steps[-2], adapter, steps[-1])
        else:
            es.merge_checkpoint(base, adapters[:number], steps[-1])
    assert len(list((steps[-1] / ".embedsurgery/merges").iterdir())) == 3
    assert all(check.ok for check in es.verify_checkpoint(steps[-1]))
    for adapter in adapters:
        es.merge(model, adapter)
    assert state_bits(load_model(steps[-1], model)) == state_bits(model)
    last = steps[-1]
    for number in (2, 1, 0):
        es.unmerge_checkpoint(last, tmp_path / f"back{number}")
        last = tmp_path / f"back{number}"
        if number == 0 or not at_once:
            assert contents(last) == contents(steps[number])
        assert contents(last)["model.safetensors"] == contents(steps[number])["model.safetensors"]
    with raises(CheckpointError, where=last, expected=".embedsurgery/merges/0001.safetensors"):
        es.unmerge_checkpoint(last, tmp_path / "none")


def test_refusals_leave_nothing(base: Path, tmp_path: Path) -> None:
    model = tiny("llama-tied")
    one, two, other = trained(model, [1, 2]), trained(model, [2, 3]), trained(tiny("llama-tied", seed=8), [1])
    wide = trained(tiny("gpt2", seed=9), [1])
    es.merge_checkpoint(base, one, tmp_path / "merged")
    before = listing(tmp_path)
    for source, adapters, error in (
        (base, [one, two], PlanError),  # both set row 2
        (base, [one, one], PlanError),
        (base, other, BaseMismatchError),
        (base, wide, (BaseMismatchError, LookupError)),
        (base, [one, other], (BaseMismatchError, PlanError)),
        (base, [], ConfigError),
        (base, tmp_path / "nowhere", ValueError),
        (tmp_path / "merged", one, (BaseMismatchError, PlanError)),  # the same adapter twice
        (tmp_path / "nowhere", one, CheckpointError),
        (tmp_path / "base/config.json", one, CheckpointError),
    ):
        with pytest.raises(error) as caught:
            es.merge_checkpoint(source, adapters, tmp_path / "out")
        assert isinstance(caught.value, es.errors.EmbedSurgeryError)
        assert listing(tmp_path) == before


@pytest.mark.parametrize("existing", ["full", "empty", "file", "dangling link"])
def test_an_existing_output_is_refused(existing: str, base: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    if existing == "dangling link":
        output.symlink_to(tmp_path / "nowhere")
    elif existing == "file":
        output.write_bytes(b"mine")
    else:
        output.mkdir()
        if existing == "full":
            (output / "x").write_bytes(b"mine")
    adapter, before = trained(tiny("llama-tied"), [1]), listing(tmp_path)
    es.merge_checkpoint(base, adapter, tmp_path / "merged", dry_run=False)
    for act in (
        lambda: es.merge_checkpoint(base, adapter, output),
        lambda: es.merge_checkpoint(base, adapter, output, dry_run=True),
        lambda: es.unmerge_checkpoint(tmp_path / "merged", output),
    ):
        with raises(OutputExistsError, where=output):
            act()
    assert [p for p in listing(tmp_path) if not p.startswith("merged")] == before


def test_a_dry_run_writes_nothing_and_reports_the_same(base: Path, tmp_path: Path) -> None:
    adapter, before = trained(tiny("llama-tied"), INDICES), tree(tmp_path)
    report = es.merge_checkpoint(base, adapter, tmp_path / "merged", dry_run=True)
    assert tree(tmp_path) == before
    assert listing(tmp_path) == listing(tmp_path)
    real = es.merge_checkpoint(base, adapter, tmp_path / "merged")
    assert (report.done, real.done) == (False, True)
    assert (report.edits, report.rows, report.files, report.copied) == (real.edits, real.rows, real.files, real.copied)
    before = tree(tmp_path)
    assert not es.unmerge_checkpoint(tmp_path / "merged", tmp_path / "back", dry_run=True).done
    assert tree(tmp_path) == before


def test_progress_ends_at_the_total(base: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = es.merge_checkpoint(
        base, trained(tiny("llama-tied"), [1]), tmp_path / "m", progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (report.copied, report.copied)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("failure", ["interrupt", "disk full", "file shrinks"])
@pytest.mark.parametrize("output", ["out", "new/parents/out"])
def test_a_failure_in_the_middle_leaves_nothing(failure: str, output: str, tmp_path: Path) -> None:
    model = tiny("llama-untied")
    base = save(model, tmp_path / "base", shards=True)
    adapter, before = trained(model, [1]), listing(tmp_path)
    steps = []

    def progress(done: int, total: int) -> None:
        steps.append(done)
        if failure == "interrupt" and done > total // 2:
            raise KeyboardInterrupt
        if failure == "file shrinks" and len(steps) == 1:
            last = sorted(base.glob("*.safetensors"))[-1]
            with open(last, "r+b") as file:
                file.truncate(last.stat().st_size - 8)

    full = small_files(2000) if failure == "disk full" else nullcontext()
    with full, pytest.raises((KeyboardInterrupt, OSError, CheckpointError)) as caught:
        es.merge_checkpoint(base, adapter, tmp_path / output, progress=progress)
    assert failure != "disk full" or "model-0000" in str(getattr(caught.value, "filename", None))
    assert listing(tmp_path) == before


def test_changed_rows_are_not_unmerged(base: Path, tmp_path: Path) -> None:
    es.merge_checkpoint(base, trained(tiny("llama-tied"), INDICES), tmp_path / "merged")
    store = ShardStore.open(tmp_path / "merged")
    name = INPUT["llama-tied"]
    row = store.read_rows(name, (3,))
    store.write_rows(name, (3,), store.read_rows(name, (4,)))
    before = listing(tmp_path)
    for dry_run in (True, False):
        with raises(PlanError, where=(tmp_path / "merged", name), expected="sha256"):
            es.unmerge_checkpoint(tmp_path / "merged", tmp_path / "back", dry_run=dry_run)
    assert listing(tmp_path) == before
    bad = [check for check in es.verify_checkpoint(tmp_path / "merged") if not check.ok]
    assert [check.name for check in bad] == ["merge 1"]
    assert name in bad[0].detail
    store.write_rows(name, (3,), row)
    es.unmerge_checkpoint(tmp_path / "merged", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)


def test_a_change_of_other_rows_survives_the_unmerge(base: Path, tmp_path: Path) -> None:
    es.merge_checkpoint(base, trained(tiny("llama-tied"), INDICES), tmp_path / "merged")
    store, name = ShardStore.open(tmp_path / "merged"), INPUT["llama-tied"]
    store.write_rows(name, (4,), store.read_rows(name, (5,)))
    es.unmerge_checkpoint(tmp_path / "merged", tmp_path / "back")
    expected = stored(base)[name]
    expected[4] = expected[5]
    assert bits(stored(tmp_path / "back")[name]) == bits(expected)


@pytest.mark.parametrize("damage", ["cut", "empty", "other table", "no facts"])
def test_a_broken_record_is_refused(damage: str, base: Path, tmp_path: Path) -> None:
    es.merge_checkpoint(base, trained(tiny("llama-tied"), INDICES), tmp_path / "merged")
    record = tmp_path / "merged/.embedsurgery/merges/0001.safetensors"
    data = record.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    if damage == "other table":
        record.write_bytes(data.replace(b"embed_tokens", b"embed_tokenz"))
    elif damage == "no facts":
        record.write_bytes(data.replace(b"written", b"writtem"))
    else:
        record.write_bytes(data[: size + 5] if damage == "cut" else b"")
    before = listing(tmp_path)
    with pytest.raises((CheckpointError, PlanError)):
        es.unmerge_checkpoint(tmp_path / "merged", tmp_path / "back")
    assert listing(tmp_path) == before
    assert [check.name for check in es.verify_checkpoint(tmp_path / "merged") if not check.ok] == ["merge 1"]


def test_the_record_describes_the_merge(base: Path, tmp_path: Path) -> None:
    adapter = trained(tiny("llama-tied"), INDICES)
    es.merge_checkpoint(base, adapter.save(tmp_path / "my adapter"), tmp_path / "merged")
    from safetensors import safe_open

    with safe_open(tmp_path / "merged/.embedsurgery/merges/0001.safetensors", "np") as record:
        body = json.loads(record.metadata()["embedsurgery.plan"])
        kept = {name: record.get_tensor(name) for name in ("0.indices", "0.rows")}
    assert body["facts"]["adapter"] == "my adapter"
    assert body["facts"]["rows"] == {INPUT["llama-tied"]: 3}
    assert kept["0.indices"].tolist() == INDICES
    assert kept["0.rows"].tobytes() == bits(stored(base)[INPUT["llama-tied"]][INDICES])


def test_an_adapter_made_from_the_checkpoint_itself(base: Path, tmp_path: Path) -> None:
    """Disk surgery needs no model: an adapter of unchanged rows merges to the same bits."""
    adapter = TrainableTokens().start(es.TrainableTokensConfig(INDICES), ShardStore.open(base), Base())
    es.merge_checkpoint(base, adapter, tmp_path / "merged")
    merged = contents(tmp_path / "merged")
    del merged[".embedsurgery/merges/0001.safetensors"]
    assert merged == contents(base)

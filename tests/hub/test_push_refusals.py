"""``merge --push`` refuses what ``merge -o`` and ``--in-place`` refuse, with the same error, and pushes nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import embedsurgery as es
from embedsurgery.checkpoints.hub_merging import push_merged
from embedsurgery.errors import EmbedSurgeryError, PlanError
from tests.support.baked import start
from tests.support.comparing import contents
from tests.support.hub.loopback import Hub
from tests.support.models import save, tiny, trained

BASE, MERGED = "team/refused", "team/merged"
HEAD = "lm_head.weight"
Case = tuple[Path, list[Any], dict[str, Any]]


def another_base(tmp_path: Path) -> Case:
    return save(tiny("llama-untied"), tmp_path / "base"), [trained(tiny("llama-untied", seed=9), [5])], {}


def merged_already(tmp_path: Path) -> Case:
    adapter = trained(tiny("llama-untied"), [5, 7])
    base = save(tiny("llama-untied"), tmp_path / "first")
    es.merge_checkpoint(base, adapter, tmp_path / "base")
    return tmp_path / "base", [adapter], {}


def the_same_rows(tmp_path: Path) -> Case:
    model = tiny("llama-untied")
    return save(model, tmp_path / "base"), [trained(model, [5, 7]), trained(model, [7], seed=3)], {}


def not_a_number(tmp_path: Path) -> Case:
    model = tiny("llama-untied")
    attachment = es.attach(model, es.TrainableTokensConfig([5]))
    with torch.no_grad():
        next(attachment.parameters())[0, 3] = float("nan")
    adapter = attachment.adapter()
    attachment.detach()
    return save(model, tmp_path / "base"), [adapter], {}


def equal_tables(tmp_path: Path) -> Case:
    """A config that claims a tie, two stored tables that differ in one row, and an adapter that makes them equal."""
    model = tiny("llama-untied")
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
        model.lm_head.weight[5] += 1
    model.config.tie_word_embeddings = False
    base = save(model, tmp_path / "base")
    config = (base / "config.json").read_text()
    (base / "config.json").write_text(config.replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    attachment = es.attach(model, es.TrainableTokensConfig([5]))
    with torch.no_grad():
        next(attachment.parameters()).copy_(model.lm_head.weight[5:6])
    adapter = attachment.adapter()
    attachment.detach()
    return base, [adapter], {}


def no_place_for_a_prefix(tmp_path: Path) -> Case:
    """A prompt whose prefix cannot be added to the tokenizer's files: the tokenizer's class sets the post-processor."""
    started = start("llama-tied", tmp_path)
    file = started.folder / "tokenizer_config.json"
    file.write_text('{"tokenizer_class": "LukeTokenizer"}')
    return started.folder, [started.adapter], {"bake": es.BakeConfig(prefix="text")}


def unknown_option(tmp_path: Path) -> Case:
    model = tiny("llama-untied")
    return save(model, tmp_path / "base"), [trained(model, [5])], {"on_conflict": "first"}


CASES: list[Callable[[Path], Case]] = [
    another_base,
    merged_already,
    the_same_rows,
    not_a_number,
    equal_tables,
    no_place_for_a_prefix,
    unknown_option,
]


def refusal(work: Callable[[], object]) -> EmbedSurgeryError:
    with pytest.raises(EmbedSurgeryError) as caught:
        work()
    return caught.value


@pytest.mark.filterwarnings("ignore:.*have these files mapped:embedsurgery.errors.EmbedSurgeryWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_same_is_refused(case: Callable[[Path], Case], hub: Hub, tmp_path: Path) -> None:
    base, adapters, options = case(tmp_path)
    hub.add(BASE, contents(base))
    before = contents(base)
    local = refusal(lambda: es.merge_checkpoint(base, adapters, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()
    in_place = shutil.copytree(base, tmp_path / "in-place")
    other = refusal(lambda: es.merge_checkpoint(in_place, adapters, in_place=True, **options))
    assert contents(in_place) == before
    remote = refusal(lambda: push_merged(BASE, adapters, MERGED, **options))
    assert MERGED not in hub.repos
    for error in (other, remote):
        assert type(error) is type(local)
        assert error.what == local.what
        assert error.expected == local.expected
        assert str(error.found).replace(str(in_place), str(base)) == str(local.found)


def test_a_prefix_that_does_not_work_is_refused(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prefix is tried with the tokenizers library before anything is pushed."""

    def check_prefix(directory: Path, prefix: Any) -> None:
        raise PlanError("the prefix does not work", where=directory, found=prefix.label)

    monkeypatch.setattr("embedsurgery.tokenizer.patching.check_prefix", check_prefix)
    started = start("llama-tied", tmp_path)
    hub.add(BASE, contents(started.folder))
    for work in (
        lambda: es.merge_checkpoint(started.folder, started.adapter, tmp_path / "out"),
        lambda: push_merged(BASE, [started.adapter], MERGED),
    ):
        assert refusal(work).what == "the prefix does not work"
    assert not (tmp_path / "out").exists()
    assert MERGED not in hub.repos

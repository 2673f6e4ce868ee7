"""Ids instead of paths: what is downloaded for them, and where an id is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import embedsurgery as es
from embedsurgery.adapters.adapter import WEIGHTS_NAME
from embedsurgery.checkpoints.hub_merging import push_merged
from embedsurgery.cli.show import show
from embedsurgery.errors import BaseMismatchError, CheckpointError, ConfigError, EmbedSurgeryWarning, HubError
from embedsurgery.hub import using_token
from embedsurgery.loading import open_store
from tests.support.comparing import contents
from tests.support.errors import raises
from tests.support.hub.answers import cuts, says, shortens, spoils, when
from tests.support.hub.loopback import READER, WRITER, Hub
from tests.support.hub.repositories import BASE, REPO, point
from tests.support.hub.secrets import raises_safely
from tests.support.models import save, tiny, trained

MERGED = "team/merged"


@pytest.fixture
def merged(hub: Hub, base: Path, adapter: es.Adapter, tmp_path: Path) -> Path:
    """The model with the adapter baked in, in a directory and on the Hub."""
    es.merge_checkpoint(base, adapter, tmp_path / "merged")
    hub.add(MERGED, contents(tmp_path / "merged"))
    hub.log.clear()
    return tmp_path / "merged"


def whole_downloads(hub: Hub) -> list[str]:
    """List the large files that were downloaded whole."""
    return [r.path for r in hub.seen("GET .*signature") if "range" not in r.headers]


def test_unmerge_of_an_id(hub: Hub, base: Path, merged: Path, tmp_path: Path) -> None:
    report = es.unmerge_checkpoint(MERGED, tmp_path / "back")
    assert report.done
    assert contents(tmp_path / "back") == contents(base)
    assert es.unmerge_checkpoint(f"{MERGED}@main", None, dry_run=True).rows == {"model.embed_tokens.weight": 2}


def test_unmerge_of_an_id_where_nothing_was_merged(hub: Hub, base: Path, pushed: str, tmp_path: Path) -> None:
    with raises_safely(CheckpointError, where=f"{BASE}@") as caught:
        es.unmerge_checkpoint(BASE, tmp_path / "back")
    assert "/embedsurgery-" not in str(caught.value)
    with raises(CheckpointError, where=f"{REPO}@", found=WEIGHTS_NAME):
        es.unmerge_checkpoint(REPO, tmp_path / "back")
    with raises(HubError, where="team/nothing", found="404"):
        es.unmerge_checkpoint("team/nothing", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_verify_of_an_id_is_that_of_the_directory(hub: Hub, merged: Path) -> None:
    assert es.verify_checkpoint(MERGED) == es.verify_checkpoint(merged)
    assert [Path(path).name for path in whole_downloads(hub)] == [
        f"{hub.repos[MERGED].tree(hub.repos[MERGED].branches['main'])['.embedsurgery/merges/0001.safetensors'].sha256}"
        "?signature=secretsecret"
    ]


def test_verify_of_an_id_names_what_disagrees(hub: Hub, base: Path, merged: Path, pushed: str) -> None:
    shard = next(f for f in sorted(base.glob("*.safetensors")) if f.read_bytes() != (merged / f.name).read_bytes())
    hub.add(MERGED, {shard.name: shard.read_bytes()})  # the base's rows under the record of a merge
    wrong = [check for check in es.verify_checkpoint(MERGED) if not check.ok]
    assert [check.name for check in wrong] == ["merge 1"]
    assert all(word in wrong[0].detail for word in (MERGED, "model.embed_tokens.weight"))
    with raises(CheckpointError, where=f"{REPO}@", found=WEIGHTS_NAME):
        es.verify_checkpoint(REPO)
    with raises(HubError, where="team/nothing", found="404"):
        es.verify_checkpoint("team/nothing")


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2", "bert"])
def test_show_compares_with_a_model_of_which_only_rows_come(hub: Hub, tmp_path: Path, kind: str) -> None:
    model = tiny(kind)
    folder = save(model, tmp_path / "model")
    hub.add("team/model", contents(folder))
    adapter = trained(model, [3, 5, 30]).save(tmp_path / "adapter")
    assert show(adapter, Path("team/model")) == show(adapter, folder)
    assert not whole_downloads(hub)
    other = save(tiny(kind, seed=5), tmp_path / "other")
    hub.add("team/other", contents(other))
    with pytest.raises(BaseMismatchError):
        show(adapter, Path("team/other"))


def test_rows_by_ranges_are_the_rows(hub: Hub, tmp_path: Path) -> None:
    """Rows, blocks, vectors and ties, with tensors far apart, of which nothing else comes."""
    model = tiny("bert")
    folder = save(model, tmp_path / "model")
    hub.add("team/model", contents(folder))
    with open_store(folder) as local, open_store("team/model") as remote:
        assert remote.graph.tables == local.graph.tables
        for table in local.graph.tables:
            name = local.copies(table)[0]
            rows = (0, table.shape[0] - 1, 1)
            assert remote.read_rows(name, rows) == local.read_rows(name, rows)
            assert remote.read_block(name, 1, 3) == local.read_block(name, 1, 3)
        vectors = [v for vocabulary in local.graph.vocabularies for v in vocabulary.vectors]
        assert vectors
        assert all(remote.read_vector(v) == local.read_vector(v) for v in vectors)
        count = len(hub.log)
        remote.read_rows(name, rows)
        assert len(hub.log) == count


def test_a_byte_range_that_is_too_short_is_refused(hub: Hub, base: Path, adapter: es.Adapter, tmp_path: Path) -> None:
    folder = adapter.save(tmp_path / "adapter")
    hub.rules.append(
        lambda request, go: (
            shortens(8)(go)
            if request.headers.get("range", "bytes=0-")[:8] != "bytes=0-" and "signature" in request.path
            else None
        )
    )
    with raises_safely(where=f"{BASE}@", expected="bytes", found="8 bytes", hint="try again"):
        show(folder, Path(BASE))


def test_tokens_are_added_to_an_id(hub: Hub, base: Path, tmp_path: Path) -> None:
    report = es.add_tokens_checkpoint(BASE, ["<tool>"], tmp_path / "remote", seed=3)
    assert report.tokens == {"<tool>": 40}
    es.add_tokens_checkpoint(base, ["<tool>"], tmp_path / "local", seed=3)
    one, two = contents(tmp_path / "remote"), contents(tmp_path / "local")
    assert {k: v for k, v in one.items() if "merges" not in k} == {k: v for k, v in two.items() if "merges" not in k}
    with raises(ConfigError, where=f"{BASE}@"):
        es.add_tokens_checkpoint(BASE, ["t3"], tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_extract_from_ids(hub: Hub, base: Path, merged: Path, adapter: es.Adapter) -> None:
    found = es.extract_checkpoint(BASE, MERGED)
    assert found.rows["model.embed_tokens.weight"] == 2
    assert found.adapter is not None
    local = es.extract_checkpoint(base, merged)
    assert local.adapter is not None
    assert found.adapter.raw == local.adapter.raw
    head = hub.repos[BASE].branches["main"]
    assert (found.adapter.manifest.base_model, found.adapter.manifest.revision) == (BASE, head)
    assert es.extract_checkpoint(BASE, f"{BASE}@{head}").adapter is None


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_extract_from_a_peft_adapter_of_an_id(hub: Hub, base: Path, model: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(
        tiny("llama-untied"), LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    )
    weight = tuned.base_model.model.model.embed_tokens.modules_to_save["default"].weight
    weight.data[9] += 1
    tuned.save_pretrained(tmp_path / "peft")
    hub.add("team/tuned", contents(tmp_path / "peft"))
    found = es.extract_checkpoint(BASE, "team/tuned")
    assert found.adapter is not None
    assert found.adapter.manifest.tables[0].indices == (9,)
    assert found.adapter.raw == es.extract_checkpoint(base, tmp_path / "peft").adapter.raw


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        (cuts(100), {"found": "RemoteProtocolError"}),
        (spoils, {"found": None, "hint": "Hub cache"}),
        (shortens(100), {"expected": "bytes", "found": "100 bytes"}),
        (says(500), {"found": "500"}),
    ],
)
def test_a_download_that_fails_leaves_no_half_checkpoint(
    hub: Hub, base: Path, pushed: str, tmp_path: Path, change: Any, fields: dict[str, str | None]
) -> None:
    before = sorted(tmp_path.iterdir())
    rule = when("GET .*signature", change)
    hub.rules.append(lambda request, go: None if "range" in request.headers else rule(request, go))
    for call in (
        lambda out: es.merge_checkpoint(BASE, REPO, out),
        lambda out: es.unmerge_checkpoint(BASE, out),
        lambda out: es.add_tokens_checkpoint(BASE, ["<x>"], out),
        lambda out: push_merged(BASE, [REPO], MERGED),
    ):
        with raises_safely(**fields):
            call(tmp_path / "out")
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "hf-home"] == [
        path for path in before if path.name != "hf-home"
    ]
    assert MERGED not in hub.repos


def test_offline_all_reads_come_from_the_cache(
    hub: Hub, base: Path, adapter: es.Adapter, pushed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    es.merge_checkpoint(BASE, REPO, tmp_path / "out")
    count = len(hub.log)
    point(monkeypatch, hub.url, tmp_path / "hf-home", offline=True)
    folder = adapter.save(tmp_path / "adapter")
    with pytest.warns(EmbedSurgeryWarning, match=f"{BASE}@"):
        assert show(folder, Path(BASE))["tables"] == show(folder, base)["tables"]
    with pytest.warns(EmbedSurgeryWarning, match=f"{BASE}@"):
        assert es.verify_checkpoint(BASE) == es.verify_checkpoint(base)
    with pytest.warns(EmbedSurgeryWarning, match=f"{BASE}@"):
        assert es.walk(BASE).tables == es.walk(base).tables
    assert len(hub.log) == count


def test_using_token_applies_to_every_request(
    hub: Hub, base: Path, pushed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos[BASE].private = hub.repos[REPO].private = True
    monkeypatch.delenv("HF_TOKEN")
    with using_token(READER):
        assert es.walk(BASE).tables
        assert es.load(REPO).source
        assert all(check.ok for check in es.verify_checkpoint(BASE))
        with raises(HubError, where="team/new", found="403"):
            es.push(es.load(REPO), "team/new")
        assert es.push(es.load(REPO), "team/new", token=WRITER).created
    with raises(HubError, where=BASE, hint="HF_TOKEN"):
        es.walk(BASE)


def test_where_an_id_is_refused(hub: Hub, base: Path, pushed: str, model: Any, tmp_path: Path) -> None:
    with raises(ConfigError, expected="an Adapter or a directory", found=REPO):
        es.push(REPO, "team/copy")
    with raises(ConfigError, expected="org/name@revision", found=str(tmp_path)):
        es.pull(str(tmp_path))
    with raises(ConfigError, expected="org/name@revision", found=str(base)):
        push_merged(str(base), [REPO], MERGED)
    with raises(ConfigError, found=f"{REPO}@v1", hint="revision="):
        es.push(trained(model, [1]), f"{REPO}@v1")
    with raises(ConfigError, expected="Adapter", found="str"):
        es.merge(model, REPO)
    assert not hub.seen("POST|PUT")


def test_a_directory_of_an_ids_name_wins(hub: Hub, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, BASE)
    assert es.verify_checkpoint(BASE) == es.verify_checkpoint(base)
    assert es.walk(BASE).tables
    assert not hub.log


def test_an_output_below_a_file_is_refused(hub: Hub, pushed: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((es.errors.EmbedSurgeryError, OSError)) as caught:
        es.pull(REPO, output=tmp_path / "file" / "rows")
    assert "Bearer" not in str(caught.value)
    assert (tmp_path / "file").read_text() == ""
    assert json.loads(json.dumps(str(caught.value)))
    assert WEIGHTS_NAME not in str(sorted(tmp_path.iterdir()))

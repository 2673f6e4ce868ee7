"""Models by their id: headers by range requests, merges of what is downloaded, merges pushed from Hub to Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import embedsurgery as es
from embedsurgery.checkpoints.hub_merging import push_merged
from embedsurgery.errors import (
    BaseMismatchError,
    CheckpointError,
    ConfigError,
    EmbedSurgeryWarning,
    HubError,
    OutputExistsError,
)
from embedsurgery.files.safetensors import encode_header
from embedsurgery.hub.ids import HubId
from embedsurgery.hub.range_store import open_remote
from embedsurgery.stores.checkpoint import INDEX, SINGLE, open_checkpoint
from tests.support.baked import start
from tests.support.comparing import contents, listing
from tests.support.errors import raises
from tests.support.hub.answers import says, when
from tests.support.hub.loopback import Hub
from tests.support.hub.repositories import BASE, REPO, point
from tests.support.models import save, tiny, trained

MERGED = "team/merged"


@pytest.fixture
def big(hub: Hub) -> str:
    """A model whose one file is 64 MB of zeros, with a header longer than the first request."""
    tensors = {"model.embed_tokens.weight": ("F32", (1000, 8000))}
    tensors.update({f"model.layers.{i}.mlp.up_proj.weight": ("F32", (100, 100)) for i in range(800)})
    config = {
        "model_type": "llama",
        "vocab_size": 1000,
        "tie_word_embeddings": True,
        "architectures": ["LlamaForCausalLM"],
    }
    hub.add(
        "team/big",
        {
            "model.safetensors": encode_header(tensors, {}) + bytes(4 * (8_000_000 + 800 * 10_000)),
            "config.json": json.dumps(config).encode(),
        },
    )
    return "team/big"


def test_a_graph_from_kilobytes(hub: Hub, big: str) -> None:
    graph = es.walk(big)
    assert [(t.name, t.shape, t.dtype) for t in graph.tables] == [("model.embed_tokens.weight", (1000, 8000), "F32")]
    assert hub.moved() < 150_000
    assert len(hub.seen("GET .*signature")) == 2


def test_the_graph_is_the_directorys(hub: Hub, base: Path) -> None:
    assert es.walk(BASE).tables == es.walk(base).tables
    remote, local = open_remote(HubId(BASE)).checkpoint, open_checkpoint(base)
    assert (remote.headers, remote.location, remote.config) == (local.headers, local.location, local.config)
    assert not [r for r in hub.seen("GET .*signature") if "range" not in r.headers]


TWO = b'{"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}'


def holds(*names: str) -> bytes:
    """A safetensors file with these tensors, of a number each."""
    return encode_header(dict.fromkeys(names, ("F32", (1,))), {}) + bytes(4 * len(names))


@pytest.mark.parametrize(
    ("files", "fields"),
    [
        (
            {"adapter_model.safetensors": b"x"},
            {"expected": "model.safetensors", "found": "adapter_model.safetensors", "hint": "base model"},
        ),
        ({"pytorch_model.bin": b"x"}, {"expected": (SINGLE, INDEX), "hint": ("pickles", "safetensors")}),
        ({"README.md": b"x"}, {"expected": (SINGLE, INDEX), "found": "none", "hint": "transformers"}),
        ({SINGLE: b"short"}, {"where": SINGLE, "expected": "header", "found": "5 bytes"}),
        (
            {SINGLE: (10**9).to_bytes(8, "little") + b"{}"},
            {"where": SINGLE, "expected": "header", "found": "10 bytes"},
        ),
        ({INDEX: b'{"weight_map": {"a": "../x.safetensors"}}'}, {"where": INDEX, "found": "../x.safetensors"}),
        ({INDEX: b'{"weight_map": {"a": "x.safetensors"}}'}, {"expected": "x.safetensors"}),
        ({INDEX: b"{}"}, {"where": INDEX}),
        (
            {INDEX: TWO, "x.safetensors": holds("a"), "y.safetensors": holds("a", "b")},
            {"found": ("x.safetensors", "y.safetensors")},
        ),
        ({INDEX: TWO, "x.safetensors": holds("b"), "y.safetensors": holds("a")}, {"expected": "a in x.safetensors"}),
        ({SINGLE: b"x", INDEX: b"{}"}, {"found": (SINGLE, INDEX)}),
    ],
)
def test_repositories_that_hold_no_model(hub: Hub, files: dict[str, bytes], fields: dict[str, object]) -> None:
    hub.add("team/odd", files)
    with raises(CheckpointError, **fields):
        es.walk("team/odd")


@pytest.mark.parametrize("verb", ["merge", "unmerge", "add tokens"])
def test_an_invalid_output_is_refused_before_any_request(hub: Hub, big: str, tmp_path: Path, verb: str) -> None:
    (tmp_path / "existing").mkdir()
    run = {
        "merge": lambda output: es.merge_checkpoint(big, REPO, output),
        "unmerge": lambda output: es.unmerge_checkpoint(big, output),
        "add tokens": lambda output: es.add_tokens_checkpoint(big, "<tool>", output),
    }[verb]
    with pytest.raises(OutputExistsError):
        run(tmp_path / "existing")
    with raises(ConfigError, expected="directory"):
        run(None)
    assert not hub.log


def test_merge_of_ids_is_the_merge_of_directories(
    hub: Hub, base: Path, pushed: str, adapter: es.Adapter, tmp_path: Path
) -> None:
    hub.add(BASE, {"pytorch_model.bin": b"a pickle" * 1000, "onnx/model.onnx": b"x" * 1000})
    es.merge_checkpoint(base, adapter, tmp_path / "local")
    report = es.merge_checkpoint(BASE, REPO, tmp_path / "remote")
    assert report.done
    local, remote = contents(tmp_path / "local"), contents(tmp_path / "remote")
    record = ".embedsurgery/merges/0001.safetensors"
    assert local.keys() == remote.keys()
    assert record in local
    assert {k: v for k, v in local.items() if k != record} == {k: v for k, v in remote.items() if k != record}
    assert f"{REPO}@{pushed}".encode() in remote[record]
    assert not hub.seen("pytorch_model.bin|onnx/")
    assert not any(path.is_symlink() for path in (tmp_path / "remote").rglob("*"))
    es.unmerge_checkpoint(tmp_path / "remote", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)


def test_merge_of_ids_offline(
    hub: Hub, base: Path, pushed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    es.merge_checkpoint(BASE, REPO, tmp_path / "one")
    count = len(hub.log)
    point(monkeypatch, hub.url, tmp_path / "hf-home", offline=True)
    with pytest.warns(EmbedSurgeryWarning, match=r"team/base@\w{12} .*1\d files"):
        es.merge_checkpoint(BASE, REPO, tmp_path / "two")
    assert len(hub.log) == count
    weights = {k: v for k, v in contents(tmp_path / "one").items() if "merges" not in k}
    assert weights == {k: v for k, v in contents(tmp_path / "two").items() if "merges" not in k}


def downloaded_shards(hub: Hub) -> set[str]:
    return {r.path.split("?")[0].rpartition("/")[2] for r in hub.seen("GET .*signature") if "range" not in r.headers}


def test_only_changed_shards_are_transferred(
    hub: Hub, base: Path, adapter: es.Adapter, pushed: str, tmp_path: Path
) -> None:
    hub.add(BASE, {"pytorch_model.bin": b"stale"})
    report = push_merged(BASE, [REPO], MERGED, tag="v1")
    es.merge_checkpoint(base, adapter, tmp_path / "local")
    pushed_files, local = hub.repos[MERGED].files(), contents(tmp_path / "local")
    record = ".embedsurgery/merges/0001.safetensors"
    assert pushed_files.keys() == local.keys() | {".gitattributes"}
    mine = (record, ".gitattributes", "README.md")
    assert {k: v for k, v in pushed_files.items() if k not in mine} == {k: v for k, v in local.items() if k not in mine}
    shards = {name for name in local if name.endswith(".safetensors") and name != record}
    (touched,) = {name for name in shards if local[name] != (base / name).read_bytes()}
    assert set(report.copied) == shards - {touched}
    assert len(shards) > 3
    assert touched in report.uploaded
    assert record in report.uploaded
    base_files = hub.repos[BASE].tree(hub.repos[BASE].branches["main"])
    assert downloaded_shards(hub) - {hub.repos[REPO].tree(pushed)["adapter_model.safetensors"].sha256} == {
        base_files[touched].sha256
    }
    assert len(hub.repos[MERGED].commits) == 2
    assert hub.repos[MERGED].tags["v1"] == report.sha
    assert hub.repos[MERGED].private
    assert report.left_out == ("pytorch_model.bin",)
    card = pushed_files["README.md"].decode()
    assert f"base_model:\n- {BASE}\nbase_model_relation: merge\n" in card
    assert "set 2 rows" in card
    es.unmerge_checkpoint(save_from(hub, MERGED, tmp_path / "down"), tmp_path / "back")
    back = contents(tmp_path / "back")
    assert all(back[name] == (base / name).read_bytes() for name in shards)


def test_transferred_bytes_are_counted(hub: Hub, base: Path, pushed: str) -> None:
    """A table of kilobytes among megabytes, merged from repository to repository."""
    big = {"model.layers.0.mlp.big_proj.weight": ("F32", (1000, 5000))}
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"].update(dict.fromkeys(big, "big.safetensors"))
    hub.add(
        BASE,
        {
            "big.safetensors": encode_header(big, {}) + bytes(20_000_000),
            "model.safetensors.index.json": json.dumps(index).encode(),
        },
    )
    hub.log.clear()
    report = push_merged(BASE, [REPO], MERGED)
    touched = index["weight_map"]["model.embed_tokens.weight"]
    size = (base / touched).stat().st_size
    files = hub.repos[MERGED].files()
    assert "big.safetensors" in report.copied
    assert len(files["big.safetensors"]) > 20_000_000
    down = [r for r in hub.seen("GET .*signature") if "range" not in r.headers]
    rows = len(hub.repos[REPO].files()["adapter_model.safetensors"])
    assert sum(r.sent for r in down) == size + rows
    up = sum(len(r.body) for r in hub.seen("PUT "))
    assert up == size + len(files[".embedsurgery/merges/0001.safetensors"])
    assert hub.moved() < 150_000


def test_what_the_hub_does_not_copy_is_downloaded_and_uploaded(hub: Hub, base: Path, pushed: str) -> None:
    hub.copies = False
    report = push_merged(BASE, [REPO], MERGED)
    assert report.copied == ()
    assert len(hub.repos[MERGED].files()) > 5
    hub.copies = True

    def failed(go: Any) -> Any:
        answer = go()
        answer.body = json.dumps({"failed": [{"sha256": "0", "error": "another region"}]}).encode()
        return answer

    hub.rules.append(when("lfs-files/duplicate", failed))
    with pytest.warns(EmbedSurgeryWarning, match="team/far"):
        other = push_merged(BASE, [REPO], "team/far")
    same = {k: v for k, v in hub.repos["team/far"].files().items() if "merges" not in k and k != "README.md"}
    assert same.items() <= hub.repos[MERGED].files().items()
    assert other.copied == ()


def test_a_merge_that_cannot_be_pushed_leaves_nothing(hub: Hub, base: Path, pushed: str, model: Any) -> None:
    with raises(ConfigError, found=BASE, hint="revision"):
        push_merged(BASE, [REPO], BASE)
    other = trained(tiny("llama-untied", seed=9), [5, 7])
    with pytest.raises(BaseMismatchError):
        push_merged(BASE, [other], MERGED)
    with raises(es.errors.PlanError, found=("7", "model.embed_tokens.weight", REPO)):
        push_merged(BASE, [REPO, trained(model, [7], seed=3)], MERGED)
    assert MERGED not in hub.repos
    hub.add(MERGED, {"model.safetensors": b"another model"})
    with raises(HubError, where=MERGED, found="model.safetensors"):
        push_merged(BASE, [REPO], MERGED)
    hub.rules.append(when("POST .*/commit/", says(500)))
    with raises(HubError, where="team/third", found="500"):
        push_merged(BASE, [REPO], "team/third")
    assert set(hub.repos["team/third"].files()) == {".gitattributes"}


def test_a_tied_adapter_on_an_untied_base_is_refused_without_the_head(hub: Hub, base: Path) -> None:
    with pytest.raises(BaseMismatchError):
        push_merged(BASE, [trained(tiny("llama-tied"), [5, 7])], MERGED)


def test_two_adapters_and_a_second_merge(hub: Hub, base: Path, model: Any, tmp_path: Path) -> None:
    one, two = trained(model, [5]), trained(model, [9], seed=2)
    push_merged(BASE, [one, two], MERGED)
    es.merge_checkpoint(base, [one, two], tmp_path / "local")
    weights = {k: v for k, v in contents(tmp_path / "local").items() if k.endswith(".safetensors") and "/" not in k}
    assert weights.items() <= hub.repos[MERGED].files().items()
    merged = save_from(hub, MERGED, tmp_path / "merged")
    assert len(listing(merged / ".embedsurgery" / "merges")) == 2
    three = trained(model, [11], seed=3)
    push_merged(MERGED, [three], "team/again")
    assert ".embedsurgery/merges/0003.safetensors" in hub.repos["team/again"].files()


def save_from(hub: Hub, name: str, folder: Path) -> Path:
    for path, data in hub.repos[name].files().items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def test_new_tokens_are_pushed_with_the_tokenizer(hub: Hub, tmp_path: Path) -> None:
    model = tiny("llama-untied")
    folder = save(model, tmp_path / "base", shards=True)
    hub.add("team/grow", contents(folder))
    es.add_tokens_checkpoint(folder, ["<tool>"], tmp_path / "grown")
    found = es.extract_checkpoint(folder, tmp_path / "grown")
    assert found.adapter is not None
    assert found.adapter.manifest.new_tokens is not None
    report = push_merged("team/grow", [found.adapter], MERGED)
    es.merge_checkpoint(folder, found.adapter, tmp_path / "local")
    local = {k: v for k, v in contents(tmp_path / "local").items() if "merges" not in k and k != "README.md"}
    assert local.items() <= hub.repos[MERGED].files().items()
    assert report.copied
    assert "tokenizer.json" in report.uploaded


def test_the_log_of_an_id_reads_the_headers_of_records_alone(
    hub: Hub, base: Path, adapter: es.Adapter, tmp_path: Path
) -> None:
    es.merge_checkpoint(base, (adapter, 0.5), tmp_path / "merged")
    hub.add("team/merged", contents(tmp_path / "merged"))
    assert es.list_merges("team/merged") == es.list_merges(tmp_path / "merged")
    assert [record.weight for record in es.list_merges("team/merged")] == [0.5]
    assert not hub.seen(r"/model.*\.safetensors")
    assert es.list_merges(BASE) == ()
    es.unmerge_checkpoint("team/merged", tmp_path / "back", all=True)
    assert contents(tmp_path / "back") == contents(base)


def test_weights_go_along_when_a_merge_is_pushed(
    hub: Hub, base: Path, adapter: es.Adapter, pushed: str, tmp_path: Path
) -> None:
    es.merge_checkpoint(base, (adapter, 0.5), tmp_path / "local")
    push_merged(BASE, [(adapter, 0.5)], MERGED)
    (record,) = es.list_merges(MERGED)
    assert record.weight == 0.5
    es.unmerge_checkpoint(MERGED, tmp_path / "back")
    found = save_from(hub, MERGED, tmp_path / "down")
    local = contents(tmp_path / "local")
    assert {
        k: v for k, v in contents(found).items() if k in local and k.endswith("safetensors") and "merges" not in k
    } == {k: v for k, v in local.items() if k.endswith("safetensors") and "merges" not in k}


_OWN = ("README.md", ".gitattributes")


def test_a_soft_prompt_is_baked_and_pushed(hub: Hub, tmp_path: Path) -> None:
    """As in a directory: shards, tokenizer, a head of its own, generation config and all."""
    started = start("llama-tied", tmp_path, shards=True)
    hub.add("team/soft", contents(started.folder))
    bake = es.BakeConfig(name="poet")
    push_merged("team/soft", [started.adapter], MERGED, bake=bake)
    es.merge_checkpoint(started.folder, started.adapter, tmp_path / "out", bake=bake)
    found = {name: data for name, data in hub.repos[MERGED].files().items() if name not in _OWN}
    expected = contents(tmp_path / "out")
    assert found.keys() == expected.keys()
    kept = [name for name in found if not name.startswith(".embedsurgery/")]
    assert {name: found[name] for name in kept} == {name: expected[name] for name in kept}

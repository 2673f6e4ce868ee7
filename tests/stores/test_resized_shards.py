"""Growing the files of a checkpoint: headers, small files, hard links, modes, failures and memory."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from embedsurgery.errors import CheckpointError, PlanError, UnsupportedError
from embedsurgery.files.safetensors import read_header
from embedsurgery.plan import AddTokens, Grow, PatchFile, Plan, SetRows, Token, Undo
from embedsurgery.stores.apply import apply
from embedsurgery.stores.checks import check_plan
from embedsurgery.stores.shards import ShardStore
from embedsurgery.stores.store import rows_of
from embedsurgery.tensors.convert import from_raw, to_raw
from tests.support.comparing import bits, contents, listing
from tests.support.errors import raises
from tests.support.models import tiny, write_tokenizer
from tests.support.processes import python

V, D, N = 11, 6, 2
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CONFIG = """{
   "architectures":["LlamaForCausalLM"], "vocab_size" :  11,
 "hidden_size": 6, "max_position_embeddings": 11, "bos_token_id": 11, "name": "\\u00e9t\\u00e9 11 \\"vocab_size\\": 11",
 "text_config": {"vocab_size": 11, "rope": [11, 11.0, null], "pad_vocab_size": 11},
 "vision_config": {"vocab_size": 11}, "audio_config": {"text_config": {"vocab_size": 11}},
 "decoder": {"vocab_size": 12},
 "tie_word_embeddings": false }\t
"""
AFTER = CONFIG.replace('"vocab_size" :  11', '"vocab_size" :  13').replace(
    '{"vocab_size": 11, "rope"', '{"vocab_size": 13, "rope"'
)


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards with input and output table in different ones, and small files with odd spelling."""
    folder = tmp_path / "model"
    folder.mkdir()
    first = {"a.norm.weight": numbers(D, dtype=torch.float32), HEAD: numbers(V, D, seed=1), "lm_head.bias": numbers(V)}
    second = {EMBED: numbers(V, D, seed=2), "model.z.weight": numbers(D, D, seed=3)}
    parts = {"model-00001-of-00002.safetensors": first, "model-00002-of-00002.safetensors": second}
    for name, part in parts.items():
        save_file(part, folder / name, {"format": "pt"})
    total = sum(t.numel() * t.itemsize for part in parts.values() for t in part.values())
    elements = sum(t.numel() for part in parts.values() for t in part.values())
    places = ",\n".join(f'  "{key}" : "{name}"' for name, part in parts.items() for key in part)
    (folder / "model.safetensors.index.json").write_text(
        f'{{"weight_map":{{{places}}},"metadata":{{ "total_parameters": {elements}, "total_size":  {total}}}}}'
    )
    (folder / "config.json").write_text(CONFIG)
    (folder / "generation_config.json").write_text('{"vocab_size": 11}')
    return folder


def growth(count: int = N) -> Grow:
    rows = {EMBED: to_raw(numbers(count, D, seed=5)), HEAD: to_raw(numbers(count, D, seed=6))}
    return Grow(EMBED, count, rows, {"lm_head.bias": to_raw(numbers(count, seed=7))})


def test_small_files_change_only_where_they_must(folder: Path) -> None:
    before = contents(folder)
    undo = apply(Plan((growth(),)), ShardStore.open(folder))
    after = contents(folder)
    assert after.keys() == before.keys()
    assert after["config.json"].decode() == AFTER
    assert after["generation_config.json"] == before["generation_config.json"]
    index = "model.safetensors.index.json"
    more = 2 * N * D + N
    old, new = (json.loads(state[index])["metadata"] for state in (before, after))
    assert new == {"total_parameters": old["total_parameters"] + more, "total_size": old["total_size"] + 2 * more}
    spelled = before[index].decode().replace(f'": {old["total_parameters"]},', f'": {new["total_parameters"]},')
    assert after[index].decode() == spelled.replace(f'":  {old["total_size"]}}}', f'":  {new["total_size"]}}}')
    stored = sum(len(data) - read_header(folder / name).size for name, data in after.items() if "00002.s" in name)
    assert stored == new["total_size"]
    apply(undo, ShardStore.open(folder))
    assert contents(folder) == before


ODD_HEADER = (
    ' {"z" :{"data_offsets": [132 ,136], "dtype":"F32","shape":[ ]},\n"__metadata__":{"b":"1","a":"data_offsets"},'
    '"model.embed_tokens.weight":{"shape" : [ 11, 6 ],"note":{"shape":[11],"data_offsets":[0,132]},"dtype":"BF16",'
    '"data_offsets":[0,132]}, "caf\\u00e9\\u0000\\"shape\\":[1]":'
    '{"dtype":"U8","shape":[3,1],"data_offsets":[136,139]}}  \t'
)


def odd_file(folder: Path, padding: int = 0) -> Path:
    blob = ODD_HEADER.encode() + b" " * padding
    data = bits(numbers(V, D)) + bits(torch.tensor([1.5])) + b"\x01\x02\x03"
    path = folder / "model.safetensors"
    path.write_bytes(len(blob).to_bytes(8, "little") + blob + data)
    return path


@pytest.mark.parametrize("padding", range(9))
def test_a_header_keeps_its_spelling(padding: int, tmp_path: Path) -> None:
    path = odd_file(tmp_path, padding)
    before, old = path.read_bytes(), load_file(path)
    new = numbers(N, D, seed=5)
    undo = apply(Plan((Grow(EMBED, N, {EMBED: to_raw(new)}, {}),)), ShardStore.open(tmp_path))
    data = path.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    expected = ODD_HEADER.replace("[132 ,136]", "[156 ,160]").replace("[136,139]", "[160,163]")
    expected = expected.replace("[ 11, 6 ]", "[ 13, 6 ]").replace(
        '"BF16","data_offsets":[0,132]', '"BF16","data_offsets":[0,156]'
    )
    assert data[8:size].decode().rstrip() == expected.rstrip()
    assert size % 8 == 0
    found = load_file(path)
    assert bits(found.pop(EMBED)) == bits(old.pop(EMBED)) + bits(new)
    assert {name: bits(t) for name, t in found.items()} == {name: bits(t) for name, t in old.items()}
    redo = apply(undo, ShardStore.open(tmp_path))
    assert path.read_bytes() == before
    apply(redo, ShardStore.open(tmp_path))
    assert path.read_bytes() == data


def test_an_undo_keeps_what_others_wrote_into_the_small_files(folder: Path) -> None:
    before = contents(folder)
    undo = apply(Plan((growth(),)), ShardStore.open(folder))
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"name": "', '"name": "my '))
    apply(undo, ShardStore.open(folder))
    assert config.read_text() == CONFIG.replace('"name": "', '"name": "my ')
    assert {n: d for n, d in contents(folder).items() if n != "config.json"} == {
        n: d for n, d in before.items() if n != "config.json"
    }


def test_an_undo_keeps_sizes_that_had_the_grown_value_before(folder: Path) -> None:
    """A key that was V + n before growing does not become V."""
    (folder / "config.json").write_text('{"vocab_size": 11, "text_config": {"vocab_size": 13}}')
    before = contents(folder)
    undo = apply(Plan((growth(),)), ShardStore.open(folder))
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 13
    redo = apply(undo, ShardStore.open(folder))
    assert contents(folder) == before
    apply(redo, ShardStore.open(folder))
    assert json.loads((folder / "config.json").read_text()) == {"vocab_size": 13, "text_config": {"vocab_size": 13}}


def _header(change: Callable[[dict[str, Any]], None], head: bytes) -> bytes:
    body = json.loads(head[8:])
    change(body)
    blob = json.dumps(body).encode()
    return len(blob).to_bytes(8, "little") + blob


def _one(body: dict[str, Any]) -> str:
    return EMBED if EMBED in body else HEAD


HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda head: b"",
    "a length alone": lambda head: b"\xff" * 8,
    "no JSON": lambda head: head[:8] + b"x" * (len(head) - 8),
    "a list": lambda head: (2).to_bytes(8, "little") + b"[]",
    "a wrong length field": lambda head: b"\x01" + head[1:],
    "other offsets": lambda head: _header(lambda b: b[_one(b)].update(data_offsets=[0, 8]), head),
    "another shape": lambda head: _header(lambda b: b[_one(b)].update(shape=[D, V]), head),
    "another name": lambda head: _header(lambda b: b.update({"x": b.pop(_one(b))}), head),
    "offsets of text": lambda head: _header(lambda b: b[_one(b)].update(data_offsets="ab"), head),
    "other metadata": lambda head: _header(lambda b: b.update(__metadata__={"evil": "1"}), head),
}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_forged_saved_bytes_are_not_restored(hostile: str, folder: Path) -> None:
    """An undo is an untrusted file. Whatever it has saved, the result is the checkpoint without its last rows."""
    old = {name: bits(t) for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
    undo = apply(Plan((growth(),)), ShardStore.open(folder))
    (edit,) = undo.edits
    assert isinstance(edit, Grow)
    saved = {p: HOSTILE[hostile](data) if p.endswith(".safetensors") else b"{}" for p, data in edit.saved.items()}
    saved |= {"../evil.json": b"x", "stray.json": b"x", "generation_config.json": b"x"}
    apply(Plan((Grow(edit.vocabulary, edit.count, {}, {}, saved),)), ShardStore.open(folder))
    found = {name: bits(t) for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
    assert found == old
    assert (folder / "config.json").read_text() == CONFIG
    assert (folder / "generation_config.json").read_text() == '{"vocab_size": 11}'
    assert sorted(os.listdir(folder.parent)) == ["model"]
    assert not (folder / "stray.json").exists()


@pytest.mark.parametrize("fail_at", range(1, 5))
def test_a_rename_that_fails_leaves_every_file(fail_at: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, replace, calls = contents(folder), os.replace, []

    def failing(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == fail_at:
            raise OSError("disk failure")
        replace(source, target)

    store = ShardStore.open(folder)
    monkeypatch.setattr("os.replace", failing)
    rows = SetRows(EMBED, (1,), to_raw(numbers(1, D)))
    with pytest.raises(OSError, match="disk failure"):
        apply(Plan((rows, growth())), store)
    assert len(calls) >= fail_at
    assert contents(folder) == before
    assert listing(folder) == sorted(before)


def test_a_disk_that_is_full_leaves_every_file(folder: Path) -> None:
    before = contents(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    store = ShardStore.open(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        with pytest.raises(OSError, match="large"):
            apply(Plan((growth(),)), store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(folder) == before
    assert listing(folder) == sorted(before)


def test_a_file_with_two_hard_links_is_never_written_into(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in folder.iterdir():
        os.link(path, other / path.name)
    before = contents(other)
    rows = SetRows(EMBED, (1, 2), to_raw(numbers(2, D)))
    store = ShardStore.open(folder)
    for act in (check_plan, apply):
        with raises(UnsupportedError, where="model-00002-of-00002.safetensors", found="2 hard links"):
            act(Plan((rows,)), store)
    with raises(UnsupportedError, where="model-00002-of-00002.safetensors", found="2 hard links"):
        store.write_block(EMBED, 0, to_raw(numbers(2, D)))
    apply(Plan((growth(), rows, SetRows("lm_head.weight", (0, V + 1), to_raw(numbers(2, D))))), store)
    assert contents(other) == before
    assert load_file(folder / "model-00002-of-00002.safetensors")[EMBED].shape == (V + N, D)


@pytest.mark.parametrize("mode", [0o600, 0o444, 0o664])
def test_modes_are_kept(mode: int, folder: Path) -> None:
    for path in folder.iterdir():
        path.chmod(mode)
    apply(Plan((growth(),)), ShardStore.open(folder))
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {mode}


def test_a_patch_of_a_file_that_growing_changes_is_refused(folder: Path) -> None:
    before = contents(folder)
    patch = PatchFile.change("config.json", before["config.json"], b"{}")
    for plan in (Plan((growth(), patch)), Plan((patch, growth()))):
        with raises(PlanError, where="config.json", expected="once"):
            apply(plan, ShardStore.open(folder))
    assert contents(folder) == before


def test_a_config_that_cannot_be_patched_is_refused_first(folder: Path) -> None:
    (folder / "config.json").write_text('{"vocab_size": 11, "vocab_size": 11}')
    before = contents(folder)
    with raises(CheckpointError, where="config.json", hint="json.dump"):
        check_plan(Plan((growth(),)), ShardStore.open(folder))
    assert contents(folder) == before


def bert(folder: Path, kind: str = "bert") -> torch.nn.Module:
    if kind == "bert":
        model = tiny("bert")
    else:
        import transformers as tr

        config = tr.MobileBertConfig(
            vocab_size=40,
            hidden_size=16,
            embedding_size=10,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=12,
            true_hidden_size=8,
            intra_bottleneck_size=8,
            max_position_embeddings=16,
        )
        torch.manual_seed(0)
        model = tr.MobileBertForMaskedLM(config).eval()
    model.save_pretrained(folder)
    return model


def test_a_transposed_table(tmp_path: Path) -> None:
    """MobileBERT stores some columns of its head as (D, V), in a linear layer."""
    model = bert(tmp_path, "mobilebert")
    before, dense = contents(tmp_path), "cls.predictions.dense.weight"
    store = ShardStore.open(tmp_path)
    (vocabulary,) = store.graph.vocabularies
    assert set(vocabulary.tables) == {"mobilebert.embeddings.word_embeddings.weight", dense}
    table = store.graph.table(dense)
    assert table.shape == (40, 6)
    held = model.state_dict()[dense]
    assert bits(from_raw(rows_of(store, table, (7, 0)))) == bits(held[:, [7, 0]].t())
    assert bits(from_raw(store.read_block(dense, 3, 9))) == bits(held[:, 3:9].t())
    rows = {name: to_raw(torch.randn(3, store.graph.table(name).shape[1])) for name in vocabulary.tables}
    edit = Grow(vocabulary.name, 3, rows, {vocabulary.vectors[0]: to_raw(torch.randn(3))})
    undo = apply(Plan((edit, SetRows(dense, (41, 2), to_raw(torch.ones(2, 6))))), store)
    expected = torch.cat([held, from_raw(rows[dense]).t()], dim=1)
    expected[:, [41, 2]] = 1.0
    loaded = type(model).from_pretrained(tmp_path)
    assert bits(loaded.state_dict()[dense]) == bits(expected)
    ids = torch.tensor([[1, 42, 5]])
    assert loaded(input_ids=ids).logits.shape == (1, 3, 43)
    apply(undo, ShardStore.open(tmp_path))
    assert contents(tmp_path) == before


def test_a_bias_that_is_stored_under_two_names(tmp_path: Path) -> None:
    model = bert(tmp_path)
    file = tmp_path / "model.safetensors"
    one, other = "cls.predictions.bias", "cls.predictions.decoder.bias"
    tensors = load_file(file)
    save_file({**tensors, other: tensors[one].clone()}, file, {"format": "pt"})
    before, store = contents(tmp_path), ShardStore.open(tmp_path)
    (vocabulary,) = store.graph.vocabularies
    assert vocabulary.vectors == (one,)
    entries = torch.randn(2)
    edit = Grow(vocabulary.name, 2, {vocabulary.name: to_raw(torch.randn(2, 16))}, {one: to_raw(entries)})
    undo = apply(Plan((edit,)), store)
    found = load_file(file)
    assert bits(found[one]) == bits(found[other]) == bits(tensors[one]) + bits(entries)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded(input_ids=torch.tensor([[41]])).logits.shape == (1, 1, 42)
    apply(undo, ShardStore.open(tmp_path))
    assert contents(tmp_path) == before


def test_tokens_are_added_and_removed_with_their_rows(tmp_path: Path) -> None:
    tiny("llama-untied").save_pretrained(tmp_path)
    write_tokenizer(tmp_path, 40)
    before, store = contents(tmp_path), ShardStore.open(tmp_path)
    (vocabulary,) = store.graph.vocabularies
    rows = {name: to_raw(torch.randn(2, 16)) for name in vocabulary.tables}
    added = [AddTokens((Token("<tool>", 40),)), AddTokens((Token("<end>", 41, special=True), Token("<tool>", 40)))]
    plan = Plan((added[0], Grow(vocabulary.name, 2, rows, {}), added[1]))
    undo = apply(plan, store)
    undo.save(tmp_path.parent / f"{tmp_path.name}.undo")
    after = contents(tmp_path)
    texts = {t["content"]: t["id"] for t in json.loads(after["tokenizer.json"])["added_tokens"]}
    assert {"<tool>": 40, "<end>": 41}.items() <= texts.items()
    redo = apply(Undo.load(tmp_path.parent / f"{tmp_path.name}.undo"), ShardStore.open(tmp_path))
    assert contents(tmp_path) == before
    apply(redo, ShardStore.open(tmp_path))
    assert contents(tmp_path) == after


def test_tokens_that_do_not_fit_are_refused_before_the_rows_grow(tmp_path: Path) -> None:
    tiny("llama-untied").save_pretrained(tmp_path)
    write_tokenizer(tmp_path, 40)
    before, store = contents(tmp_path), ShardStore.open(tmp_path)
    (vocabulary,) = store.graph.vocabularies
    rows = {name: to_raw(torch.randn(2, 16)) for name in vocabulary.tables}
    for act in (check_plan, apply):
        with raises(PlanError, where="<tool>", expected=3, found="t3"):
            act(Plan((Grow(vocabulary.name, 2, rows, {}), AddTokens((Token("<tool>", 3),)))), store)
    assert contents(tmp_path) == before


def test_growing_takes_little_memory_and_no_torch(tmp_path: Path) -> None:
    """A sparse file of 300 MB: the memory that growing takes does not depend on its size."""
    rows, width, filler = 8_000, 4096, 30_000
    sizes = {EMBED: rows * width * 2, "model.filler.weight": filler * width * 2}
    header: dict[str, Any] = {}
    offset = 0
    for name, count in ((EMBED, rows), ("model.filler.weight", filler)):
        end = offset + sizes[name]
        header[name] = {"dtype": "BF16", "shape": [count, width], "data_offsets": [offset, end]}
        offset = end
    blob = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(blob).to_bytes(8, "little") + blob)
        file.truncate(8 + len(blob) + offset)
    code = """
import sys
from pathlib import Path
from embedsurgery.plan import Grow, Plan
from embedsurgery.tensors.raw import RawArray
from embedsurgery.stores.apply import apply
from embedsurgery.stores.shards import ShardStore
name = "model.embed_tokens.weight"
rows = RawArray("F32", (8, 4096), b"\\x01" * (8 * 4096 * 4))
undo = apply(Plan((Grow(name, 8, {name: rows}, {}),)), ShardStore.open(Path(sys.argv[1])))
assert ShardStore.open(Path(sys.argv[1])).graph.table(name).shape == (8008, 4096)
apply(undo, ShardStore.open(Path(sys.argv[1])))
assert "torch" not in sys.modules
print(next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    data = (tmp_path / "model.safetensors").stat().st_size
    ran = python(code, tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) < 100
    assert (tmp_path / "model.safetensors").stat().st_size == data

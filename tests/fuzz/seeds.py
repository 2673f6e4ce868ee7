"""The valid files to mutate: checkpoints, adapters, merged checkpoints and a journal, a few kilobytes each."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

import embedsurgery as es
from embedsurgery.adapters.new_tokens import AddedTokens, plan_tokens
from embedsurgery.checkpoints.in_place import change_in_place
from embedsurgery.checkpoints.records import next_record_path
from embedsurgery.errors import EmbedSurgeryWarning
from embedsurgery.files.safetensors import TensorSource, write_file
from embedsurgery.plan import Blocks, Plan, SetBlocks
from embedsurgery.plugins.current import registry
from embedsurgery.stores.apply import apply
from embedsurgery.stores.shards import ShardStore
from embedsurgery.stores.written import hash_written
from embedsurgery.surgeries.surgery import Base
from embedsurgery.surgeries.trainable_tokens.surgery import TrainableTokens
from embedsurgery.tensors.raw import RawArray
from embedsurgery.tokenizer.patching import read_known_tokens
from tests.support.made import make_adapter

ROWS, WIDTH = 14, 4
TOKENS = ["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(3, 11)), "[unused0]"]


def _tensor(stream: np.random.Generator, *shape: int) -> TensorSource:
    return TensorSource.of(RawArray.of(stream.standard_normal(shape).astype(np.float32)).to("BF16"))


def _tokenizer(folder: Path) -> None:
    added = [
        {
            "id": i,
            "content": t,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, t in enumerate(TOKENS[:3])
    ]
    body = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": dict(zip(TOKENS, range(99), strict=False)), "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(body, indent=1))
    decoder = {str(e["id"]): {k: v for k, v in e.items() if k != "id"} for e in added}
    config = {
        "added_tokens_decoder": decoder,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": 32,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    special = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "unk_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


def sharded(folder: Path) -> Path:
    """An untied model in two shards, with spare rows."""
    folder.mkdir()
    stream = np.random.default_rng(0)
    one = {"model.embed_tokens.weight": _tensor(stream, ROWS, WIDTH), "model.norm.weight": _tensor(stream, WIDTH)}
    two = {"lm_head.weight": _tensor(stream, ROWS, WIDTH), "model.layers.0.a.weight": _tensor(stream, 3, WIDTH)}
    weight_map = {}
    for number, tensors in enumerate((one, two), 1):
        name = f"model-{number:05d}-of-00002.safetensors"
        write_file(folder / name, tensors, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
    index = {"metadata": {"total_size": 2 * (2 * ROWS * WIDTH + WIDTH + 3 * WIDTH)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "tie_word_embeddings": False,
        "vocab_size": ROWS,
        "hidden_size": WIDTH,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    _tokenizer(folder)
    return folder


def biased(folder: Path) -> Path:
    """A tied model in one file, whose head has a bias, without spare rows."""
    folder.mkdir()
    stream = np.random.default_rng(1)
    rows = len(TOKENS)
    tensors = {
        "bert.embeddings.word_embeddings.weight": _tensor(stream, rows, WIDTH),
        "bert.embeddings.position_embeddings.weight": _tensor(stream, 8, WIDTH),
        "cls.predictions.bias": _tensor(stream, rows),
    }
    write_file(folder / "model.safetensors", tensors, {"format": "pt"})
    config = {
        "architectures": ["BertForMaskedLM"],
        "model_type": "bert",
        "vocab_size": rows,
        "hidden_size": WIDTH,
        "text_config": {"note": 1},
    }
    (folder / "config.json").write_text(json.dumps(config))
    _tokenizer(folder)
    return folder


def _save_adapter_with_tokens(base: Path, folder: Path) -> None:
    """Save an adapter with three new tokens; they take spare or reserved rows first, and then grow the table."""
    store = ShardStore.open(base)
    planned = plan_tokens(
        store,
        read_known_tokens(base),
        ["<new0>", "<new1>", "<new2>"],
        init="zeros",
        initializers=registry().initializers,
    )
    assert planned.new is not None
    copy = folder.with_name("extended")
    shutil.copytree(base, copy)
    grown = ShardStore.open(copy)
    apply(planned.plan, grown)
    ids = AddedTokens(planned.ids, planned.new, lambda: None)
    adapter = TrainableTokens().start(es.TrainableTokensConfig(ids), ShardStore.open(copy), Base())
    raw = {n: RawArray.of(v.float32() + 1) if v.dtype == "F32" else v for n, v in adapter.raw.items()}
    replace(adapter, raw=raw).save(folder)
    shutil.rmtree(copy)


def _record_whole_table(folder: Path) -> None:
    """Add the record of a whole table on top of the others."""
    store = ShardStore.open(folder)
    table = store.graph.main_input()
    rows = RawArray.of(np.ones(table.shape, np.float32)).to(table.dtype)
    undo = apply(Plan((SetBlocks(table.name, Blocks.of(rows)),)), store, spill=folder.parent)
    facts = {"written": hash_written(undo, store), "surgery": "whole", "rows": {table.name: table.shape[0]}}
    replace(undo, facts=facts).save(next_record_path(folder))


def build(folder: Path) -> dict[str, Path]:
    """Build the seeds, name -> directory: two bases, two adapters of each, each base merged, and one with a journal."""
    found: dict[str, Path] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EmbedSurgeryWarning)
        for name, make in (("sharded", sharded), ("biased", biased)):
            base = found[name] = make(folder / name)
            rows = found[f"{name}-rows"] = make_adapter(base, [3, 5]).save(folder / f"{name}-rows")
            new = found[f"{name}-new"] = folder / f"{name}-new"
            _save_adapter_with_tokens(base, new)
            merged = found[f"{name}-merged"] = folder / f"{name}-merged"
            es.merge_checkpoint(base, [rows, (new, 0.5)], merged, hashes=True)
            es.merge_checkpoint(merged, make_adapter(merged, [6], seed=4).save(folder / f"{name}-third"), in_place=True)
            es.merge_checkpoint(merged, make_adapter(merged, [7], seed=5), in_place=True)
            es.unmerge_checkpoint(merged, adapter="3", in_place=True)
            _record_whole_table(merged)
        found["journal"] = folder / "journal"
        broken = shutil.copytree(found["sharded"], folder / "broken")
        with change_in_place(broken, ["test"]) as journal:
            journal.protect(
                {"model-00001-of-00002.safetensors": [(250, 290), (300, 302)]},
                ["config.json", ".embedsurgery/merges/0001.safetensors"],
            )
            (broken / "config.json").unlink()
            (broken / "config.json").write_text("{}")
            shutil.copytree(broken, found["journal"])
        shutil.rmtree(broken)
    return found


def files_of(folder: Path) -> Iterator[str]:
    """Every file below a directory."""
    return (p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file())

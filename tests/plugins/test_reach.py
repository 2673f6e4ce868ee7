"""What plugins bring is there wherever it should be: a format merges, an architecture's tie and a module are found."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import embedsurgery as es
from embedsurgery.cli import main
from embedsurgery.hookspecs import ClassifierRecord, EmbeddingModule, LayoutRecord
from embedsurgery.names import Layout
from embedsurgery.stores.base import Store
from embedsurgery.stores.shards import ShardStore
from embedsurgery.testing import StoreContract, TinyModel, contents, installed
from embedsurgery.testing.models import INPUT, OUTPUT
from embedsurgery.walker import walk_module
from tests.conftest import cli
from tests.plugins import npy_store

_ASKED = (
    "architectures" in inspect.signature(ShardStore).parameters,
    "classify" in inspect.signature(walk_module).parameters,
    hasattr(main, "metadata"),
)
reaches = pytest.mark.skipif(not all(_ASKED), reason="the front ends do not ask plugins yet")


def plugin(**hooks: Any) -> ModuleType:
    """A module with hooks that return these records."""
    module = ModuleType("a_plugin_of_the_tests")
    for name, records in hooks.items():
        setattr(module, f"embedsurgery_{name}", es.hookimpl(lambda records=records: records))
    return module


class TestNpyStore(StoreContract):
    plugin = npy_store
    record = npy_store.embedsurgery_stores()[0]
    dtypes = ("F32", "F16", "F64")

    def make(self, folder: Path, tensors: Mapping[str, torch.Tensor], *, tied: bool) -> Any:
        write(folder, {name: value for name, value in tensors.items() if name != OUTPUT or not tied}, tied=tied)
        return folder

    def open(self, home: Any) -> Store:
        return npy_store.NpyStore(home)

    def read(self, home: Any) -> dict[str, torch.Tensor]:
        return {
            name: torch.from_numpy(np.load(home / f"{name}.npy"))
            for name in json.loads((home / "tensors.json").read_text())
        }


def write(folder: Path, tensors: Mapping[str, torch.Tensor], *, tied: bool) -> Path:
    folder.mkdir(exist_ok=True)
    rows = tensors[INPUT].shape[0]
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": rows, "tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tensors.json").write_text(json.dumps(list(tensors)))
    for name, value in tensors.items():
        np.save(folder / f"{name}.npy", value.detach().numpy())
    return folder


@reaches
def test_a_format_merges_and_unmerges(tmp_path: Path) -> None:
    model = TinyModel(tied=False)
    base = write(tmp_path / "base", model.state_dict(), tied=False)
    attachment = es.attach(model, es.TrainableTokensConfig([3, 5]))
    with torch.no_grad():
        next(iter(attachment.parameters())).fill_(7)
    adapter = attachment.adapter()
    with installed(npy_store):
        assert es.walk(base).tables[0].files == ((INPUT, f"{INPUT}.npy"),)
        es.merge_checkpoint(base, adapter, tmp_path / "merged")
        merged = np.load(tmp_path / "merged" / f"{INPUT}.npy")
        es.unmerge_checkpoint(tmp_path / "merged", tmp_path / "again")
    assert np.flatnonzero((merged == 7).all(axis=1)).tolist() == [3, 5]
    assert contents(tmp_path / "again") == contents(base)


@reaches
def test_a_tie_of_an_unknown_architecture(tmp_path: Path) -> None:
    save_file({"model.embed_tokens.weight": torch.randn(9, 4)}, tmp_path / "model.safetensors", {"format": "pt"})
    config = {"model_type": "mymodel", "architectures": ["MyForCausalLM"], "vocab_size": 9, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert es.walk(tmp_path).tables[0].aliases == ("lm_head.weight",)
    with installed(plugin(layouts=[LayoutRecord("mymodel", Layout(head="to_vocab"))])):
        assert es.walk(tmp_path).tables[0].aliases == ("to_vocab.weight",)


class Strange(nn.Module):
    """A lookup of nobody's class."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return 2 * self.table[ids]


@reaches
def test_a_module_of_an_unknown_class() -> None:
    model = nn.Sequential(Strange(), nn.Linear(4, 4))
    assert es.walk(model).tables == ()

    def classify(unknown: Any) -> EmbeddingModule | None:
        assert unknown.shapes == (("table", (9, 4)),)
        return EmbeddingModule("input", "table", scale=2.0) if unknown.type_name.endswith(".Strange") else None

    with installed(plugin(classifiers=[ClassifierRecord("strange", classify)])):
        (table,) = es.walk(model).tables
        assert (table.name, table.shape, table.kind, table.sites[0].scale) == ("0.table", (9, 4), "vocabulary", 2.0)
        attachment = es.attach(model, es.TrainableTokensConfig([3], ["0"]), materialize=True)
        with torch.no_grad():
            next(iter(attachment.parameters())).fill_(1)
        assert model[0](torch.tensor([3])).tolist() == [[2.0] * 4]
        attachment.merge()
        assert model[0].table[3].tolist() == [1.0] * 4


HELLO = """
import embedsurgery as es
from embedsurgery.hookspecs import CommandRecord

def load():
    import click
    return click.Command("hello", callback=lambda: click.echo("hello there"), help="Says hello.")

@es.hookimpl
def embedsurgery_commands():
    return [CommandRecord("hello", "Says hello.", load), CommandRecord("broken", "Fails.", lambda: 1 / 0),
            CommandRecord("none", "Is none.", lambda: 3)]
"""


@reaches
def test_a_verb(tmp_path: Path) -> None:
    (tmp_path / "a_hello.py").write_text(HELLO)
    about = tmp_path / "a_hello-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: a-hello\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[embedsurgery]\nhello = a_hello\n")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    run = cli("hello", env=env)
    assert (run.returncode, run.stdout, run.stderr) == (0, "hello there\n", "")
    assert "Says hello." in cli("--help", env=env).stdout
    assert "did you mean 'hello'?" in cli("helo", env=env).stderr
    assert "hello" not in cli("--help").stdout
    for verb, said in (("broken", "ZeroDivisionError"), ("none", "click.Command")):
        run = cli(verb, env=env)
        assert run.returncode == 1
        assert said in run.stderr
        assert run.stderr.count("\n") == 1

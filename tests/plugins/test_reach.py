"""Plugins take effect everywhere: formats merge, ties and modules are found, cards and commands are extended."""

from __future__ import annotations

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
from embedsurgery.cli.inspect import inspect
from embedsurgery.cli.show import show
from embedsurgery.errors import AttachmentError, CheckpointError, EmbedSurgeryWarning
from embedsurgery.graph.architectures import Layout
from embedsurgery.hub.card import adapter_body
from embedsurgery.hub.readme import END
from embedsurgery.plugins.current import registry
from embedsurgery.plugins.hookspecs import (
    CardSection,
    CardSectionRecord,
    ClassifierRecord,
    EmbeddingModule,
    LayoutRecord,
)
from embedsurgery.stores.store import Store
from embedsurgery.testing import StoreContract, TinyModel, contents, installed
from embedsurgery.testing.models import INPUT, OUTPUT
from tests.support import npy_store
from tests.support.errors import raises
from tests.support.npy_files import write
from tests.support.processes import cli


def plugin(**hooks: Any) -> ModuleType:
    """Return a module with hooks that return these records."""
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


def test_a_format_merges_and_unmerges(tmp_path: Path) -> None:
    model = TinyModel(tied=False)
    base = write(tmp_path / "base", model.state_dict(), tied=False)
    attachment = es.attach(model, es.TrainableTokensConfig([3, 5]))
    with torch.no_grad():
        next(iter(attachment.parameters())).fill_(7)
    adapter = attachment.adapter()
    adapter.save(tmp_path / "adapter")
    with installed(npy_store):
        assert es.walk(base).tables[0].files == ((INPUT, f"{INPUT}.npy"),)
        es.merge_checkpoint(base, adapter, tmp_path / "merged")
        merged = np.load(tmp_path / "merged" / f"{INPUT}.npy")
        assert all(check.ok for check in es.verify_checkpoint(tmp_path / "merged"))
        assert inspect(base)["tables"][0]["files"] == {INPUT: f"{INPUT}.npy"}
        assert show(tmp_path / "adapter", base)["tables"][0]["located"] == INPUT
        es.unmerge_checkpoint(tmp_path / "merged", tmp_path / "again")
    assert np.flatnonzero((merged == 7).all(axis=1)).tolist() == [3, 5]
    assert contents(tmp_path / "again") == contents(base)
    with raises(CheckpointError, expected="model.safetensors"):
        es.walk(base)


def test_a_tie_of_an_unknown_architecture(tmp_path: Path) -> None:
    save_file({"model.embed_tokens.weight": torch.randn(9, 4)}, tmp_path / "model.safetensors", {"format": "pt"})
    config = {"model_type": "mymodel", "architectures": ["MyForCausalLM"], "vocab_size": 9, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert es.walk(tmp_path).tables[0].aliases == ("lm_head.weight",)
    with installed(plugin(layouts=[LayoutRecord("mymodel", Layout(head="to_vocab"))])):
        assert es.walk(tmp_path).tables[0].aliases == ("to_vocab.weight",)
        assert registry().open_store(tmp_path).graph.tables[0].aliases == ("to_vocab.weight",)
        assert inspect(tmp_path)["tables"][0]["aliases"] == ["to_vocab.weight"]


class Lookup(nn.Module):
    """An embedding of a class that embedsurgery does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return 2 * self.table[ids]


@pytest.mark.parametrize("materialize", [True, False])
def test_a_module_of_an_unknown_class(materialize: bool) -> None:
    model = nn.Sequential(Lookup(), nn.Linear(4, 4))
    assert es.walk(model).tables == ()

    def classify(unknown: Any) -> EmbeddingModule | None:
        assert unknown.shapes == (("table", (9, 4)),)
        return EmbeddingModule("input", "table", scale=2.0) if unknown.type_name.endswith(".Lookup") else None

    with installed(plugin(classifiers=[ClassifierRecord("lookup", classify)])):
        (table,) = es.walk(model).tables
        assert (table.name, table.shape, table.kind, table.sites[0].scale) == ("0.table", (9, 4), "vocabulary", 2.0)
        attachment = es.attach(model, es.TrainableTokensConfig([3], ["0"]), materialize=materialize)
        with torch.no_grad():
            next(iter(attachment.parameters())).fill_(1)
        assert model[0](torch.tensor([3])).tolist() == [[2.0] * 4]
        attachment.merge()
        assert model[0].table[3].tolist() == [1.0] * 4


class TiedModel(nn.Module):
    """A model with a tied head whose input is a `Lookup`."""

    def __init__(self) -> None:
        super().__init__()
        self.lookup = Lookup()
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.lookup.table

    def get_input_embeddings(self) -> nn.Module:
        return self.lookup

    def forward(self, ids: torch.Tensor) -> Any:
        return self.head(self.lookup(ids))


def classify_lookup(unknown: Any) -> EmbeddingModule | None:
    return EmbeddingModule("input", "table", scale=2.0) if unknown.type_name.endswith(".Lookup") else None


def test_a_tied_model_around_an_unknown_module() -> None:
    """It is the model's input, its head is found by shared memory, and the default config trains it."""
    model, ids = TiedModel(), torch.arange(9)
    with installed(plugin(classifiers=[ClassifierRecord("lookup", classify_lookup)])):
        (table,) = es.walk(model).tables
        assert (table.names, table.roles) == (("lookup.table", "head.weight"), ("input", "output"))
        assert es.walk(model).input == "lookup.table"
        attachment = es.attach(model, es.TrainableTokensConfig([3]))
        with torch.no_grad():
            next(iter(attachment.parameters())).fill_(0.5)
        live = model(ids).detach()
        attachment.merge()
        torch.testing.assert_close(model(ids).detach(), live)
        attachment.unmerge()
        more = nn.ModuleDict({"model": model, "other": Lookup()})
        with raises(AttachmentError, where=("TiedModel", "ModuleDict")):
            es.attach(more, es.TrainableTokensConfig([5], ["lookup"]), name="more")


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (3, "TypeError"),
        (EmbeddingModule("input", "weight"), "ValueError"),
        (EmbeddingModule("both", "table"), "ValueError"),
        (RuntimeError("x"), "RuntimeError: x"),
    ],
)
def test_a_classifier_that_fails_is_skipped(answer: Any, error: str) -> None:
    def classify(unknown: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    records = [ClassifierRecord("wrong", classify), ClassifierRecord("lookup", classify_lookup)]
    with installed(plugin(classifiers=records)), pytest.warns(EmbedSurgeryWarning, match=rf"\bwrong\b.*{error}"):
        assert es.walk(Lookup()).tables[0].name == "table"


def test_sections_of_a_card() -> None:
    def section(manifest: Any) -> CardSection:
        return CardSection("How it was\nmade", f"By *{manifest.surgery}*.\n{END}\nMore.")

    adapter = es.attach(TinyModel(), es.TrainableTokensConfig([3])).adapter()
    records = [CardSectionRecord("made", section), CardSectionRecord("broken", lambda manifest: 1 / 0)]
    with (
        installed(plugin(card_sections=records)),
        pytest.warns(EmbedSurgeryWarning, match=r"\bbroken\b.*ZeroDivisionError"),
    ):
        body = adapter_body(adapter, "team/rows", 9)
    assert "\n## How it was\\nmade\n\nBy *trainable_tokens*.\n\nMore." in body
    assert END not in body
    assert "How it was" not in adapter_body(adapter, "team/rows", 9)


HELLO = """
import embedsurgery as es
from embedsurgery.plugins.hookspecs import CommandRecord

def load():
    import click
    return click.Command("hello", callback=lambda: click.echo("hello there"), help="Says hello.")

@es.hookimpl
def embedsurgery_commands():
    return [CommandRecord("hello", "Says hello.", load), CommandRecord("broken", "Fails.", lambda: 1 / 0),
            CommandRecord("none", "Is none.", lambda: 3)]
"""


def test_a_command(tmp_path: Path) -> None:
    (tmp_path / "a_hello.py").write_text(HELLO)
    about = tmp_path / "a_hello-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: a-hello\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[embedsurgery]\nhello = a_hello\n")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    run = cli("hello", env=env)
    assert (run.returncode, run.stdout, run.stderr) == (0, "hello there\n", "")
    assert "Says hello." in cli("--help", env=env).stdout
    assert "'hello'" in cli("helo", env=env).stderr
    assert "hello" not in cli("--help").stdout
    for verb, named in (("broken", "ZeroDivisionError"), ("none", "Command")):
        run = cli(verb, env=env)
        assert run.returncode == 1
        assert all(word in run.stderr for word in (verb, named))
        assert run.stderr.count("\n") == 1

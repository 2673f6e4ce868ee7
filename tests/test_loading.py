"""`es.open_store`, the one door to a checkpoint of any format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import embedsurgery as es
from embedsurgery.checkpoints.journal import Journal
from embedsurgery.errors import CheckpointError, UnfinishedError
from embedsurgery.plugins.current import installed
from embedsurgery.stores.store import rows_of
from embedsurgery.testing import TinyModel, write_checkpoint
from tests.support import npy_store
from tests.support.errors import raises
from tests.support.models import INPUT, KINDS, save, tiny
from tests.support.npy_files import write


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", [False, True])
def test_rows_of_a_directory(kind: str, shards: bool, tmp_path: Path) -> None:
    model = tiny(kind)
    with es.open_store(save(model, tmp_path / "base", shards=shards)) as store:
        table = store.graph.main_input()
        assert table.name == INPUT[kind]
        found = rows_of(store, table, (3, 7)).float32()
        assert store.directory == tmp_path / "base"
    assert np.array_equal(found, model.get_input_embeddings().weight[[3, 7]].detach().numpy())


def test_rows_of_a_format_that_a_plugin_brings(tmp_path: Path) -> None:
    model = TinyModel()
    write(tmp_path / "npy", dict(model.named_parameters()), tied=True)
    with pytest.raises(CheckpointError):
        es.open_store(tmp_path / "npy")
    with installed(npy_store), es.open_store(tmp_path / "npy") as store:
        assert isinstance(store, npy_store.NpyStore)
        assert isinstance(store, es.Store)
        table = store.graph.main_input()
        found = rows_of(store, table, (3,)).float32()
        assert np.array_equal(found, dict(model.named_parameters())[table.name][[3]].detach().numpy())


@pytest.mark.parametrize("form", ["safetensors", "npy"])
def test_a_change_in_place_that_was_interrupted_is_refused_in_every_format(form: str, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    if form == "npy":
        write(folder, dict(TinyModel().named_parameters()), tied=True)
    else:
        write_checkpoint(TinyModel(), folder)
    with installed(npy_store):
        es.open_store(folder)
        journal = Journal(folder, {})
        journal.begin()
        journal.protect({}, ["new.json"])
        with raises(UnfinishedError, where=folder, hint=f"embedsurgery recover {folder}"):
            es.open_store(folder)
        es.recover_checkpoint(folder)
        es.open_store(folder)


@pytest.mark.parametrize("name", ["nowhere", "x" * 300])
def test_a_directory_that_does_not_exist(name: str, tmp_path: Path) -> None:
    with raises(CheckpointError, where=name):
        es.open_store(tmp_path / name)

"""The built-in surgeries, initialisers and stores pass the kit for plugins."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import embedsurgery as es
from embedsurgery.initializers import BUILT_IN
from embedsurgery.plugins.current import build_registry, registry
from embedsurgery.stores.modules import module_store
from embedsurgery.stores.shards import ShardStore
from embedsurgery.stores.state_dicts import state_dict_store
from embedsurgery.stores.store import Store
from embedsurgery.testing import InitializerContract, StoreContract, SurgeryContract
from embedsurgery.testing.models import OUTPUT


class TestTrainableTokens(SurgeryContract):
    config = es.TrainableTokensConfig([3, 17, 5])


class TestTrainableTokensOfBothTables(SurgeryContract):
    config = es.TrainableTokensConfig({"embed_tokens": [3, 5], "lm_head": [5, 7]})
    ties = (False,)


class TestSoftPrompt(SurgeryContract):
    config = es.SoftPromptConfig(3)
    starts_as_base = False  # virtual tokens get attention whatever their values
    keeps_ties = False  # an untied head gives the new tokens logits that are never picked


class TestSoftPromptThatKeepsTies(SurgeryContract):
    config = es.SoftPromptConfig(2, init="sample_vocab")
    bake = es.BakeConfig(tied="keep")
    starts_as_base = False
    dtypes = ("F32", "BF16")
    ties = (True,)


def test_every_built_in_surgery_is_tested() -> None:
    contracts = [kind for kind in globals().values() if isinstance(kind, type) and issubclass(kind, SurgeryContract)]
    built_in = {record.config_class for record in build_registry([]).surgeries.values()}
    assert {type(kind.config) for kind in contracts if hasattr(kind, "config")} == built_in


INITS = {
    "current": "takes",
    "zeros": "",
    "random": "draws",
    "mean": "",
    "normal": "draws",
    "subtokens": "",
    "description": "t1 t2",
    "copy": "t6",
}


def _contract(name: str, argument: str) -> type:
    init = name if argument in ("", "draws", "takes") else f"{name}:{argument}"
    attributes = {"init": init, "draws": argument == "draws", "takes_spare_rows": argument == "takes"}
    return type(f"Test_{name}", (InitializerContract,), attributes)


globals().update({f"Test_{name}": _contract(name, argument) for name, argument in INITS.items()})


def test_every_built_in_initialiser_is_tested() -> None:
    assert [record.name for record in BUILT_IN] == list(INITS)


class TestStateDict(StoreContract):
    def make(self, folder: Path, tensors: Mapping[str, torch.Tensor], *, tied: bool) -> Any:
        return dict(tensors)

    def open(self, home: Any) -> Store:
        return state_dict_store(home)

    def read(self, home: Any) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in home.items()}


class TestModule(StoreContract):
    def make(self, folder: Path, tensors: Mapping[str, torch.Tensor], *, tied: bool) -> Any:
        kinds = {"embed_tokens": torch.nn.Embedding, "lm_head": torch.nn.Linear}
        root = torch.nn.Module()
        root.model = torch.nn.Module()
        parameters: dict[int, torch.nn.Parameter] = {}
        for name, value in tensors.items():
            above, _, last = name.removesuffix(".weight").rpartition(".")
            module = kinds[last](1, 1) if last in kinds else torch.nn.Module()
            module._parameters.clear()
            floats = value.is_floating_point()
            module.weight = parameters.setdefault(id(value), torch.nn.Parameter(value, requires_grad=floats))
            root.get_submodule(above).add_module(last, module)
        return root

    def open(self, home: Any) -> Store:
        return module_store(home)

    def read(self, home: Any) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in home.named_parameters(remove_duplicate=False)}


class TestSafetensors(StoreContract):
    record = registry().stores["safetensors"]

    def make(self, folder: Path, tensors: Mapping[str, torch.Tensor], *, tied: bool) -> Any:
        kept = {name: value for name, value in tensors.items() if name != OUTPUT or not tied}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        flag = str(tied).lower()
        config = f'{{"architectures": ["LlamaForCausalLM"], "vocab_size": 11, "tie_word_embeddings": {flag}}}'
        (folder / "config.json").write_text(config)
        return folder

    def open(self, home: Any) -> Store:
        return ShardStore.open(home)

    def read(self, home: Any) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in load_file(home / "model.safetensors").items()}

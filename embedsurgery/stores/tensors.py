"""The stores over torch tensors: a model's parameters, or a state dict's values. Both are changed in place."""

from __future__ import annotations

from embedsurgery.stores.modules import ModuleStore, module_store
from embedsurgery.stores.state_dicts import StateDictStore, state_dict_store
from embedsurgery.stores.tensor_store import TensorStore

__all__ = ["ModuleStore", "StateDictStore", "TensorStore", "module_store", "state_dict_store"]

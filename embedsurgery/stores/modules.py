"""The store over a model's parameters.

When it grows, sizes in modules and configs follow (``model_config.py``), and when a head is untied, the flags that say
so (``tie_states.py``). ``tensor_store.py`` has what it shares with state dicts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from embedsurgery.errors import PlanError, UnsupportedError
from embedsurgery.graph import EmbeddingGraph, Vocabulary
from embedsurgery.graph.classify import Classify
from embedsurgery.graph.from_modules import config_of, walk_module
from embedsurgery.graph.vocabularies import names_of, row_counts_of
from embedsurgery.graph.wrappers import plain_name
from embedsurgery.plan import Grow, Untie
from embedsurgery.stores.model_config import (
    SIZES_KEY,
    SizeField,
    VocabularyModule,
    decode_sizes,
    encode_sizes,
    find_size_fields,
    refuse_unknown_modules,
    write_sizes,
)
from embedsurgery.stores.resized_tensors import memory_and_transpose
from embedsurgery.stores.tensor_store import TensorStore
from embedsurgery.stores.tie_states import TIES_KEY, clear_tie_states, read_tie_states, restore_tie_states
from embedsurgery.tensors.sharded import fsdp_version

_PEFT_LAYERS = frozenset({"base_layer", "modules_to_save", "original_module"})
"""Parts of the path of a table inside a layer of PEFT, whose own matrices depend on the vocabulary's size too."""


class ModuleStore(TensorStore):
    """The tensors of a model.

    Growing replaces parameters: gradients are lost, and an optimizer that was created before has the old ones.
    """

    model: nn.Module

    def all_tensors(self) -> Mapping[str, torch.Tensor]:
        buffers = self.model.named_buffers(remove_duplicate=False)
        return {**self.tensors, **dict(self.model.named_parameters(remove_duplicate=False)), **dict(buffers)}

    def check_growth(self, vocabulary: Vocabulary, count: int) -> None:
        super().check_growth(vocabulary, count)
        owners, objects = self._owners(vocabulary)
        wrapped = next((owner.path for owner in owners if not _PEFT_LAYERS.isdisjoint(owner.path.split("."))), None)
        if wrapped is not None:
            raise UnsupportedError(
                "the table is inside a layer of another library, which would not grow with it",
                where=wrapped,
                hint="add tokens before the model is wrapped",
            )
        if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in self.model.modules()):
            raise UnsupportedError(
                "a wrapped model cannot grow",
                where=self.name,
                found="DistributedDataParallel",
                hint="add tokens before the model is wrapped",
            )
        columns = {self.graph.table(name).shape[1] for name in vocabulary.tables}
        refuse_unknown_modules(self.model, owners, objects, row_counts_of(self.graph, vocabulary), columns)
        self._size_fields(vocabulary)

    def _owners(self, vocabulary: Vocabulary) -> tuple[list[VocabularyModule], set[int]]:
        """Return the modules with a vocabulary's tensors, and the ids of the tensors that growing replaces."""
        by_column: dict[int, bool] = {}  # id of a tensor -> whether it has one column per token
        for stored in self.stored_tensors(vocabulary):
            own = memory_and_transpose(stored.tensors[0])[0]
            columns = stored.axis == 1 and stored.of in vocabulary.tables
            by_column.update({id(t): (memory_and_transpose(t)[0] == own) == columns for t in stored.tensors})
        found = []
        for path, module in self.model.named_modules(remove_duplicate=False):
            tensors = (*module._parameters.values(), *module._buffers.values())
            ids = [id(tensor) for tensor in tensors if id(tensor) in by_column]
            if ids:
                found.append(VocabularyModule(path, module, any(by_column[i] for i in ids)))
        return found, set(by_column)

    def _size_fields(self, vocabulary: Vocabulary) -> list[SizeField]:
        """Find every place in the model that stores the size of a vocabulary."""
        sizes = row_counts_of(self.graph, vocabulary)
        names = names_of(self.graph, vocabulary)
        others = [v for v in self.graph.vocabularies if v.name != vocabulary.name and v.size in sizes]
        paths = {name.rpartition(".")[0] for other in others for name in names_of(self.graph, other)}
        return find_size_fields(self.model, self._owners(vocabulary)[0], names, sizes, paths)

    def growth_state(self, edit: Grow) -> Mapping[str, bytes]:
        return {SIZES_KEY: encode_sizes(self._size_fields(self.vocabulary(edit)))} if edit.count > 0 else {}

    def replace_tensors(self, new: Mapping[int, torch.Tensor], edit: Grow) -> None:
        sizes = self._new_sizes(edit)
        done: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        try:
            for module in self.model.modules():
                groups: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
                for group in groups:
                    for leaf, old in list(group.items()):
                        if old is not None and id(old) in new:
                            done.append((group, leaf, old))
                            group[leaf] = new[id(old)]
            write_sizes(self.model, sizes)
        except BaseException:
            for group, leaf, old in done:
                group[leaf] = old
            raise

    def _new_sizes(self, edit: Grow) -> list[tuple[SizeField, int]]:
        """Return the new value of each place that stores the vocabulary's size; in an undo, the original one."""
        if edit.count > 0 or SIZES_KEY not in edit.saved:
            return [(field, field.value + edit.count) for field in self._size_fields(self.vocabulary(edit))]
        try:
            saved = decode_sizes(edit.saved[SIZES_KEY])
        except (ValueError, TypeError, KeyError) as error:
            raise PlanError(
                "the undo has no valid sizes to restore",
                where=f"{self.name}: {edit.vocabulary}",
                found=f"{type(error).__name__}: {error}",
            ) from error
        # A place that no longer has the grown size was changed by someone else, and is left alone.
        grown = [replace(field, value=field.value - edit.count) for field in saved]
        return [(field, field.value + edit.count) for field in grown if field.read(self.model) == field.value]

    def generation_config(self) -> Any:
        return getattr(self.model, "generation_config", None)

    def untie_state(self, edit: Untie) -> Mapping[str, bytes]:
        return {} if edit.undo else {TIES_KEY: json.dumps(read_tie_states(self.model)).encode()}

    def untie(self, edit: Untie) -> None:
        """Give the head its own Parameter, or the lookup's again, and update the configs."""
        path, _, leaf = edit.head.rpartition(".")
        parameters = self.model.get_submodule(path)._parameters
        new = self.tensors[edit.table] if edit.undo else self.build_head(edit)
        if edit.undo:
            restore_tie_states(self.model, json.loads(edit.saved.get(TIES_KEY, b"{}")))
        else:
            clear_tie_states(self.model)
        parameters[leaf] = new if isinstance(new, nn.Parameter) else nn.Parameter(new)
        self.tensors = dict(self.model.named_parameters(remove_duplicate=False))
        self.graph = walk_module(self.model)
        self._transposed = frozenset(n for table in self.graph.tables for n in table.transposed)


def module_store(
    model: nn.Module, graph: EmbeddingGraph | None = None, tokenizer: Any = None, classify: Classify | None = None
) -> ModuleStore:
    """Create a store over a model's parameters.

    Args:
        model: The model.
        graph: The model's graph, if it is known already.
        tokenizer: The tokenizer that plans may change.
        classify: Classifies modules of unknown classes.

    Raises:
        UnsupportedError: The parameters are partitioned by DeepSpeed's ZeRO-3.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    partitioned = next((name for name, p in parameters.items() if hasattr(p, "ds_id") and p.numel() == 0), None)
    if partitioned is not None:
        raise UnsupportedError(
            "the parameters are partitioned by DeepSpeed's ZeRO-3",
            where=partitioned,
            hint="attach before deepspeed.initialize, and merge on disk",
        )
    moved = [] if graph is None else [n for t in graph.tables for n in t.names if n not in parameters]
    if moved:  # the model was wrapped (by PEFT, say) or unwrapped after the graph was made, which changed its names
        plain = {plain_name(name): parameter for name, parameter in parameters.items()}
        parameters.update({name: plain[plain_name(name)] for name in moved if plain_name(name) in plain})
    buffers = (name for name, _ in model.named_buffers())
    wrapped = [f"{path}." if path else "" for path, module in model.named_modules() if fsdp_version(module)]
    sharded = [name for name in parameters if any(name.startswith(path) for path in wrapped)]
    graph = graph or walk_module(model, classify)
    store = ModuleStore(parameters, graph, type(model).__name__, buffers, sharded, tokenizer)
    store.model, store.config = model, config_of(model)
    return store

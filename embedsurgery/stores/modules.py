"""Tables in a model's parameters. What counts them in its modules and configs follows (``model_sizes.py``)."""

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
from embedsurgery.graph.vocabularies import names_of, rows_of_tables
from embedsurgery.graph.wrappers import plain_name
from embedsurgery.plan import Grow, Untie
from embedsurgery.stores.model_config import (
    SAVED,
    Count,
    Holder,
    counts,
    from_bytes,
    refuse_unknown,
    to_bytes,
    write_all,
)
from embedsurgery.stores.resized_tensors import memories
from embedsurgery.stores.tensor_store import TensorStore
from embedsurgery.stores.tie_states import FLAGS, restore_states, tie_states, untie_states
from embedsurgery.tensors.sharded import fsdp_version

_WRAPPED = frozenset({"base_layer", "modules_to_save", "original_module"})
"""Parts of the paths of tables around which PEFT has put layers, whose own matrices count the vocabulary too."""


class ModuleStore(TensorStore):
    """The tensors of a model.

    Growing replaces its parameters: an optimizer that was made before holds the old ones, and gradients are gone.
    """

    model: nn.Module

    def all_tensors(self) -> Mapping[str, torch.Tensor]:
        buffers = self.model.named_buffers(remove_duplicate=False)
        return {**self.tensors, **dict(self.model.named_parameters(remove_duplicate=False)), **dict(buffers)}

    def check_growth(self, vocabulary: Vocabulary, count: int) -> None:
        super().check_growth(vocabulary, count)
        holders, objects = self._holders(vocabulary)
        wrapped = next((h.path for h in holders if not _WRAPPED.isdisjoint(h.path.split("."))), None)
        if wrapped is not None:
            raise UnsupportedError(
                "another library has put a layer around the table, which would not grow with it",
                where=wrapped,
                hint="add tokens before the model is wrapped",
            )
        if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in self.model.modules()):
            raise UnsupportedError(
                "the model is being trained on several devices",
                where=self.name,
                found="DistributedDataParallel",
                hint="add tokens before it is wrapped",
            )
        columns = {self.graph.table(name).shape[1] for name in vocabulary.tables}
        refuse_unknown(self.model, holders, objects, rows_of_tables(self.graph, vocabulary), columns)
        self._counts(vocabulary)

    def _holders(self, vocabulary: Vocabulary) -> tuple[list[Holder], set[int]]:
        """The modules that hold a vocabulary, and the ids of the tensors that growing replaces."""
        turned: dict[int, bool] = {}
        for part in self.parts(vocabulary):
            own = memories(part.tensors[0])[0]
            columns = part.axis == 1 and part.of in vocabulary.tables
            turned.update({id(t): (memories(t)[0] == own) == columns for t in part.tensors})
        found = []
        for path, module in self.model.named_modules(remove_duplicate=False):
            held = [id(t) for part in (module._parameters, module._buffers) for t in part.values() if id(t) in turned]
            if held:
                found.append(Holder(path, module, any(turned[i] for i in held)))
        return found, set(turned)

    def _counts(self, vocabulary: Vocabulary) -> list[Count]:
        """Every place in the model that counts a vocabulary."""
        sizes = rows_of_tables(self.graph, vocabulary)
        names = names_of(self.graph, vocabulary)
        others = [v for v in self.graph.vocabularies if v.name != vocabulary.name and v.size in sizes]
        paths = {name.rpartition(".")[0] for other in others for name in names_of(self.graph, other)}
        return counts(self.model, self._holders(vocabulary)[0], names, sizes, paths)

    def growth_saved(self, edit: Grow) -> Mapping[str, bytes]:
        return {SAVED: to_bytes(self._counts(self.vocabulary(edit)))} if edit.count > 0 else {}

    def put(self, new: Mapping[int, torch.Tensor], edit: Grow) -> None:
        values = self._values(edit)
        done: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        try:
            for module in self.model.modules():
                parts: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
                for part in parts:
                    for leaf, old in list(part.items()):
                        if old is not None and id(old) in new:
                            done.append((part, leaf, old))
                            part[leaf] = new[id(old)]
            write_all(self.model, values)
        except BaseException:
            for part, leaf, old in done:
                part[leaf] = old
            raise

    def _values(self, edit: Grow) -> list[tuple[Count, int]]:
        """What each place that counts the vocabulary will say: in an undo, what it said."""
        if edit.count > 0 or SAVED not in edit.saved:
            return [(count, count.value + edit.count) for count in self._counts(self.vocabulary(edit))]
        try:
            saved = from_bytes(edit.saved[SAVED])
        except (ValueError, TypeError, KeyError) as error:
            raise PlanError(
                "an undo that does not say what it put where",
                where=f"{self.name}: {edit.vocabulary}",
                found=f"{type(error).__name__}: {error}",
            ) from error
        now = [replace(count, value=count.value - edit.count) for count in saved]
        return [(count, count.value + edit.count) for count in now if count.read(self.model) == count.value]

    def generation_config(self) -> Any:
        return getattr(self.model, "generation_config", None)

    def untie_saved(self, edit: Untie) -> Mapping[str, bytes]:
        return {} if edit.undo else {FLAGS: json.dumps(tie_states(self.model)).encode()}

    def untie(self, edit: Untie) -> None:
        """Put a Parameter of its own into the head, or the lookup's; the configs follow."""
        path, _, leaf = edit.head.rpartition(".")
        parameters = self.model.get_submodule(path)._parameters
        new = self.tensors[edit.table] if edit.undo else self.own_table(edit)
        if edit.undo:
            restore_states(self.model, json.loads(edit.saved.get(FLAGS, b"{}")))
        else:
            untie_states(self.model)
        parameters[leaf] = new if isinstance(new, nn.Parameter) else nn.Parameter(new)
        self.tensors = dict(self.model.named_parameters(remove_duplicate=False))
        self.graph = walk_module(self.model)
        self._transposed = frozenset(n for table in self.graph.tables for n in table.transposed)


def module_store(
    model: nn.Module, graph: EmbeddingGraph | None = None, tokenizer: Any = None, classify: Classify | None = None
) -> ModuleStore:
    """A store over a model's parameters.

    Args:
        model: The model.
        graph: Of the model, where it is known.
        tokenizer: Gets the tokens that plans add.
        classify: Says what a module of an unknown class is.

    Raises:
        UnsupportedError: DeepSpeed's ZeRO-3 has taken them apart.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    apart = next((name for name, p in parameters.items() if hasattr(p, "ds_id") and p.numel() == 0), None)
    if apart is not None:
        raise UnsupportedError(
            "the parameters are partitioned by DeepSpeed's ZeRO-3",
            where=apart,
            hint="attach before deepspeed.initialize, and merge on disk",
        )
    moved = [] if graph is None else [n for t in graph.tables for n in t.names if n not in parameters]
    if moved:  # into a wrapper such as PEFT's, or out of one
        plain = {plain_name(name): parameter for name, parameter in parameters.items()}
        parameters.update({name: plain[plain_name(name)] for name in moved if plain_name(name) in plain})
    buffers = (name for name, _ in model.named_buffers())
    wrapped = [f"{path}." if path else "" for path, module in model.named_modules() if fsdp_version(module)]
    sharded = [name for name in parameters if any(name.startswith(path) for path in wrapped)]
    graph = graph or walk_module(model, classify)
    store = ModuleStore(parameters, graph, type(model).__name__, buffers, sharded, tokenizer)
    store.model, store.config = model, config_of(model)
    return store

"""Tables in torch tensors: a module's parameters, or a state dict's values. Both are changed in place."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn

from embedsurgery.errors import UnsupportedError
from embedsurgery.graph import EmbeddingGraph, Table
from embedsurgery.names import Stored, walk_names
from embedsurgery.raw import RawArray
from embedsurgery.stores.base import Store
from embedsurgery.tensors import (
    Memory,
    dtype_string,
    from_raw,
    fsdp_version,
    is_sharded,
    memory_of,
    refuse_overlaps,
    rows_at,
    to_raw,
)
from embedsurgery.walker import walk_module
from embedsurgery.wrappers import plain_name


class TensorStore(Store):
    """Named tensors with a graph over them.

    Args:
        tensors: Name -> tensor, aliases included.
        graph: Of those tensors.
        name: For messages.
        others: Names of what lies beside them, such as buffers.
        sharded: Names of tensors that are gathered just now, by a wrapper that will drop what is written into them.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        graph: EmbeddingGraph,
        name: str,
        others: Iterable[str] = (),
        sharded: Iterable[str] = (),
    ) -> None:
        self.tensors = tensors
        self.sharded = frozenset(sharded)
        self.names = frozenset(tensors) | frozenset(others)
        self.graph = graph
        self.name = name
        self._transposed = frozenset(n for table in graph.tables for n in table.transposed)

    def _view(self, name: str) -> torch.Tensor:
        """The (V, D) view of a tensor's memory, out of autograd's sight."""
        tensor = self.tensors[name].detach()
        return tensor.t() if name in self._transposed else tensor

    def copies(self, table: Table) -> tuple[str, ...]:
        """One name for each separate memory among the table's names."""
        found: dict[Memory, str] = {}
        for name in table.names:
            if name in self.tensors:
                memory = memory_of(self.tensors[name])
                key = memory.transposed() if name in self._transposed else memory
                found.setdefault(key.normalised(), name)
        return tuple(found.values())

    def check_editable(self, table: Table) -> None:
        """As the base; meta and fake tensors too are refused."""
        super().check_editable(table)
        for name in table.names:
            tensor = self.tensors.get(name)
            if tensor is None:
                continue
            if tensor.device.type == "meta":
                raise UnsupportedError("the table has no values", where=name, found="a meta tensor",
                                       hint="load the weights first")  # fmt: skip
            if any(step == 0 and size > 1 for size, step in zip(tensor.shape, tensor.stride(), strict=True)):
                raise UnsupportedError("rows of the table share one memory", where=name, found="an expanded tensor",
                                       hint="clone it first")  # fmt: skip

    def check_writable(self, table: Table) -> None:
        """Refuse a sharded table, also one that is gathered just now."""
        for name in table.names:
            tensor = self.tensors.get(name)
            if tensor is not None and (is_sharded(tensor) or name in self.sharded or hasattr(tensor, "ds_id")):
                raise UnsupportedError("the table is sharded over devices", where=name, found=type(tensor).__name__,
                                       hint="merge into the checkpoint on disk instead")  # fmt: skip

    def tensor_names(self) -> Collection[str]:
        return self.names

    def read_rows(self, name: str, indices: tuple[int, ...]) -> RawArray:
        view = self._view(name)
        return to_raw(rows_at(view, torch.tensor(indices, dtype=torch.int64, device=view.device)))

    def write_rows(self, name: str, indices: tuple[int, ...], rows: RawArray) -> None:
        view = self._view(name)
        with torch.no_grad():
            view[torch.tensor(indices, dtype=torch.int64, device=view.device)] = from_raw(rows).to(view.device)

    def read_block(self, name: str, start: int, stop: int) -> RawArray:
        view = self._view(name)
        if is_sharded(view):
            return to_raw(rows_at(view, torch.arange(start, stop, device=view.device)))
        return to_raw(view[start:stop])

    def write_block(self, name: str, start: int, rows: RawArray) -> None:
        view = self._view(name)
        with torch.no_grad():
            view[start : start + rows.shape[0]].copy_(from_raw(rows).to(view.device))


def module_store(model: nn.Module, graph: EmbeddingGraph | None = None) -> TensorStore:
    """A store over a model's parameters.

    Raises:
        UnsupportedError: DeepSpeed's ZeRO-3 has taken them apart.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    apart = next((name for name, p in parameters.items() if hasattr(p, "ds_id") and p.numel() == 0), None)
    if apart is not None:
        raise UnsupportedError("the parameters are partitioned by DeepSpeed's ZeRO-3", where=apart,
                               hint="attach before deepspeed.initialize, and merge on disk")  # fmt: skip
    moved = [] if graph is None else [n for t in graph.tables for n in t.names if n not in parameters]
    if moved:  # into a wrapper such as PEFT's, or out of one
        plain = {plain_name(name): parameter for name, parameter in parameters.items()}
        parameters.update({name: plain[plain_name(name)] for name in moved if plain_name(name) in plain})
    buffers = (name for name, _ in model.named_buffers())
    wrapped = [f"{path}." if path else "" for path, module in model.named_modules() if fsdp_version(module)]
    sharded = [name for name in parameters if any(name.startswith(path) for path in wrapped)]
    return TensorStore(parameters, graph or walk_module(model), type(model).__name__, buffers, sharded)


def state_dict_store(state_dict: Mapping[str, torch.Tensor]) -> TensorStore:
    """A store over a state dict: tensors of one memory are one table, and so are pairs of input and output names
    with equal values, as a file holds them that stores a tie twice.
    """
    tensors = {name: value for name, value in state_dict.items() if isinstance(value, torch.Tensor)}
    groups: dict[Memory, str] = {}
    stored = []
    for name, value in tensors.items():
        memory = memory_of(value).normalised()
        turned = memory.transposed().normalised() if value.dim() == 2 else memory
        group, other = groups.get(memory), groups.get(turned)
        if group is None and other is None:
            groups[memory] = name
        found = Stored(name, dtype_string(value), tuple(value.shape), group or other or name)
        stored.append(replace(found, transposed=group is None and other is not None))

    def equal(a: str, b: str) -> bool:
        left, right = tensors[a], tensors[b]
        if (left.shape, left.dtype) != (right.shape, right.dtype) or "meta" in (left.device.type, right.device.type):
            return False
        left, right = left.detach().contiguous(), right.detach().to(left.device).contiguous()
        return torch.equal(left.view(torch.uint8), right.view(torch.uint8))

    graph = walk_names(stored, config=None, source="state dict", equal=equal)
    names = {name: memory_of(tensors[name]) for table in graph.tables for name in table.names if name in tensors}
    refuse_overlaps(names, {name: memory_of(tensor) for name, tensor in tensors.items() if name not in names})
    return TensorStore(tensors, graph, "state dict")

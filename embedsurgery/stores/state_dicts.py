"""The store over a state dict. It has no config and no modules, so only its tensors grow.

``tensor_store.py`` has what it shares with models.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from typing import Any

import torch

from embedsurgery.errors import UnsupportedError
from embedsurgery.graph import Vocabulary
from embedsurgery.graph.from_names import Stored, walk_names
from embedsurgery.plan import Grow, Untie
from embedsurgery.stores.tensor_store import TensorStore
from embedsurgery.tensors.convert import dtype_string
from embedsurgery.tensors.memory import Memory, memory_of, refuse_overlaps


class StateDictStore(TensorStore):
    """The tensors of a state dict."""

    mapping: Mapping[str, Any]

    def all_tensors(self) -> Mapping[str, torch.Tensor]:
        return self.tensors

    def check_growth(self, vocabulary: Vocabulary, count: int) -> None:
        super().check_growth(vocabulary, count)
        if not isinstance(self.mapping, MutableMapping):
            raise UnsupportedError(
                "a read-only state dict cannot grow",
                where=self.name,
                found=type(self.mapping).__name__,
                expected="a dict",
            )

    def check_untie(self, edit: Untie) -> None:
        super().check_untie(edit)
        if not isinstance(self.mapping, MutableMapping):
            raise UnsupportedError(
                "the head of a read-only state dict cannot be untied",
                where=self.name,
                found=type(self.mapping).__name__,
                expected="a dict",
            )

    def replace_tensors(self, new: Mapping[int, torch.Tensor], edit: Grow) -> None:
        assert isinstance(self.mapping, MutableMapping)
        done: list[tuple[str, Any]] = []
        try:
            for name, old in list(self.mapping.items()):
                if id(old) in new:
                    done.append((name, old))
                    self.mapping[name] = new[id(old)]
        except BaseException:
            for name, old in done:
                self.mapping[name] = old
            raise

    def untie(self, edit: Untie) -> None:
        assert isinstance(self.mapping, MutableMapping)
        self.mapping[edit.head] = self.tensors[edit.table] if edit.undo else self.build_head(edit)
        again = state_dict_store(self.mapping, self.tokenizer)
        self.tensors, self.graph, self._transposed = again.tensors, again.graph, again._transposed


def state_dict_store(state_dict: Mapping[str, torch.Tensor], tokenizer: Any = None) -> StateDictStore:
    """Create a store over a state dict.

    Tensors that share their memory are one table. So are an input and an output table with equal values: a file that
    stores a tie twice is loaded like that.

    Args:
        state_dict: Name -> tensor; other values are ignored. It must be mutable to grow.
        tokenizer: The tokenizer that plans may change.

    Raises:
        OverlapError: A tensor shares part of a table's memory.
    """
    tensors = {name: value for name, value in state_dict.items() if isinstance(value, torch.Tensor)}
    groups: dict[Memory, str] = {}
    stored = []
    for name, value in tensors.items():
        memory = memory_of(value).normalize()
        transposed = memory.transpose().normalize() if value.dim() == 2 else memory
        group, other = groups.get(memory), groups.get(transposed)
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
    store = StateDictStore(tensors, graph, "state dict", tokenizer=tokenizer)
    store.mapping = state_dict
    return store

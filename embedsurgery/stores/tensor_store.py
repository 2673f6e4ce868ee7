"""The common base of the stores over named torch tensors: models (``modules.py``) and state dicts (``state_dicts.py``).

Rows are written into the existing tensors. Growing replaces tensors by new ones, which ``resized_tensors.py`` creates
and the subclasses put into the model or state dict.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from embedsurgery.errors import UnsupportedEditError, UnsupportedError
from embedsurgery.graph import EmbeddingGraph, Table, Vocabulary
from embedsurgery.graph.vocabularies import canonical_name, resize_graph
from embedsurgery.plan import AddTokens, Edit, Grow, Suppress, Untie
from embedsurgery.stores.generation_config import KEY, add_suppressed
from embedsurgery.stores.resized_tensors import memory_and_transpose, refuse_irreplaceable, resize_tensors
from embedsurgery.stores.store import Store
from embedsurgery.tensors.convert import dtype_string, from_raw, to_raw
from embedsurgery.tensors.memory import Memory, memory_of
from embedsurgery.tensors.raw import RawArray
from embedsurgery.tensors.sharded import gather_rows, is_sharded


@dataclass(frozen=True)
class StoredTensor:
    """A copy of a table or per-token vector with its own memory, which growing replaces.

    Attributes:
        of: Name of the table or vector in the vocabulary.
        name: Name of this copy.
        tensors: All tensor objects that share its memory, the one of that name first.
        axis: The axis of the first tensor with one entry per token.
    """

    of: str
    name: str
    tensors: tuple[torch.Tensor, ...]
    axis: int


class TensorStore(Store):
    """Named tensors with a graph.

    Args:
        tensors: Name -> tensor, including aliases.
        graph: The graph of these tensors.
        name: Name of the store, for messages.
        others: Names of other tensors, such as buffers.
        sharded: Names of tensors that FSDP has currently gathered. Values written into them would be lost.
        tokenizer: The tokenizer that plans may change; None if there is none.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        graph: EmbeddingGraph,
        name: str,
        others: Iterable[str] = (),
        sharded: Iterable[str] = (),
        tokenizer: Any = None,
    ) -> None:
        self.tensors = dict(tensors)
        self.sharded = frozenset(sharded)
        self.names = frozenset(tensors) | frozenset(others)
        self.tokenizer = tokenizer
        self.graph = graph
        self.name = name
        self._transposed = frozenset(n for table in graph.tables for n in table.transposed)

    def _view(self, name: str) -> torch.Tensor:
        """Return the (V, D) view of a tensor, detached from autograd."""
        # Not .data: detach() shares the version counter, so autograd notices that a table it has saved was changed.
        tensor = self.tensors[name].detach()
        return tensor.t() if name in self._transposed else tensor

    def copies(self, table: Table) -> tuple[str, ...]:
        """Return one name for each separate memory among the table's names."""
        found: dict[Memory, str] = {}
        for name in table.names:
            if name in self.tensors:
                memory = memory_of(self.tensors[name])
                key = memory.transpose() if name in self._transposed else memory
                found.setdefault(key.normalize(), name)
        return tuple(found.values())

    def check_editable(self, table: Table) -> None:
        """Refuse also tables without values, on the meta device, and expanded tensors."""
        super().check_editable(table)
        for name in table.names:
            tensor = self.tensors.get(name)
            if tensor is None:
                continue
            if tensor.device.type == "meta":
                raise UnsupportedError(
                    "the table has no values",
                    where=name,
                    found="a meta tensor",
                    hint="load the weights first; if the model is offloaded, keep the table on a device",
                )
            # Setting one row of an expanded tensor would set all of them.
            if any(step == 0 and size > 1 for size, step in zip(tensor.shape, tensor.stride(), strict=True)):
                raise UnsupportedError(
                    "rows of the table share their memory",
                    where=name,
                    found="an expanded tensor",
                    hint="clone it first",
                )

    def check_writable(self, table: Table) -> None:
        """Refuse a sharded table, even if it is currently gathered."""
        for name in table.names:
            if name in self.tensors:
                self.refuse_sharded(name, self.tensors[name])

    def refuse_sharded(self, name: str, tensor: torch.Tensor) -> None:
        """Refuse a tensor of which this process has only a shard."""
        if is_sharded(tensor) or name in self.sharded or hasattr(tensor, "ds_id"):
            raise UnsupportedError(
                "the tensor is sharded over devices",
                where=name,
                found=type(tensor).__name__,
                hint="merge into the checkpoint on disk instead",
            )

    def tensor_names(self) -> Collection[str]:
        return self.names

    def read_rows(self, name: str, indices: tuple[int, ...]) -> RawArray:
        view = self._view(name)
        return to_raw(gather_rows(view, torch.tensor(indices, dtype=torch.int64, device=view.device)))

    def write_rows(self, name: str, indices: tuple[int, ...], rows: RawArray) -> None:
        view = self._view(name)
        with torch.no_grad():
            view[torch.tensor(indices, dtype=torch.int64, device=view.device)] = from_raw(rows).to(view.device)

    def read_block(self, name: str, start: int, stop: int) -> RawArray:
        view = self._view(name)
        if is_sharded(view):
            return to_raw(gather_rows(view, torch.arange(start, stop, device=view.device)))
        return to_raw(view[start:stop])

    def write_block(self, name: str, start: int, rows: RawArray) -> None:
        view = self._view(name)
        with torch.no_grad():
            view[start : start + rows.shape[0]].copy_(from_raw(rows).to(view.device))

    @abstractmethod
    def all_tensors(self) -> Mapping[str, torch.Tensor]:
        """Return name -> tensor of all stored tensors. Each object has at least one name."""

    @abstractmethod
    def replace_tensors(self, new: Mapping[int, torch.Tensor], edit: Grow) -> None:
        """Replace tensors, and update the sizes that depend on them. Completely or not at all.

        Args:
            new: ``id`` of the old tensor -> new tensor.
            edit: The `Grow` that is applied.
        """

    def tensor_shapes(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        return {name: (dtype_string(t), tuple(t.shape)) for name, t in self.all_tensors().items()}

    def read_vector(self, name: str) -> RawArray:
        return to_raw(self.all_tensors()[name].detach().reshape(-1))

    def check_vector(self, name: str) -> None:
        for vocabulary in self.graph.vocabularies:
            for copy in self.vector_copies(vocabulary, name) if name in vocabulary.vectors else ():
                self.refuse_sharded(copy, self.all_tensors()[copy])

    def write_entries(self, name: str, indices: tuple[int, ...], entries: RawArray) -> None:
        vocabulary = next(v for v in self.graph.vocabularies if name in v.vectors)
        for copy in self.vector_copies(vocabulary, name):
            tensor = self.all_tensors()[copy].detach()
            at = torch.tensor(indices, dtype=torch.int64, device=tensor.device)
            tensor[..., at] = from_raw(entries.to(dtype_string(tensor))).to(tensor.device)

    def vector_copies(self, vocabulary: Vocabulary, name: str) -> Sequence[str]:
        """Return the names of separate copies of a per-token vector. A state dict may have it under both its names."""
        found = {memory_of(self.all_tensors()[name]).normalize(): name}
        for other, tensor in self.all_tensors().items():
            if canonical_name(other) == canonical_name(name) and other not in vocabulary.vectors:
                found.setdefault(memory_of(tensor).normalize(), other)
        return tuple(found.values())

    def stored_tensors(self, vocabulary: Vocabulary) -> list[StoredTensor]:
        """Return every copy of a vocabulary's tables and vectors, with all tensor objects that share its memory."""
        sharing: dict[Memory, dict[int, torch.Tensor]] = {}
        for tensor in (*self.tensors.values(), *self.all_tensors().values()):
            sharing.setdefault(memory_of(tensor).normalize(), {})[id(tensor)] = tensor
        copies = [
            (of, name, self.tensors[name], 1 if name in self._transposed else 0)
            for of in vocabulary.tables
            for name in self.copies(self.graph.table(of))
        ]
        for of in vocabulary.vectors:
            for name in self.vector_copies(vocabulary, of):
                tensor = self.all_tensors()[name]
                copies.append((of, name, tensor, tensor.dim() - 1))
        found = []
        for of, name, tensor, axis in copies:
            own, transposed = memory_and_transpose(tensor)
            same = {id(tensor): tensor, **sharing[own]}
            # A head may be tied as the transposed view of the table.
            is_table = tensor.dim() == 2 and own != transposed and of not in vocabulary.vectors
            views = sharing.get(transposed, {}) if is_table else {}
            found.append(StoredTensor(of, name, tuple({**same, **views}.values()), axis))
        return found

    def check_growth(self, vocabulary: Vocabulary, count: int) -> None:
        super().check_growth(vocabulary, count)
        for table in map(self.graph.table, vocabulary.tables):
            self.check_writable(table)
        for stored in self.stored_tensors(vocabulary):
            for tensor in stored.tensors:
                refuse_irreplaceable(stored.name, tensor)

    def grow(self, edit: Grow) -> None:
        vocabulary = self.vocabulary(edit)
        values = {**edit.rows, **edit.vectors}
        new: dict[int, torch.Tensor] = {}
        for stored in self.stored_tensors(vocabulary):
            rows = values[stored.of].to(dtype_string(stored.tensors[0])) if edit.count > 0 else None
            new.update(resize_tensors(stored.tensors, stored.axis, edit.count, rows))
        self.replace_tensors(new, edit)
        self.tensors = {name: new.get(id(t), t) for name, t in self.tensors.items()}
        self.graph = resize_graph(self.graph, vocabulary, edit.count)

    def check_untie(self, edit: Untie) -> None:
        super().check_untie(edit)
        if not edit.undo:
            if self.graph.table(edit.table).transposed or edit.head not in self.tensors:
                raise UnsupportedError(
                    "this head cannot be untied",
                    where=f"{self.name}: {edit.head}",
                    expected="a tensor of the shape of the input table",
                    hint="keep the tie, and suppress the tokens",
                )
            refuse_irreplaceable(edit.head, self.tensors[edit.head])
            self.refuse_sharded(edit.head, self.tensors[edit.head])

    def build_head(self, edit: Untie) -> torch.Tensor:
        """Create the weight of an untied head: a copy of the input table, of the same class, in which rows differ."""
        old = self.tensors[edit.table]
        new = resize_tensors([old], 0, 0, None)[id(old)]
        with torch.no_grad():
            at = torch.tensor(edit.indices, dtype=torch.int64, device=new.device)
            new[at] = from_raw(edit.rows.to(dtype_string(new))).to(new.device)
        return new

    def expand_suppression(self, edit: Suppress) -> tuple[Edit, ...]:
        """Return the edit itself; nothing if there is no generation config."""
        return (edit,) if self.generation_config() is not None else ()

    def expand_tokens(self, edit: AddTokens) -> tuple[Edit, ...]:
        """Return the edit itself.

        Raises:
            UnsupportedEditError: The store has no tokenizer.
        """
        if self.tokenizer is None:
            raise UnsupportedEditError(
                "the plan changes the tokenizer, and no tokenizer was given",
                where=self.name,
                found=edit.describe(),
                hint="pass tokenizer=",
            )
        return (edit,)

    def generation_config(self) -> Any:
        """Return the model's generation config; None if it has none."""
        return None

    def suppress(self, edit: Suppress) -> None:
        config = self.generation_config()
        if edit.undo:
            setattr(config, KEY, None if edit.restore is None else list(edit.restore))
        else:
            setattr(config, KEY, add_suppressed(getattr(config, KEY, None), edit.ids, self.name))

    def invert_suppression(self, edit: Suppress) -> Suppress:
        known = getattr(self.generation_config(), KEY, None)
        return Suppress(edit.ids, None if known is None else tuple(known), not edit.undo)

    def invert_tokens(self, edit: AddTokens) -> tuple[AddTokens, ...]:
        from embedsurgery.tokenizer.live import undo_of

        return undo_of(self.tokenizer, edit)

    def change_tokens(self, edit: AddTokens) -> None:
        from embedsurgery.tokenizer.live import change_tokens

        change_tokens(self.tokenizer, edit)

"""Tables in named torch tensors, whatever holds those: rows are written into the tensors that are there.

Growing puts new tensors in their places. How those are made is ``grown_tensors.py``'s; the places are a model's
(``modules.py``) or a state dict's (``state_dicts.py``).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from embedsurgery.errors import UnsupportedEditError, UnsupportedError
from embedsurgery.graph import EmbeddingGraph, Table, Vocabulary
from embedsurgery.graph.vocabularies import canonical, grown_graph
from embedsurgery.plan import AddTokens, Edit, Grow, Suppress, Untie
from embedsurgery.stores.generation_config import KEY, suppressed
from embedsurgery.stores.resized_tensors import grown, memories, refuse_odd
from embedsurgery.stores.store import Store
from embedsurgery.tensors.convert import dtype_string, from_raw, to_raw
from embedsurgery.tensors.memory import Memory, memory_of
from embedsurgery.tensors.raw import RawArray
from embedsurgery.tensors.sharded import is_sharded, rows_at


@dataclass(frozen=True)
class StoredTensor:
    """A separate memory that growing replaces.

    Attributes:
        of: The table or vector that it is (a copy of), by its name in the vocabulary.
        name: Its own name.
        tensors: Every object over it, the one of that name first.
        axis: The first one's axis with one entry a token.
    """

    of: str
    name: str
    tensors: tuple[torch.Tensor, ...]
    axis: int


class TensorStore(Store):
    """Named tensors with a graph over them.

    Args:
        tensors: Name -> tensor, aliases included.
        graph: Of those tensors.
        name: For messages.
        others: Names of what lies beside them, such as buffers.
        sharded: Names of tensors that are gathered just now, by a wrapper that will drop what is written into them.
        tokenizer: Gets the tokens that plans add; None where there is none.
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
                raise UnsupportedError(
                    "the table has no values",
                    where=name,
                    found="a meta tensor",
                    hint="load the weights first, and keep the table on a device where a model is offloaded",
                )
            if any(step == 0 and size > 1 for size, step in zip(tensor.shape, tensor.stride(), strict=True)):
                raise UnsupportedError(
                    "rows of the table share one memory", where=name, found="an expanded tensor", hint="clone it first"
                )

    def check_writable(self, table: Table) -> None:
        """Refuse a sharded table, also one that is gathered just now."""
        for name in table.names:
            if name in self.tensors:
                self.refuse_sharded(name, self.tensors[name])

    def refuse_sharded(self, name: str, tensor: torch.Tensor) -> None:
        """Refuse a tensor of which this process has only a part."""
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

    @abstractmethod
    def all_tensors(self) -> Mapping[str, torch.Tensor]:
        """Name -> tensor of everything that is stored, each object under one name at least."""

    @abstractmethod
    def put(self, new: Mapping[int, torch.Tensor], edit: Grow) -> None:
        """Put new tensors in the places of others, ``id(old)`` -> new, and bring up to date what counts them: all or
        nothing.
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
        """The names of separate copies of a per-token vector: a state dict may have it under both its names."""
        found = {memory_of(self.all_tensors()[name]).normalised(): name}
        for other, tensor in self.all_tensors().items():
            if canonical(other) == canonical(name) and other not in vocabulary.vectors:
                found.setdefault(memory_of(tensor).normalised(), other)
        return tuple(found.values())

    def parts(self, vocabulary: Vocabulary) -> list[StoredTensor]:
        """Every separate memory that growing replaces."""
        over: dict[Memory, dict[int, torch.Tensor]] = {}
        for tensor in (*self.tensors.values(), *self.all_tensors().values()):
            over.setdefault(memory_of(tensor).normalised(), {})[id(tensor)] = tensor
        named = [
            (of, name, self.tensors[name], 1 if name in self._transposed else 0)
            for of in vocabulary.tables
            for name in self.copies(self.graph.table(of))
        ]
        for of in vocabulary.vectors:
            for name in self.vector_copies(vocabulary, of):
                tensor = self.all_tensors()[name]
                named.append((of, name, tensor, tensor.dim() - 1))
        found = []
        for of, name, tensor, axis in named:
            own, turned = memories(tensor)
            same = {id(tensor): tensor, **over[own]}
            other = {} if tensor.dim() != 2 or own == turned or of in vocabulary.vectors else over.get(turned, {})
            found.append(StoredTensor(of, name, tuple({**same, **other}.values()), axis))
        return found

    def check_growth(self, vocabulary: Vocabulary, count: int) -> None:
        super().check_growth(vocabulary, count)
        for table in map(self.graph.table, vocabulary.tables):
            self.check_writable(table)
        for part in self.parts(vocabulary):
            for tensor in part.tensors:
                refuse_odd(part.name, tensor)

    def grow(self, edit: Grow) -> None:
        vocabulary = self.vocabulary(edit)
        values = {**edit.rows, **edit.vectors}
        new: dict[int, torch.Tensor] = {}
        for part in self.parts(vocabulary):
            rows = values[part.of].to(dtype_string(part.tensors[0])) if edit.count > 0 else None
            new.update(grown(part.tensors, part.axis, edit.count, rows))
        self.put(new, edit)
        self.tensors = {name: new.get(id(t), t) for name, t in self.tensors.items()}
        self.graph = grown_graph(self.graph, vocabulary, edit.count)

    def check_untie(self, edit: Untie) -> None:
        super().check_untie(edit)
        if not edit.undo:
            if self.graph.table(edit.table).transposed or edit.head not in self.tensors:
                raise UnsupportedError(
                    "this head cannot get a table of its own",
                    where=f"{self.name}: {edit.head}",
                    expected="a tensor of the shape of the lookup's",
                    hint="keep the tie, and suppress the tokens",
                )
            refuse_odd(edit.head, self.tensors[edit.head])
            self.refuse_sharded(edit.head, self.tensors[edit.head])

    def own_table(self, edit: Untie) -> torch.Tensor:
        """What a projection gets of its own: the lookup's table with some other rows, of the same class."""
        old = self.tensors[edit.table]
        new = grown([old], 0, 0, None)[id(old)]
        with torch.no_grad():
            at = torch.tensor(edit.indices, dtype=torch.int64, device=new.device)
            new[at] = from_raw(edit.rows.to(dtype_string(new))).to(new.device)
        return new

    def expand_suppression(self, edit: Suppress) -> tuple[Edit, ...]:
        """The edit itself; nothing without a generation config."""
        return (edit,) if self.generation_config() is not None else ()

    def expand_tokens(self, edit: AddTokens) -> tuple[Edit, ...]:
        """The edit itself."""
        if self.tokenizer is None:
            raise UnsupportedEditError(
                "no tokenizer was given, and the plan changes it",
                where=self.name,
                found=edit.describe(),
                hint="give tokenizer=",
            )
        return (edit,)

    def generation_config(self) -> Any:
        """What says how the model generates; None where nothing does."""
        return None

    def suppress(self, edit: Suppress) -> None:
        config = self.generation_config()
        if edit.undo:
            setattr(config, KEY, None if edit.restore is None else list(edit.restore))
        else:
            setattr(config, KEY, suppressed(getattr(config, KEY, None), edit.ids, self.name))

    def suppression_undone(self, edit: Suppress) -> Suppress:
        known = getattr(self.generation_config(), KEY, None)
        return Suppress(edit.ids, None if known is None else tuple(known), not edit.undo)

    def tokens_undone(self, edit: AddTokens) -> tuple[AddTokens, ...]:
        from embedsurgery.tokenizer.live import undo_of

        return undo_of(self.tokenizer, edit)

    def change_tokens(self, edit: AddTokens) -> None:
        from embedsurgery.tokenizer.live import change_tokens

        change_tokens(self.tokenizer, edit)

"""Trainable rows as modules that the base model does not see in its state dict."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import nn

from embedsurgery.tensors.convert import from_raw
from embedsurgery.tensors.raw import RawArray
from embedsurgery.tensors.sharded import is_sharded, part_of


class Hidden(nn.Module):
    """A module whose parameters train, move and pickle with the model, and stay out of its state dict.

    ``.to(device)`` moves them; ``.to(dtype)``, ``.half()`` and the like do not change their dtype.
    """

    embedsurgery_private = True

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Nothing: a model's state dict is always the base's."""
        return {} if destination is None else destination

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is expected, so nothing is missing."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Hidden:
        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self


class Rows(Hidden):
    """The rows of one table in one adapter.

    Attributes:
        values: The rows, Parameter (K, D), fp32 (fp64 for an fp64 table): masters, rounded to the table's dtype in
            the forward.
        indices: Row numbers in the order of ``values``, int64 (K,).
        given: The same, as they were given.
        numbers: The same, to ask for one.
        sorted: The same, ascending.
        order: Position in ``values`` of each entry of ``sorted``.
        first: The first row number where ``indices`` are consecutive numbers, ascending; else None.
        shared: See ``picking.py``.
        samples: While a batch mixes adapters, which of its samples these rows are for, bool (B,).
        names: While a batch mixes adapters, the adapter of each sample.
        kept: Values and buffers as they were before the module went to the meta device, while it is there.
    """

    values: nn.Parameter
    indices: torch.Tensor
    given: tuple[int, ...]
    numbers: Container[int]
    sorted: torch.Tensor
    order: torch.Tensor
    first: int | None
    shared: tuple[torch.Tensor, torch.Tensor] | None = None
    samples: torch.Tensor | None = None
    names: tuple[str | None, ...] = ()
    kept: tuple[torch.Tensor, ...] | None = None

    def __init__(self, values: RawArray, indices: tuple[int, ...], device: torch.device) -> None:
        super().__init__()
        self.values = nn.Parameter(from_raw(values).to(device))
        self.given, self.numbers = indices, frozenset(indices)
        consecutive = len(indices) > 0 and indices == tuple(range(indices[0], indices[0] + len(indices)))
        self.first = indices[0] if consecutive else None
        rows = torch.tensor(indices, dtype=torch.int64, device=device)
        ascending, order = torch.sort(rows)
        self.register_buffer("indices", rows, persistent=False)
        self.register_buffer("sorted", ascending, persistent=False)
        self.register_buffer("order", order, persistent=False)
        self._written = self._times_written()

    def find(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For each token id its position in ``values`` (any valid one for a stranger), and whether it is one of ours.

        Args:
            ids: Integers of any shape.

        Returns:
            Positions, int64, and hits, bool, both of the shape of ``ids``.
        """
        place = torch.searchsorted(self.sorted, ids.contiguous()).clamp(max=self.sorted.numel() - 1)
        return self.order[place], self.sorted[place] == ids

    def mend(self) -> None:
        """Set row numbers right that something has written to: averages over a model's buffers round them down."""
        if self.indices.is_meta or self._times_written() == self._written:
            return
        rows = torch.tensor(self.given, dtype=torch.int64, device=self.indices.device)
        ascending, order = torch.sort(rows)
        for name, right in (("indices", rows), ("sorted", ascending), ("order", order)):
            if not torch.equal(getattr(self, name), right):
                setattr(self, name, right)
        self._written = self._times_written()

    def _times_written(self) -> int | None:
        """How often row numbers were changed in place; None where that is not known."""
        numbers = (self.indices, self.sorted, self.order)
        return None if any(part.is_inference() for part in numbers) else sum(part._version for part in numbers)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Rows:
        """As the base; a stay on the meta device, where wrappers shard models without memory, loses no values."""
        self.shared, self._written = None, -1
        before = (self.values.detach(), self.indices, self.sorted, self.order)
        super()._apply(fn, recurse)
        if self.values.is_meta and not before[0].is_meta:
            self.kept = before
        elif not self.values.is_meta:
            self._restore(self.values.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is expected; but where the model's values come back from the meta device, so do the rows."""
        if self.values.is_meta and self.kept is not None:
            mesh = getattr(self.values, "device_mesh", None)
            self._restore(self.kept[0].device if mesh is None else torch.device(mesh.device_type))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "shared": None, "_written": -1}

    def _restore(self, device: torch.device) -> None:
        if self.kept is None:
            return
        (values, *buffers), self.kept = self.kept, None
        if is_sharded(self.values) and not is_sharded(values):
            values = part_of(values.to(device), self.values)
        self.values = nn.Parameter(values.to(device), self.values.requires_grad)
        self.indices, self.sorted, self.order = (buffer.to(device) for buffer in buffers)

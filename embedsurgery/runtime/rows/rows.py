"""Trainable rows, as modules that are not in the model's state dict."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import nn

from embedsurgery.tensors.convert import from_raw
from embedsurgery.tensors.raw import RawArray
from embedsurgery.tensors.sharded import is_sharded, shard_like


class UnsavedModule(nn.Module):
    """A module whose parameters train, move and pickle with the model, but are not in its state dict.

    ``.to(device)`` moves them; ``.to(dtype)``, ``.half()`` and the like do not change their dtype.
    """

    embedsurgery_private = True

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Return nothing: a model's state dict is the base's."""
        return {} if destination is None else destination

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Expect nothing, so that a strict load reports no missing keys."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> UnsavedModule:
        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self


class Rows(UnsavedModule):
    """The rows of one table in one adapter.

    Attributes:
        values: The rows, Parameter (K, D), fp32 (fp64 for an fp64 table); a forward rounds them to the table's dtype.
        indices: Row numbers in the order of ``values``, int64 (K,).
        index_tuple: The same numbers, as they were given.
        index_set: The same numbers, for membership tests.
        sorted_indices: The same numbers, ascending, int64 (K,).
        sort_order: Position in ``values`` of each entry of ``sorted_indices``, int64 (K,).
        run_start: The first row number if ``indices`` are consecutive and ascending; else None.
        shared: The values behind a shared autograd node, for lookups and for heads: see ``sparse_lookup.py``.
        samples: Inside `Attachment.per_sample`, which samples of the batch these rows are for, bool (B,).
        names: Inside `Attachment.per_sample`, the adapter of each sample.
        before_meta: While the module is on the meta device: the values and buffers that it had before.
    """

    values: nn.Parameter
    indices: torch.Tensor
    index_tuple: tuple[int, ...]
    index_set: Container[int]
    sorted_indices: torch.Tensor
    sort_order: torch.Tensor
    run_start: int | None
    shared: tuple[torch.Tensor, torch.Tensor] | None = None
    samples: torch.Tensor | None = None
    names: tuple[str | None, ...] = ()
    before_meta: tuple[torch.Tensor, ...] | None = None

    def __init__(self, values: RawArray, indices: tuple[int, ...], device: torch.device) -> None:
        super().__init__()
        self.values = nn.Parameter(from_raw(values).to(device))
        self.index_tuple, self.index_set = indices, frozenset(indices)
        consecutive = len(indices) > 0 and indices == tuple(range(indices[0], indices[0] + len(indices)))
        self.run_start = indices[0] if consecutive else None
        numbers = torch.tensor(indices, dtype=torch.int64, device=device)
        ascending, order = torch.sort(numbers)
        self.register_buffer("indices", numbers, persistent=False)
        self.register_buffer("sorted_indices", ascending, persistent=False)
        self.register_buffer("sort_order", order, persistent=False)
        self._checked_version = self._buffer_version()

    def find(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Find token ids among the rows.

        Args:
            ids: Token ids, integers of any shape.

        Returns:
            For each id its position in ``values``, int64, and whether it is one of the rows, bool. For other ids the
            position is arbitrary, but valid.
        """
        place = torch.searchsorted(self.sorted_indices, ids.contiguous()).clamp(max=self.sorted_indices.numel() - 1)
        return self.sort_order[place], self.sorted_indices[place] == ids

    def repair_indices(self) -> None:
        """Restore row numbers that were overwritten: an average over a model's buffers rounds them down."""
        if self.indices.is_meta or self._buffer_version() == self._checked_version:
            return
        numbers = torch.tensor(self.index_tuple, dtype=torch.int64, device=self.indices.device)
        ascending, order = torch.sort(numbers)
        for name, right in (("indices", numbers), ("sorted_indices", ascending), ("sort_order", order)):
            if not torch.equal(getattr(self, name), right):
                setattr(self, name, right)
        self._checked_version = self._buffer_version()

    def _buffer_version(self) -> int | None:
        """Return a number that grows with each in-place write to a buffer; None for tensors without a version."""
        buffers = (self.indices, self.sorted_indices, self.sort_order)
        return None if any(part.is_inference() for part in buffers) else sum(part._version for part in buffers)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Rows:
        """Move the rows. On the meta device, where wrappers shard a model without memory, their values are kept."""
        self.shared, self._checked_version = None, -1
        before = (self.values.detach(), self.indices, self.sorted_indices, self.sort_order)
        super()._apply(fn, recurse)
        if self.values.is_meta and not before[0].is_meta:
            self.before_meta = before
        elif not self.values.is_meta:
            self._restore_from_meta(self.values.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Expect nothing; but a load that brings the model's values back from the meta device brings the rows back."""
        if self.values.is_meta and self.before_meta is not None:
            mesh = getattr(self.values, "device_mesh", None)
            self._restore_from_meta(self.before_meta[0].device if mesh is None else torch.device(mesh.device_type))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "shared": None, "_checked_version": -1}

    def _restore_from_meta(self, device: torch.device) -> None:
        if self.before_meta is None:
            return
        (values, *buffers), self.before_meta = self.before_meta, None
        if is_sharded(self.values) and not is_sharded(values):
            values = shard_like(values.to(device), self.values)
        self.values = nn.Parameter(values.to(device), self.values.requires_grad)
        self.indices, self.sorted_indices, self.sort_order = (buffer.to(device) for buffer in buffers)

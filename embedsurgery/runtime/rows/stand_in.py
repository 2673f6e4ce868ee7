"""A lazy tensor that covers a weight while a model runs: a read of its values makes a full copy with the live rows.

Its shape, dtype and the like cost nothing, and a lookup costs what a lookup costs. The first other torch function makes
the (V, D) copy, which all others of that forward share. A forward that does not read the weight costs nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from embedsurgery.errors import UnsupportedError
from embedsurgery.graph import Table
from embedsurgery.runtime.calls import frame_at, innermost_of
from embedsurgery.runtime.rows.full_copy import full_copy, values_of, with_gradient
from embedsurgery.runtime.rows.rows import Rows
from embedsurgery.runtime.rows.sparse_lookup import is_transformed
from embedsurgery.runtime.rows.whole_tables import select_rows

_VALUES = frozenset({"data", "T", "H", "mT", "mH", "real", "imag", "__cuda_array_interface__"})
"""Attributes that return a tensor's values; all others only describe it."""

_DESCRIBE = frozenset(
    {
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "stride",
        "storage_offset",
        "untyped_storage",
        "element_size",
        "get_device",
        "is_contiguous",
        "is_floating_point",
        "is_complex",
        "is_signed",
        "is_conj",
        "is_neg",
        "is_inference",
        "is_pinned",
        "is_shared",
        "is_same_size",
        "_is_view",
        "__len__",
        "__hash__",
        "has_names",
        "register_hook",
        "retain_grad",
        "result_type",
        "empty_like",
        "zeros_like",
        "ones_like",
        "full_like",
        "rand_like",
        "randn_like",
        "randint_like",
        "new_empty",
        "new_zeros",
        "new_ones",
        "new_full",
        "new_tensor",
        "new_empty_strided",
    }
)
"""Functions whose result does not depend on values. ``data_ptr`` is not among them: kernels read through it."""

_GETTERS = frozenset(
    value.__get__
    for name, value in ((name, getattr(torch.Tensor, name)) for name in dir(torch.Tensor))
    if name not in _VALUES and hasattr(type(value), "__set__")
)

_GRAD: Any = vars(torch._C.TensorBase)["grad"].__get__


_CHANGE = frozenset(
    name
    for name in dir(torch.Tensor)
    if name == "__setitem__"
    or (name.startswith("__i") and callable(getattr(torch.Tensor, f"__{name[3:]}", None)))
    or (name.endswith("_") and not name.endswith("__"))
) | {"__set__"}
"""Functions that write to their first argument."""


class RunningSites(threading.local):
    """The sites of a table that are running in this thread. For them a lazy tensor is the base's weight."""

    def __init__(self) -> None:
        self.frames: list[FrameType] = []

    def begin(self, frame: FrameType) -> None:
        """Note that a site runs in a frame."""
        # Interrupted sites have left their frames here.
        self.frames = [one for one in self.frames if innermost_of([one], frame) is not None]
        self.frames.append(frame)

    def end(self, top: FrameType) -> None:
        """Note that the innermost site of a stack has run."""
        frame = innermost_of(self.frames, top)
        if frame is not None:
            self.frames.remove(frame)

    def any_running(self) -> bool:
        """Whether a site is running. In compiled code its weight is uncovered instead."""
        if torch.compiler.is_compiling():
            return False
        return bool(self.frames) and innermost_of(self.frames, frame_at()) is not None


class LazySource:
    """The values of one table's lazy tensors, for one forward.

    Args:
        table: The table.
        base: Its weight, (V, D).
        rows: The live rows.
        on_read: Called at each read, with the function and whether it needs the full table.
        running_sites: The running sites of the table.
    """

    def __init__(
        self,
        table: Table,
        base: torch.Tensor,
        rows: tuple[Rows, ...],
        on_read: Callable[[Any, bool], None],
        running_sites: RunningSites,
    ) -> None:
        self.table = table
        self.base = base
        self.rows = rows
        self.on_read = on_read
        self.running_sites = running_sites
        self.trained = is_transformed() or any(p.requires_grad for p in (base, *values_of(rows)))
        self.grad = torch.is_grad_enabled() and self.trained
        self.read = False
        self.copies: dict[int, tuple[bool, torch.Tensor]] = {}

    def full_table(self, function: Any) -> torch.Tensor:
        """Return the full copy, (V, D). It is made at this thread's first read, or first read that needs gradients.

        Args:
            function: The function that reads it, for messages.

        Raises:
            UnsupportedError: The batch mixes adapters, but the copy is the same for all samples.
        """
        grad = self.grad or (torch.is_grad_enabled() and self.trained)
        thread = 0 if torch.compiler.is_compiling() else threading.get_ident()
        has, copy = self.copies.get(thread, (False, None))
        if copy is None or (grad and not has):
            self._note_read(function, True)
            with torch.set_grad_enabled(grad):  # not the present mode: a later read may need gradients
                copy = full_copy(self.base, self.rows)
            self.copies[thread] = grad, copy
        return copy

    def take_rows(self, ids: torch.Tensor, function: Any, padding_idx: int | None = None) -> torch.Tensor:
        """Return rows of the table, (*shape of ids, D), without a copy of it.

        Raises:
            UnsupportedError: As for `full_table`.
        """
        self._note_read(function, False)
        found = F.embedding(ids, self.base, padding_idx)
        for part in self.rows:
            place, is_overridden, small = select_rows(part, ids, self.base)
            found = torch.where(is_overridden.unsqueeze(-1), small[place], found)
        return found

    def _note_read(self, function: Any, whole: bool) -> None:
        if any(part.samples is not None for part in self.rows):
            raise UnsupportedError(
                "a batch cannot mix adapters in this table",
                where=self.table.name,
                found=f"{_function_name(function)}() reads the weight outside of its module",
                hint="run the samples of each adapter separately",
            )
        self.read = True
        self.on_read(function, whole)


class LazyWeight(torch.Tensor):
    """A weight with the live rows, for every torch function that reads it.

    ``Function.apply`` of an ``autograd.Function`` does not come by here, but the torch functions that its code calls
    do. The gradient that it returns for the weight reaches the rows as well.
    """

    source: LazySource
    transposed: bool

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _GRAD:
            return None  # as for a frozen weight
        if func in _GETTERS or _function_name(func) in _DESCRIBE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if args and isinstance(args[0], LazyWeight) and _function_name(func) in _CHANGE:
            raise UnsupportedError(
                "the model writes to a table in its forward",
                where=args[0].source.table.name,
                found=_function_name(func),
                hint="change it before attaching",
            )
        lazy = (one for one in (*args, *kwargs.values()) if isinstance(one, LazyWeight))
        if any(one.source.running_sites.any_running() for one in lazy):
            args, kwargs = tree_map(_base_of, (args, kwargs))
            return func(*args, **kwargs)
        if func is F.embedding and _is_plain_lookup(args, kwargs):
            return args[1].source.take_rows(args[0], func, kwargs.get("padding_idx"))
        if func is torch.Tensor.__getitem__ and isinstance(args[0], LazyWeight) and not args[0].transposed:
            ids = _row_numbers(args[1], args[0])
            if ids is not None:
                return args[0].source.take_rows(ids, func)

        def full_table(value: Any) -> Any:
            if not isinstance(value, LazyWeight):
                return value
            table = value.source.full_table(func)
            return table.t() if value.transposed else table

        args, kwargs = tree_map(full_table, (args, kwargs))
        return func(*args, **kwargs)


def make_lazy_weight(weight: torch.Tensor, transposed: bool, source: LazySource) -> LazyWeight:
    """Return a lazy tensor over the memory of a weight, which is (D, V) if it is stored transposed."""
    made = with_gradient(weight.detach(), weight, source.rows, transposed).as_subclass(LazyWeight)
    made.source, made.transposed = source, transposed
    return made


def _base_of(value: Any) -> Any:
    if not isinstance(value, LazyWeight):
        return value
    return value.source.base.t() if value.transposed else value.source.base


def _is_plain_lookup(args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call of ``F.embedding`` only looks rows up."""
    ids, weight = args if len(args) == 2 else (None, None)
    plain = isinstance(weight, LazyWeight) and not weight.transposed and type(ids) is torch.Tensor
    return plain and not kwargs.get("scale_grad_by_freq") and kwargs.get("max_norm") is None


def _row_numbers(key: Any, weight: torch.Tensor) -> torch.Tensor | None:
    """Return the row numbers of an index, int64 and not negative, or None if it does not select rows by number."""
    if isinstance(key, tuple) and len(key) == 2 and isinstance(key[1], slice) and key[1] == slice(None):
        key = key[0]
    if isinstance(key, int) and not isinstance(key, bool) and -len(weight) <= key < len(weight):
        return torch.tensor(key % len(weight), device=weight.device)
    if type(key) is torch.Tensor and key.dtype in (torch.int64, torch.int32):
        return torch.where(key < 0, key + len(weight), key).long()
    return None


def _function_name(function: Any) -> str:
    return getattr(function, "__name__", str(function))

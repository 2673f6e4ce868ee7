"""A tensor that stands in for a weight while a model runs, and is a full copy with the live rows where it is read.

To ask it for its shape, dtype and the like costs nothing, and a lookup of rows costs what a lookup costs. The first
other torch function makes the (V, D) copy and gets that in its place, as do all others of that forward: no forward is
run twice, and one that reads nothing pays for nothing.
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
from embedsurgery.runtime.calls import first_of, frame_at
from embedsurgery.runtime.rows.full_copy import full_copy, values_of, with_gradient
from embedsurgery.runtime.rows.rows import Rows
from embedsurgery.runtime.rows.sparse_lookup import is_transformed
from embedsurgery.runtime.rows.whole_tables import chosen

_VALUES = frozenset({"data", "T", "H", "mT", "mH", "real", "imag", "__cuda_array_interface__"})
"""Attributes of a tensor that give its values; all others only describe it."""

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
"""Functions whose result does not depend on values. ``data_ptr`` is not one: kernels read through it."""

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
"""Functions that write into their first argument."""


class Bare(threading.local):
    """The sites of a table that run in this thread just now: to them a stand-in is the weight that it stands for."""

    def __init__(self) -> None:
        self.frames: list[FrameType] = []

    def begin(self, frame: FrameType) -> None:
        """A site runs in a frame."""
        self.frames = [one for one in self.frames if first_of([one], frame) is not None]  # others were broken off
        self.frames.append(frame)

    def end(self, top: FrameType) -> None:
        """The innermost site on a stack has run."""
        frame = first_of(self.frames, top)
        if frame is not None:
            self.frames.remove(frame)

    def runs(self) -> bool:
        """Whether one does; in compiled code a site has its weight uncovered."""
        if torch.compiler.is_compiling():
            return False
        return bool(self.frames) and first_of(self.frames, frame_at()) is not None


class Source:
    """Where stand-ins of one table take their values from, for one forward.

    Args:
        table: What stands there.
        base: The weight, (V, D).
        rows: What is live.
        said: Is told of each function that reads, and whether it needs the whole table.
        bare: Of the table.
    """

    def __init__(
        self,
        table: Table,
        base: torch.Tensor,
        rows: tuple[Rows, ...],
        said: Callable[[Any, bool], None],
        bare: Bare,
    ) -> None:
        self.table = table
        self.base = base
        self.rows = rows
        self.said = said
        self.bare = bare
        self.trained = is_transformed() or any(p.requires_grad for p in (base, *values_of(rows)))
        self.grad = torch.is_grad_enabled() and self.trained
        self.read = False
        self.copies: dict[int, tuple[bool, torch.Tensor]] = {}

    def whole(self, function: Any) -> torch.Tensor:
        """The full copy, (V, D), made when this thread first asks for it, or first for one with gradients.

        Args:
            function: What reads it, for messages.

        Raises:
            UnsupportedError: The batch mixes adapters, and the copy is the same for all samples.
        """
        grad = self.grad or (torch.is_grad_enabled() and self.trained)
        thread = 0 if torch.compiler.is_compiling() else threading.get_ident()
        has, copy = self.copies.get(thread, (False, None))
        if copy is None or (grad and not has):
            self._begin(function, True)
            with torch.set_grad_enabled(grad):  # the first reader may not want the gradient that a later one does
                copy = full_copy(self.base, self.rows)
            self.copies[thread] = grad, copy
        return copy

    def take(self, ids: torch.Tensor, function: Any, padding_idx: int | None = None) -> torch.Tensor:
        """Rows of the table, ids' shape and (D,), without a copy of it.

        Raises:
            UnsupportedError: As `whole`.
        """
        self._begin(function, False)
        found = F.embedding(ids, self.base, padding_idx)
        for part in self.rows:
            place, ours, small = chosen(part, ids, self.base)
            found = torch.where(ours.unsqueeze(-1), small[place], found)
        return found

    def _begin(self, function: Any, whole: bool) -> None:
        if any(part.samples is not None for part in self.rows):
            raise UnsupportedError(
                "a batch cannot mix adapters here",
                where=self.table.name,
                found=f"a weight that {_name(function)} reads outside of its module",
                hint="run the samples of each adapter by themselves",
            )
        self.read = True
        self.said(function, whole)


class StandIn(torch.Tensor):
    """Describes a weight as that does, and has the live rows for every torch function that reads it.

    What is given to an ``autograd.Function`` does not ask here: its code, which reads it with torch, does. The gradient
    that such a function gives reaches the rows as well.
    """

    source: Source
    turned: bool

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _GRAD:
            return None  # as a frozen weight says
        if func in _GETTERS or _name(func) in _DESCRIBE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if args and isinstance(args[0], StandIn) and _name(func) in _CHANGE:
            raise UnsupportedError(
                "the model changes a table in its forward",
                where=args[0].source.table.name,
                found=_name(func),
                hint="change it before attaching",
            )
        if any(isinstance(one, StandIn) and one.source.bare.runs() for one in (*args, *kwargs.values())):
            args, kwargs = tree_map(_bared, (args, kwargs))
            return func(*args, **kwargs)
        if func is F.embedding and _is_plain_lookup(args, kwargs):
            return args[1].source.take(args[0], func, kwargs.get("padding_idx"))
        if func is torch.Tensor.__getitem__ and isinstance(args[0], StandIn) and not args[0].turned:
            ids = _row_numbers(args[1], args[0])
            if ids is not None:
                return args[0].source.take(ids, func)

        def whole(value: Any) -> Any:
            if not isinstance(value, StandIn):
                return value
            table = value.source.whole(func)
            return table.t() if value.turned else table

        args, kwargs = tree_map(whole, (args, kwargs))
        return func(*args, **kwargs)


def stand_in(weight: torch.Tensor, turned: bool, source: Source) -> StandIn:
    """A stand-in over the memory of a weight, which is stored (D, V) where it is turned."""
    made = with_gradient(weight.detach(), weight, source.rows, turned).as_subclass(StandIn)
    made.source, made.turned = source, turned
    return made


def _bared(value: Any) -> Any:
    if not isinstance(value, StandIn):
        return value
    return value.source.base.t() if value.turned else value.source.base


def _is_plain_lookup(args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call of ``F.embedding`` only looks rows up."""
    ids, weight = args if len(args) == 2 else (None, None)
    plain = isinstance(weight, StandIn) and not weight.turned and type(ids) is torch.Tensor
    return plain and not kwargs.get("scale_grad_by_freq") and kwargs.get("max_norm") is None


def _row_numbers(key: Any, weight: torch.Tensor) -> torch.Tensor | None:
    """The row numbers, int64 and not negative, that an index asks for, where it asks for whole rows by number."""
    if isinstance(key, tuple) and len(key) == 2 and isinstance(key[1], slice) and key[1] == slice(None):
        key = key[0]
    if isinstance(key, int) and not isinstance(key, bool) and -len(weight) <= key < len(weight):
        return torch.tensor(key % len(weight), device=weight.device)
    if type(key) is torch.Tensor and key.dtype in (torch.int64, torch.int32):
        return torch.where(key < 0, key + len(weight), key).long()
    return None


def _name(function: Any) -> str:
    return getattr(function, "__name__", str(function))

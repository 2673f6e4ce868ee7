"""Full copies of a table over its weights, for code that reads ``module.weight`` itself.

`Materialised` makes a copy for each outermost call of the modules that it is on. `StandIns` makes one only when
something other than the table's own sites reads the weight: a fused loss, a functional head,
``probs @ embedding.weight``, a direct call of ``embedding.forward``.

Either lays tensors over weights as attributes of the module objects, which come before Parameters of the same name. The
Parameters stay where they are, so that a state dict, an optimizer or a wrapper never meets a copy.

Out of reach are weights that code took out of their modules before the forward, reads outside of every forward, and,
until a forward has shown them, reads in compiled code that no forward around the table names.
"""

from __future__ import annotations

import sys
import threading
import uuid
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import nn

from embedsurgery.errors import UnsupportedError
from embedsurgery.graph import Table
from embedsurgery.runtime.calls import first_of, frame_at, frames_from, run
from embedsurgery.runtime.hooks import forget_compiled, tensors_in
from embedsurgery.runtime.rows.full_copy import full_copy
from embedsurgery.runtime.rows.rows import Rows
from embedsurgery.runtime.rows.sites import held
from embedsurgery.runtime.rows.sliced_head import uncover
from embedsurgery.runtime.rows.stand_in import Bare, Source, StandIn, stand_in
from embedsurgery.runtime.rows.weight_reads import names
from embedsurgery.tensors.sharded import is_sharded

Holder = tuple[nn.Module, str, bool]
"""A module, the name of its parameter, and whether that is stored (D, V)."""

_ABSENT: Any = object()

_OF_A_CALL = frozenset({"lock", "frames", "outermost", "calls", "laid", "covers", "trains", "source", "bare"})
"""Attributes that are of the calls which run just now, and so not of a copy."""


class Materialised:
    """Pre and post hooks that lay a table with the live rows over its weights while a module runs.

    The slow right way: a (V, D) copy for each outermost call, and every use of the weight has the rows. While a
    backward runs from what came out it lies there again, for parts of the forward may be computed once more.

    A forward may end without its post hooks (a KeyboardInterrupt does that). What it left is taken away when the next
    one begins, and by whatever the attachment is asked for.

    Args:
        holders: Every alias of the table.
        live: The rows that are live for the table; emptied and filled by the attachment.
    """

    def __init__(self, holders: list[Holder], live: list[Rows]) -> None:
        self.holders = holders
        self.live = live
        self.unpadded: list[nn.Module] = []
        self.lock = threading.RLock()
        self._forget()

    def _forget(self) -> None:
        self.frames: list[FrameType] = []  # of each thread's outermost call, and of backwards
        self.outermost: nn.Module | None = None  # of compiled code, whose frames are not seen
        self.calls = 0
        self.laid: list[tuple[nn.Module, str, Any]] = []  # module, attribute, what it was before
        self.covers: list[tuple[nn.Module, str, Any]] = []  # module, attribute, what it is now
        self.trains = False

    def refresh(self) -> None:
        """To be called when other rows are live: a padding row of ours has a gradient, any other has none."""
        self.unpadded = [
            module
            for module, _, _ in self.holders
            for row in (getattr(module, "padding_idx", None),)
            if row is not None and any(row in rows.numbers for rows in self.live)
        ]

    def enter(self, module: nn.Module, *_: Any) -> None:
        """Pre-hook."""
        if torch.compiler.is_compiling():
            self._enter_traced(module)
            return
        with self.lock:
            if (self.frames or self.laid) and self._was_broken_off(module, tracing=False):
                self.take_away()
            if self.outermost is not None:  # compiled code around has seen to it
                return
            if not self.frames:
                if not self.live:
                    return
                self.trains = torch.is_grad_enabled()
                self.lay()
            frame = frame_at(2)  # above it torch's inner function, and its outer one
            if first_of(self.frames, frame) is None:
                self.frames.append(frame)
            self._share()

    def leave(self, module: nn.Module, *given: Any) -> None:
        """Post-hook, also after an exception; one without its pre-hook is no matter."""
        if torch.compiler.is_compiling():
            self._leave_traced(module)
            return
        with self.lock:
            own = (frame_at(1), frame_at(2))  # after an exception the outer function calls this itself
            frame = next((frame for frame in own if frame in self.frames), None)
            if frame is None:
                return
            self.frames.remove(frame)
            again = torch.is_grad_enabled() and self.was_read()
            covers = self.covers if again else []
            self._end()
        for tensor in tensors_in(given[-1]) if again else ():
            if tensor.grad_fn is not None:
                tensor.register_hook(partial(self._begin_backward, covers))  # type: ignore[no-untyped-call]

    def _enter_traced(self, module: nn.Module) -> None:
        if (self.outermost is not None or self.laid) and self._was_broken_off(module, tracing=True):
            self.take_away()
        if self.outermost is None:
            if not self.live:
                return
            self.lay()
            self.outermost = module
        if module is self.outermost:
            self.calls += 1

    def _leave_traced(self, module: nn.Module) -> None:
        if module is self.outermost:
            self.calls -= 1
            if self.calls == 0:
                self.take_away()

    def was_read(self) -> bool:
        """Whether something may have read what was laid."""
        return True

    def _share(self) -> None:
        """See that what is laid is right for a call inside: one that wants gradients, where the first did not."""
        if self.laid and torch.is_grad_enabled() and not self.trains:
            self.trains, before = True, self.laid
            self.covers = []
            self.lay()  # over what is there, which another thread may be about to read
            self.laid = before

    def _begin_backward(self, covers: list[tuple[nn.Module, str, Any]], _: torch.Tensor) -> None:
        running = _backward()
        with self.lock:
            inside = self.outermost is not None or first_of(self.frames, frame_at()) is not None
            if running is None or running in self.frames or inside:
                return
            if not self.laid:
                for module, name, value in covers:
                    self._over(module, name, value)
            self.frames.append(running)
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(partial(self._end_backward, running))

    def _end_backward(self, running: FrameType) -> None:
        with self.lock:
            if running in self.frames:
                self.frames.remove(running)
                self._end()

    def _end(self) -> None:
        """Take away what was laid, unless others run that need it; of them some may have been broken off."""
        if not self.calls and not (self.frames and run(self.frames)):
            self.take_away()

    def lay(self) -> None:
        """Lay the copy over the weights."""
        module, name, transposed = self.holders[0]
        base = held(module, name)
        if is_sharded(base):
            raise UnsupportedError(
                "a table that is sharded here cannot be overridden by a full copy",
                where=name,
                hint="let the sharded module be one that reads the table itself",
            )
        table = full_copy(base.t() if transposed else base, self.live)
        for module, name, transposed in self.holders:
            self._over(module, name, table.t() if transposed else table)
        for module in self.unpadded:
            self._over(module, "padding_idx", None)

    def take_away(self) -> None:
        """Uncover the weights."""
        while self.laid:
            module, name, before = self.laid[-1]
            if before is _ABSENT:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = before
            self.laid.pop()  # last: this may be interrupted as well
        self._forget()

    def settle(self) -> None:
        """Take away what a forward left that was broken off."""
        if self.laid and self._was_broken_off(None, tracing=False):
            self.take_away()

    def _over(self, module: nn.Module, name: str, value: Any) -> None:
        uncover(module, name)
        self.laid.append((module, name, module.__dict__.get(name, _ABSENT)))
        self.covers.append((module, name, value))
        module.__dict__[name] = value

    def _was_broken_off(self, module: nn.Module | None, tracing: bool) -> bool:
        """Whether the call that laid what is there does not run any more."""
        if self.outermost is not None:
            return module is self.outermost
        if tracing or first_of(self.frames, frame_at()) is not None:
            return False
        return not run(self.frames)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _OF_A_CALL}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.lock = threading.RLock()
        self._forget()


class StandIns(Materialised):
    """As `Materialised`, but the copy is made where the weight is read: see `StandIn`.

    It is on every module around a site, and not on the sites, whose own weight is uncovered while they run.

    Args:
        table: What it is for.
        said: Is told of the first full copy, with the function that needs it.
        around: The modules that it is on. Where a forward of theirs names the parameter, or a function that it calls
            does, compiled code gets a copy from the start; else when an eager forward has shown that it is needed.
            Forwards are looked at when they are traced: libraries replace them after attaching.
    """

    def __init__(
        self,
        table: Table,
        holders: list[Holder],
        live: list[Rows],
        said: Callable[[Table, Any], None],
        around: Iterable[nn.Module],
    ) -> None:
        super().__init__(holders, live)
        self.table = table
        self.said = said
        self.around = list(around)
        self.seen = False
        self.copied = False
        self.source: Source | None = None
        self.bare = Bare()
        self._begin()

    def _begin(self) -> None:
        """Be found by what is traced: a copy is another one."""
        self.key = uuid.uuid4().hex
        _STAND_INS[self.key] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.source, self.bare = None, Bare()
        self._begin()

    def lay(self) -> None:
        parts = [*(rows.values for rows in self.live), *(held(m, n) for m, n, _ in self.holders)]
        if any(is_sharded(part) or hasattr(part, "ds_id") for part in parts):
            return
        if torch.compiler.is_compiling():
            if self.seen or _is_named(self.key):
                super().lay()
            return
        if torch._C._get_tracing_state():
            return
        module, name, transposed = self.holders[0]
        base = held(module, name)
        self.source = Source(self.table, base.t() if transposed else base, tuple(self.live), self.note, self.bare)
        made: dict[int, StandIn] = {}
        for module, name, transposed in self.holders:
            weight = held(module, name)
            if id(weight) not in made:
                made[id(weight)] = stand_in(weight, transposed, self.source)
            self._over(module, name, made[id(weight)])

    def take_away(self) -> None:
        super().take_away()
        self.source = None

    def is_shared(self) -> bool:
        """Whether other calls run inside: then what stands in must stay, and a site has its own weight for itself."""
        return len(self.frames) > 1

    def _share(self) -> None:
        if self.is_shared():  # with one that began alone, and may have uncovered a weight
            for module, name, cover in self.covers:
                module.__dict__.setdefault(name, cover)

    def was_read(self) -> bool:
        return self.source is not None and self.source.read

    def note(self, function: Any, whole: bool) -> None:
        """The weight was read, and a function needs a copy of the whole."""
        if not self.seen:
            self.seen = True
            forget_compiled()
        if whole and not self.copied:
            self.copied = True
            self.said(self.table, function)


_STAND_INS: weakref.WeakValueDictionary[str, StandIns] = weakref.WeakValueDictionary()


def _is_named(key: str) -> bool:
    """Whether a forward names a weight: asked while one is traced, and a constant in what comes out."""
    one = _STAND_INS[key]
    return any(names(module, name) for module in one.around for _, name, _ in one.holders)


_is_named._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in sharded.py


def _backward() -> FrameType | None:
    """The frame that called autograd's engine, which may have other threads run its hooks."""
    frame = next((frame for frame in frames_from(frame_at()) if frame.f_code.co_name == _ENGINE), None)
    if frame is not None:
        return frame
    return next((top for top in sys._current_frames().values() if top.f_code.co_name == _ENGINE), None)  # it waits


_ENGINE = "_engine_run_backward"

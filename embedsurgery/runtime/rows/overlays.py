"""Covers weights by full copies of their table, for code that reads ``module.weight`` itself.

`CopyOverlay` makes a copy for each outermost call of its modules. `LazyOverlay` makes one only if something other than
the table's own sites reads the weight: a fused loss, a functional head, ``probs @ embedding.weight``, a direct call of
``embedding.forward``.

Both set attributes of the module objects, which Python finds before Parameters of the same name. The Parameters stay in
place, so state dicts, optimizers and wrappers never see a copy.

Not covered: weights that code took from their modules before the forward; reads outside of all forwards
(``materialized.py``); and, before an eager forward has shown them, reads in compiled code that ``weight_reads.py`` does
not find.
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
from embedsurgery.runtime.calls import frame_at, frames_from, innermost_of, is_running
from embedsurgery.runtime.hooks import reset_compiled, tensors_in
from embedsurgery.runtime.rows.full_copy import full_copy
from embedsurgery.runtime.rows.rows import Rows
from embedsurgery.runtime.rows.sites import parameter_of
from embedsurgery.runtime.rows.sliced_head import remove_sliced_weight
from embedsurgery.runtime.rows.stand_in import LazySource, LazyWeight, RunningSites, make_lazy_weight
from embedsurgery.runtime.rows.weight_reads import reads_parameter
from embedsurgery.tensors.sharded import is_sharded

Holder = tuple[nn.Module, str, bool]
"""A module, the name of its parameter, and whether that is stored (D, V)."""

_ABSENT: Any = object()

_CALL_STATE = frozenset(
    {"lock", "frames", "outermost", "calls", "covered", "covers", "trains", "source", "running_sites"}
)
"""Attributes that describe the running calls; a copy of the model starts without them."""


class CopyOverlay:
    """Pre-hook and post-hook that cover weights by a copy of their table with the live rows, while a module runs.

    It is slow but always correct: a (V, D) copy for each outermost call. During a backward the weights are covered
    again, because gradient checkpointing computes parts of the forward once more.

    An interrupted forward runs no post-hook and leaves the weights covered. They are uncovered when the next one
    begins, and by every use of the attachment.

    Args:
        holders: Every alias of the table.
        live: The live rows of the table, a list that the attachment fills.
    """

    def __init__(self, holders: list[Holder], live: list[Rows]) -> None:
        self.holders = holders
        self.live = live
        self.unpadded: list[nn.Module] = []
        self.lock = threading.RLock()
        self._reset()

    def _reset(self) -> None:
        self.frames: list[FrameType] = []  # the outermost call of each thread, and backwards
        self.outermost: nn.Module | None = None  # the outermost call of compiled code, which has no frames
        self.calls = 0
        self.covered: list[tuple[nn.Module, str, Any]] = []  # module, attribute, value before
        self.covers: list[tuple[nn.Module, str, Any]] = []  # module, attribute, value now
        self.trains = False

    def refresh(self) -> None:
        """Adapt to other live rows: a padding row that is live gets a gradient, any other none."""
        self.unpadded = [
            module
            for module, _, _ in self.holders
            for row in (getattr(module, "padding_idx", None),)
            if row is not None and any(row in rows.index_set for rows in self.live)
        ]

    def enter(self, module: nn.Module, *_: Any) -> None:
        """Pre-hook."""
        if torch.compiler.is_compiling():
            self._enter_traced(module)
            return
        with self.lock:
            if (self.frames or self.covered) and self._was_interrupted(module, tracing=False):
                self.uncover()
            if self.outermost is not None:  # compiled code around this call has covered them
                return
            if not self.frames:
                if not self.live:
                    return
                self.trains = torch.is_grad_enabled()
                self.cover()
            frame = frame_at(2)  # enter, torch's inner function, its outer one
            if innermost_of(self.frames, frame) is None:
                self.frames.append(frame)
            self._share()

    def leave(self, module: nn.Module, *given: Any) -> None:
        """Post-hook, also after an exception; a call without its pre-hook is ignored."""
        if torch.compiler.is_compiling():
            self._leave_traced(module)
            return
        with self.lock:
            own = (frame_at(1), frame_at(2))  # after an exception torch's outer function calls this directly
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
        if (self.outermost is not None or self.covered) and self._was_interrupted(module, tracing=True):
            self.uncover()
        if self.outermost is None:
            if not self.live:
                return
            self.cover()
            self.outermost = module
        if module is self.outermost:
            self.calls += 1

    def _leave_traced(self, module: nn.Module) -> None:
        if module is self.outermost:
            self.calls -= 1
            if self.calls == 0:
                self.uncover()

    def was_read(self) -> bool:
        """Whether something may have read a covered weight."""
        return True

    def _share(self) -> None:
        """Cover again for an inner call that needs gradients, if the outer call did not."""
        if self.covered and torch.is_grad_enabled() and not self.trains:
            self.trains, before = True, self.covered
            self.covers = []
            self.cover()  # without uncovering first: another thread may be about to read
            self.covered = before

    def _begin_backward(self, covers: list[tuple[nn.Module, str, Any]], _: torch.Tensor) -> None:
        running = _backward_frame()
        with self.lock:
            inside = self.outermost is not None or innermost_of(self.frames, frame_at()) is not None
            if running is None or running in self.frames or inside:
                return
            if not self.covered:
                for module, name, value in covers:
                    self._cover(module, name, value)
            self.frames.append(running)
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(partial(self._end_backward, running))

    def _end_backward(self, running: FrameType) -> None:
        with self.lock:
            if running in self.frames:
                self.frames.remove(running)
                self._end()

    def _end(self) -> None:
        """Uncover the weights, unless other calls are running. Some of the noted calls may have been interrupted."""
        if not self.calls and not (self.frames and is_running(self.frames)):
            self.uncover()

    def cover(self) -> None:
        """Cover the weights."""
        module, name, transposed = self.holders[0]
        base = parameter_of(module, name)
        if is_sharded(base):
            raise UnsupportedError(
                "a sharded table cannot be overridden by a full copy",
                where=name,
                hint="shard the module that reads the table",
            )
        table = full_copy(base.t() if transposed else base, self.live)
        for module, name, transposed in self.holders:
            self._cover(module, name, table.t() if transposed else table)
        for module in self.unpadded:
            self._cover(module, "padding_idx", None)

    def uncover(self) -> None:
        """Uncover the weights."""
        while self.covered:
            module, name, before = self.covered[-1]
            if before is _ABSENT:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = before
            self.covered.pop()  # last, because an interrupt may come before it
        self._reset()

    def remove_leftovers(self) -> None:
        """Uncover the weights that an interrupted forward has left covered."""
        if self.covered and self._was_interrupted(None, tracing=False):
            self.uncover()

    def _cover(self, module: nn.Module, name: str, value: Any) -> None:
        remove_sliced_weight(module, name)
        self.covered.append((module, name, module.__dict__.get(name, _ABSENT)))
        self.covers.append((module, name, value))
        module.__dict__[name] = value

    def _was_interrupted(self, module: nn.Module | None, tracing: bool) -> bool:
        """Whether the call that covered the weights has ended without uncovering them."""
        if self.outermost is not None:
            return module is self.outermost
        if tracing or innermost_of(self.frames, frame_at()) is not None:
            return False
        return not is_running(self.frames)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _CALL_STATE}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.lock = threading.RLock()
        self._reset()


class LazyOverlay(CopyOverlay):
    """As `CopyOverlay`, but the copy is made when the weight is read: see `LazyWeight`.

    Its hooks are on every module around a site. The sites themselves see their own weight: see ``uncovered.py``.

    Args:
        table: The table.
        holders: Every alias of the table.
        live: The live rows of the table, a list that the attachment fills.
        on_read: Called at the first full copy, with the table and the function that needs it.
        around: The modules of the hooks. If ``weight_reads.py`` finds that their forwards read the parameter, compiled
            code gets a copy from the start; else once an eager forward has read it. The search is made when a forward
            is traced, because libraries replace forwards after attaching.
    """

    def __init__(
        self,
        table: Table,
        holders: list[Holder],
        live: list[Rows],
        on_read: Callable[[Table, Any], None],
        around: Iterable[nn.Module],
    ) -> None:
        super().__init__(holders, live)
        self.table = table
        self.on_read = on_read
        self.around = list(around)
        self.seen = False
        self.copied = False
        self.source: LazySource | None = None
        self.running_sites = RunningSites()
        self._register()

    def _register(self) -> None:
        """Register under a new name, for traced code: a copy of the model has an overlay of its own."""
        self.key = uuid.uuid4().hex
        _OVERLAYS[self.key] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.source, self.running_sites = None, RunningSites()
        self._register()

    def cover(self) -> None:
        parts = [*(rows.values for rows in self.live), *(parameter_of(m, n) for m, n, _ in self.holders)]
        if any(is_sharded(part) or hasattr(part, "ds_id") for part in parts):
            return
        if torch.compiler.is_compiling():
            if self.seen or _is_read_by_code(self.key):
                super().cover()
            return
        if torch._C._get_tracing_state():
            return
        module, name, transposed = self.holders[0]
        base = parameter_of(module, name)
        table = base.t() if transposed else base
        self.source = LazySource(self.table, table, tuple(self.live), self.note, self.running_sites)
        made: dict[int, LazyWeight] = {}
        for module, name, transposed in self.holders:
            weight = parameter_of(module, name)
            if id(weight) not in made:
                made[id(weight)] = make_lazy_weight(weight, transposed, self.source)
            self._cover(module, name, made[id(weight)])

    def uncover(self) -> None:
        super().uncover()
        self.source = None

    def is_shared(self) -> bool:
        """Whether several calls run at once. Then the weights must stay covered for the others while a site runs."""
        return len(self.frames) > 1

    def _share(self) -> None:
        if self.is_shared():  # the first call began alone, and one of its sites may have uncovered a weight
            for module, name, cover in self.covers:
                module.__dict__.setdefault(name, cover)

    def was_read(self) -> bool:
        return self.source is not None and self.source.read

    def note(self, function: Any, whole: bool) -> None:
        """Note that a function has read the weight, and whether it needs a full copy."""
        if not self.seen:
            self.seen = True
            reset_compiled()
        if whole and not self.copied:
            self.copied = True
            self.on_read(self.table, function)


_OVERLAYS: weakref.WeakValueDictionary[str, LazyOverlay] = weakref.WeakValueDictionary()


def _is_read_by_code(key: str) -> bool:
    """Whether a forward reads a weight by name. Runs while one is traced; its result is a constant of the graph."""
    one = _OVERLAYS[key]
    return any(reads_parameter(module, name) for module in one.around for _, name, _ in one.holders)


_is_read_by_code._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in sharded.py


def _backward_frame() -> FrameType | None:
    """Return the frame that called autograd's engine. The engine may run hooks in other threads."""
    frame = next((frame for frame in frames_from(frame_at()) if frame.f_code.co_name == _ENGINE), None)
    if frame is not None:
        return frame
    return next((top for top in sys._current_frames().values() if top.f_code.co_name == _ENGINE), None)


_ENGINE = "_engine_run_backward"

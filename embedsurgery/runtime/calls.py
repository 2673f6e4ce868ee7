"""Tracks active forward calls by their frames, and is the only file that reads frames.

An interrupted call runs no post-hook: a KeyboardInterrupt ends a forward at any line. So whatever is noted for a call
is noted together with the frame that the call runs in, and counts as over once that frame is on no stack. Frames also
tell threads apart, as several may be in one model at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import FrameType
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


def finish_before_interrupt(work: Callable[[], None]) -> None:
    """Run idempotent work; after a KeyboardInterrupt run it again to its end, and raise then."""
    try:
        work()
    except KeyboardInterrupt:
        work()
        raise


def frame_at(depth: int = 0) -> FrameType:
    """Return a frame of this thread: 0 is the caller's, 1 that of the caller's caller, and so on."""
    return sys._getframe(depth + 1)


def frames_from(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield a frame and those that called it, innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def package_of(frame: FrameType) -> str:
    """Return the top-level package of the code that a frame runs."""
    return str(frame.f_globals.get("__name__")).partition(".")[0]


def local_of(frame: FrameType, name: str) -> Any:
    """Return a local variable of a running function, or None."""
    return frame.f_locals.get(name)


def innermost_of(frames: list[FrameType], top: FrameType | None) -> FrameType | None:
    """Return the innermost of some frames on the stack whose innermost frame is ``top``, or None."""
    while top is not None and top not in frames:
        top = top.f_back
    return top


def is_running_here(frames: list[FrameType]) -> bool:
    """Whether any of some frames is on the stack of this thread."""
    return innermost_of(frames, sys._getframe()) is not None


def is_running(frames: list[FrameType]) -> bool:
    """Whether any of some frames of plain functions is on the stack of any thread."""
    if is_running_here(frames):
        return True
    # The stack of another thread must not be walked: it changes meanwhile, and Python crashes. But a running frame
    # refuses to be cleared, and clearing one that has ended only drops local variables.
    for frame in frames:
        try:
            frame.clear()
        except RuntimeError:
            return True
    return False


def library_entry(frame: FrameType) -> FrameType:
    """Return the frame in which a library was entered: the outermost of the frames next to ``frame`` in its package."""
    while frame.f_back is not None and package_of(frame.f_back) == package_of(frame):
        frame = frame.f_back
    return frame


class ActiveCalls(Generic[T]):
    """A value for each active forward call, from its pre-hook to its post-hook, kept apart by thread.

    Compiled code has no frames, so it shares one value among all threads. It also sees the value of an eager call
    around it, and may take that of another thread for it.
    """

    def __init__(self) -> None:
        self._running: list[tuple[FrameType, T]] = []
        self._compiled: T | None = None
        self._around: T | None = None  # read by compiled code only, which cannot tell whose call is around it

    def begin(self, value: T) -> None:
        """Note a value for the call whose pre-hook calls this. The pre-hook must be a bound method that torch calls.

        Args:
            value: Any object. It hides the value of a call around this one until `end`.
        """
        if torch.compiler.is_compiling():
            self._compiled = value
            return
        for frame, other in tuple(self._running):
            if not is_running([frame]):
                self._drop(other)
        if self._around is None:
            self._around = value
        self._running.append((sys._getframe(3), value))  # begin, the hook, torch's inner and its outer function

    def now(self) -> T | None:
        """Return the value of the innermost call of this thread, or None outside of all calls."""
        if torch.compiler.is_compiling():
            return self._around if self._compiled is None else self._compiled
        running = tuple(self._running)
        if running:
            frame = innermost_of([frame for frame, _ in running], sys._getframe())
            for one, value in reversed(running):
                if one is frame:
                    return value
        return self._compiled

    def end(self, value: T) -> None:
        """Drop the value of a call."""
        if not torch.compiler.is_compiling():
            self._drop(value)
            return
        self._compiled = None
        if self._around is value:  # left by an interrupted eager call
            self._around = None

    def clear_compiled(self) -> None:
        """Drop the value that interrupted compiled code has left."""
        self._compiled = None

    def _drop(self, value: T) -> None:
        for one in tuple(self._running):
            if one[1] is value:
                with suppress(ValueError):  # another thread has dropped it, because its call is over
                    self._running.remove(one)
        if self._around is value:
            self._around = None
        if self._compiled is value:
            self._compiled = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_running": [], "_compiled": None, "_around": None}

"""Which calls run just now: known by their frames, for a call may end without a word, and others run in other threads.

A KeyboardInterrupt ends a forward without its post hooks. What was noted of it with the frame that it ran in is then
seen to be over, for that frame stands on no stack any more.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import FrameType
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


def to_the_end(work: Callable[[], None]) -> None:
    """Do what may be done twice; a KeyboardInterrupt in the middle of it comes when it is done."""
    try:
        work()
    except KeyboardInterrupt:
        work()
        raise


def frame_at(depth: int = 0) -> FrameType:
    """A frame of this thread: 0 is the caller's, 1 the one that called it, and so on."""
    return sys._getframe(depth + 1)


def frames_from(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame and those below it on its stack, innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def package_of(frame: FrameType) -> str:
    """The top-level package whose code a frame runs."""
    return str(frame.f_globals.get("__name__")).partition(".")[0]


def local_of(frame: FrameType, name: str) -> Any:
    """A local variable of a running function; None where it has none of this name."""
    return frame.f_locals.get(name)


def first_of(frames: list[FrameType], top: FrameType | None) -> FrameType | None:
    """The first of some frames on a stack, from its top."""
    while top is not None and top not in frames:
        top = top.f_back
    return top


def run_here(frames: list[FrameType]) -> bool:
    """Whether any of some frames stands on the stack of this thread."""
    return first_of(frames, sys._getframe()) is not None


def run(frames: list[FrameType]) -> bool:
    """Whether any of some frames of plain functions stands on the stack of any thread.

    The stack of another thread must not be walked: it changes meanwhile, and Python crashes. Its frames refuse to be
    cleared as long as they run, and one that does not has nothing to lose but what a debugger would show.
    """
    if run_here(frames):
        return True
    for frame in frames:
        try:
            frame.clear()
        except RuntimeError:
            return True
    return False


def of_library(frame: FrameType) -> FrameType:
    """The frame in which a library was entered that a frame is of: the last on the way down that is of it too."""
    while frame.f_back is not None and package_of(frame.f_back) == package_of(frame):
        frame = frame.f_back
    return frame


class Calls(Generic[T]):
    """What is noted of the calls that run just now, of each thread by itself, from a pre-hook to a post-hook.

    Code that is compiled has no frames: what it notes is one for all threads, and it sees what an eager call around it
    has noted, of which that of another thread may be taken for it.
    """

    def __init__(self) -> None:
        self._running: list[tuple[FrameType, T]] = []
        self._compiled: T | None = None
        self._around: T | None = None  # only compiled code asks for it: to another thread it is not one around it

    def begin(self, noted: T) -> None:
        """Note it of the call whose pre-hook asks, which is a bound method that torch calls.

        Args:
            noted: Any object; what was noted before of a call around this one stands behind it.
        """
        if torch.compiler.is_compiling():
            self._compiled = noted
            return
        for frame, other in tuple(self._running):
            if not run([frame]):
                self._drop(other)
        if self._around is None:
            self._around = noted
        self._running.append((sys._getframe(3), noted))  # begin, the hook, torch's inner function, and its outer one

    def now(self) -> T | None:
        """What is noted of the innermost call that runs here; None outside of every one."""
        if torch.compiler.is_compiling():
            return self._around if self._compiled is None else self._compiled
        running = tuple(self._running)
        if running:
            frame = first_of([frame for frame, _ in running], sys._getframe())
            for one, noted in reversed(running):
                if one is frame:
                    return noted
        return self._compiled

    def end(self, noted: T) -> None:
        """Note no more of it."""
        if not torch.compiler.is_compiling():
            self._drop(noted)
            return
        self._compiled = None
        if self._around is noted:  # it was broken off
            self._around = None

    def settle(self) -> None:
        """Forget what compiled code has noted and never ended."""
        self._compiled = None

    def _drop(self, noted: T) -> None:
        for one in tuple(self._running):
            if one[1] is noted:
                with suppress(ValueError):  # another thread has found that it is over
                    self._running.remove(one)
        if self._around is noted:
            self._around = None
        if self._compiled is noted:
            self._compiled = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_running": [], "_compiled": None, "_around": None}

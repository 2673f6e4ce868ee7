"""Two threads that change places, or a Ctrl-C, at each place of the package's code, one place at a time."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

import embedsurgery


class Place:
    """Inside, something is done when this thread comes to a place of the package's code.

    Args:
        number: Of the place, from 0, in the order in which code runs.
        then: What is done there, once.
        within: The file of the package, or the directory, that has the places.
        steps: Places are all instructions there, and not only the beginnings of lines.

    Attributes:
        where: The place, where this thread came to it.
    """

    def __init__(self, number: int, then: Callable[[], None], within: str, steps: bool = False) -> None:
        self.left = number
        self.then = then
        self.within = str(Path(embedsurgery.__file__).parent / within)
        self.event = "opcode" if steps else "line"
        self.where = ""

    def __enter__(self) -> Place:
        self.before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        sys.settrace(self.before)

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(self.within):
            return None
        frame.f_trace_opcodes = self.event == "opcode"
        if event == self.event:
            self.left -= 1
            if self.left == -1:
                self.where = f"{Path(frame.f_code.co_filename).name}, line {frame.f_lineno}"
                self.then()
        return self._trace


def broken_off_at_each_place(work: Callable[[], None], check: Callable[[], None], within: str = "") -> int:
    """Run ``work`` once for each line, where it gets a KeyboardInterrupt, and ``check`` after it.

    Returns:
        How many lines there are.
    """

    def interrupt() -> None:
        raise KeyboardInterrupt

    number = 0
    while True:
        try:
            with Place(number, interrupt, within) as place:
                work()
        except KeyboardInterrupt:
            torch.set_grad_enabled(True)  # torch's own no_grad() is not proof against it
        if not place.where:
            return number
        try:
            check()
        except Exception as error:
            raise AssertionError(f"after a KeyboardInterrupt at {place.where}") from error
        number += 1


class Interleaved:
    """Runs a function in this thread, and another in a thread of its own when this one has come to a place.

    Where the other one calls ``half`` (which can be a hook), it waits there until this one has ended. So the other one
    is whole within this one, or begins in it and ends after it.

    Args:
        work: Runs in this thread.
        other: Runs in the other one.
        within: The file of the package, or the directory, that has the places.
        steps: Places are all instructions there, and not only the beginnings of lines.
        patience: Seconds until the other one is taken to wait for a lock that this one has.
    """

    def __init__(
        self,
        work: Callable[[], None],
        other: Callable[[], None],
        *,
        within: str = "",
        steps: bool = False,
        patience: float = 0.02,
    ) -> None:
        self.work = work
        self.other = other
        self.within = within
        self.steps = steps
        self.patience = patience
        self.thread = threading.Thread()

    def half(self, *_: Any) -> None:
        """The other thread's half way."""
        if threading.current_thread() is self.thread:
            self.came.set()
            assert self.go.wait(60)

    def at_each_place(self) -> int:
        """Run both once for each place, and return how many there are; raises what either raises, and where it was."""
        number = 0
        while self.at(number):
            number += 1
        return number

    def at(self, number: int) -> bool:
        """Run both with the other coming in at one place; returns whether there is such a one."""
        self.raised: list[BaseException] = []
        self.came, self.go = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._run)

        def let_the_other_in() -> None:
            self.thread.start()
            self.came.wait(self.patience)

        with Place(number, let_the_other_in, self.within, self.steps) as place:
            try:
                self.work()
            except BaseException as error:
                self.raised.append(error)
        self.go.set()
        if place.where:
            self.thread.join(60)
            assert not self.thread.is_alive(), f"both wait, the first at {place.where}"
        if self.raised:
            raise AssertionError(f"with the other thread in at {place.where}") from self.raised[0]
        return bool(place.where)

    def _run(self) -> None:
        try:
            self.other()
        except BaseException as error:
            self.raised.append(error)
        finally:
            self.came.set()

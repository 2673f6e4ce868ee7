"""Runs a second thread, or raises a KeyboardInterrupt, at each line of the package's code, one line per run."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

import embedsurgery


class ActionAt:
    """Inside the block, runs an action when this thread reaches a place in the package's code.

    Args:
        number: Number of the place, from 0, in the order in which the code runs.
        action: The action. It runs once.
        within: The file or directory of the package that has the places.
        opcodes: Whether each instruction is a place; else each line.

    Attributes:
        where: The place, once this thread has reached it; else "".
    """

    def __init__(self, number: int, action: Callable[[], None], within: str, opcodes: bool = False) -> None:
        self.left = number
        self.action = action
        self.within = str(Path(embedsurgery.__file__).parent / within)
        self.event = "opcode" if opcodes else "line"
        self.where = ""

    def __enter__(self) -> ActionAt:
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
                self.action()
        return self._trace


def interrupt_at_each_line(work: Callable[[], None], check: Callable[[], None], within: str = "") -> int:
    """Run ``work`` once per line with a KeyboardInterrupt at that line, and ``check`` after each run.

    Args:
        work: The function to interrupt.
        check: Raises if the interrupt has left something wrong.
        within: The file or directory of the package that has the lines.

    Returns:
        The number of lines.
    """

    def interrupt() -> None:
        raise KeyboardInterrupt

    number = 0
    while True:
        try:
            with ActionAt(number, interrupt, within) as place:
                work()
        except KeyboardInterrupt:
            torch.set_grad_enabled(True)  # an interrupt in torch's no_grad() leaves it off
        if not place.where:
            return number
        try:
            check()
        except Exception as error:
            raise AssertionError(f"after a KeyboardInterrupt at {place.where}") from error
        number += 1


class Interleaved:
    """Runs a function in this thread, and another one in a second thread once this thread has reached a place.

    If the second one calls ``wait_half_way`` (which can be a hook), it waits there until the first one has ended. So
    the second one runs either entirely within the first one, or begins in it and ends after it.

    Args:
        work: Runs in this thread.
        other: Runs in the second thread.
        within: The file or directory of the package that has the places.
        opcodes: Whether each instruction is a place; else each line.
        patience: Seconds after which the second thread is assumed to wait for a lock that this one holds.
    """

    def __init__(
        self,
        work: Callable[[], None],
        other: Callable[[], None],
        *,
        within: str = "",
        opcodes: bool = False,
        patience: float = 0.02,
    ) -> None:
        self.work = work
        self.other = other
        self.within = within
        self.opcodes = opcodes
        self.patience = patience
        self.thread = threading.Thread()

    def wait_half_way(self, *_: Any) -> None:
        """In the second thread, wait until the first one has ended."""
        if threading.current_thread() is self.thread:
            self.other_stopped.set()
            assert self.may_continue.wait(60)

    def run_at_each_place(self) -> int:
        """Run both once per place, and return the number of places. An error of either names the place."""
        number = 0
        while self.run_at(number):
            number += 1
        return number

    def run_at(self, number: int) -> bool:
        """Run both, the second one from one place on. Return whether the place was reached."""
        self.raised: list[BaseException] = []
        self.other_stopped, self.may_continue = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._run)

        def start_other() -> None:
            self.thread.start()
            self.other_stopped.wait(self.patience)

        with ActionAt(number, start_other, self.within, self.opcodes) as place:
            try:
                self.work()
            except BaseException as error:
                self.raised.append(error)
        self.may_continue.set()
        if place.where:
            self.thread.join(60)
            assert not self.thread.is_alive(), f"deadlock, with the first thread at {place.where}"
        if self.raised:
            raise AssertionError(f"with the second thread started at {place.where}") from self.raised[0]
        return bool(place.where)

    def _run(self) -> None:
        try:
            self.other()
        except BaseException as error:
            self.raised.append(error)
        finally:
            self.other_stopped.set()

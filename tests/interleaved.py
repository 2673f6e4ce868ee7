"""Two threads at once, at each place of the package's code where Python may switch between them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import embedsurgery


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
        self.within = str(Path(embedsurgery.__file__).parent / within)
        self.patience = patience
        self.event = "opcode" if steps else "line"
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
        left, where = number, ""

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal left, where
            if not frame.f_code.co_filename.startswith(self.within):
                return None
            frame.f_trace_opcodes = self.event == "opcode"
            if event == self.event:
                if left == 0:
                    where = f"{Path(frame.f_code.co_filename).name}, line {frame.f_lineno}"
                    self.thread.start()
                    self.came.wait(self.patience)
                left -= 1
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            self.work()
        except BaseException as error:
            self.raised.append(error)
        finally:
            sys.settrace(before)
            self.go.set()
        if where:
            self.thread.join(60)
            assert not self.thread.is_alive(), f"both wait, the first at {where}"
        if self.raised:
            raise AssertionError(f"with the other thread in at {where}") from self.raised[0]
        return bool(where)

    def _run(self) -> None:
        try:
            self.other()
        except BaseException as error:
            self.raised.append(error)
        finally:
            self.came.set()

"""Holds signals back during short steps that must not be cut in half."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def defer_signals() -> Iterator[None]:
    """Delay SIGINT, SIGTERM and SIGHUP until the block ends, then raise those that arrived.

    Only for short blocks. Signals without a Python handler are not delayed, and outside the main thread nothing is:
    Python runs signal handlers in the main thread only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []

    def record(number: int, frame: FrameType | None) -> None:
        arrived.append(number)

    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if callable(signal.getsignal(number)):
            previous[number] = signal.signal(number, record)
    try:
        yield
    finally:
        # Restore every handler before raising: the handler of the first signal may raise, and must be the caller's.
        for deferred, handler in previous.items():
            signal.signal(deferred, handler)
        for late in dict.fromkeys(arrived):
            signal.raise_signal(late)

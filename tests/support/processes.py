"""The command line and Python in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def cli(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``python -m embedsurgery``."""
    command = [sys.executable, "-m", "embedsurgery", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **options)


def python(code: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter; ``sys.argv[1:]`` are the arguments."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **options)


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """Inside, every write past a size fails, as on a full disk; not longer, for pytest itself may write to a file."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

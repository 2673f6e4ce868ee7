"""Plugins whose import writes to standard output in many ways, as an imported library may."""

from __future__ import annotations

import os
from pathlib import Path

NOISE = """
import atexit, ctypes, logging, os, subprocess, sys
print("print")
sys.__stdout__.write("__stdout__\\n")
logger = logging.getLogger(__name__)
logger.addHandler(logging.StreamHandler(sys.stdout))
logger.warning("logger")
os.write(1, b"descriptor\\n")
ctypes.CDLL(None).puts(b"C")
subprocess.run(["echo", "child"], check=True)
atexit.register(logger.warning, "logger at exit")
atexit.register(print, "print at exit")
"""
NOISE_LINES = ["C", "__stdout__", "child", "descriptor", "logger", "logger at exit", "print", "print at exit"]
"""The lines of ``NOISE``, sorted."""


def plugin(folder: Path, code: str) -> dict[str, str]:
    """Write a plugin with this code; returns the environment of a process that has it, with buffered output."""
    about = folder / "embedsurgery_noisy-1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: embedsurgery-noisy\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[embedsurgery]\nnoisy = embedsurgery_noisy\n")
    (folder / "embedsurgery_noisy.py").write_text(code)
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": ""}

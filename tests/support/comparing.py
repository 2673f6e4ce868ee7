"""Comparison of directories and tensors bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def tree(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    """Relative path -> (bytes, mode, mtime) of every file below a directory."""
    return {
        p.relative_to(folder).as_posix(): (p.read_bytes(), p.stat().st_mode, p.stat().st_mtime_ns)
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def contents(folder: Path) -> dict[str, bytes]:
    """Relative path -> bytes of every file below a directory."""
    return {path: data for path, (data, _, _) in tree(folder).items()}


def listing(folder: Path) -> list[str]:
    """Everything below a directory, hidden things included."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def bits(tensor: torch.Tensor) -> bytes:
    """A tensor's elements as bytes, in logical order."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def state_bits(model: Any) -> dict[str, bytes]:
    """Name -> bytes of every tensor of a model's state dict."""
    return {name: bits(tensor) for name, tensor in model.state_dict().items()}

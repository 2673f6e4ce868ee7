"""What is on disk, read independently of what wrote it: hashes, sizes, rows that differ, a directory that vanishes."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from embedsurgery.errors import ConfigError, OutputExistsError
from embedsurgery.files.copying import tree_files


@contextmanager
def fresh_directory(output: Path, *, apart_from: Path | None = None) -> Iterator[None]:
    """Make a directory, or take an empty one; where the block fails, what it put there goes away.

    Args:
        output: The directory.
        apart_from: A directory that ``output`` may not lie in, because it is somebody's.

    Raises:
        OutputExistsError: There is something in it.
        ConfigError: It lies in ``apart_from``.
    """
    if apart_from is not None and output.resolve().is_relative_to(apart_from.resolve()):
        raise ConfigError(
            "the output lies in the model's own directory", where=output, hint="name another with --output"
        )
    empty = output.is_dir() and not any(output.iterdir())
    if os.path.lexists(output) and not empty:
        raise OutputExistsError(
            "the output exists already", where=output, hint="name another with --output, or remove it"
        )
    output.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in output.iterdir():
            shutil.rmtree(path, ignore_errors=True)
        if not empty:
            output.rmdir()
        raise


def hashes(directory: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file below a directory."""
    found = {}
    for path, _ in tree_files(directory):
        with open(directory / path, "rb") as file:
            found[path] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def total_bytes(directory: Path, names: Collection[str] | None = None) -> int:
    """Size of the files below a directory, or of those that are named."""
    return sum(size for path, size in tree_files(directory) if names is None or path in names)


def changed_rows(base: Path, other: Path, transposed: Collection[str]) -> tuple[dict[str, int], int]:
    """Compare the tensors of two safetensors files bit by bit.

    Args:
        base: The one file.
        other: The other; it must hold the same tensors.
        transposed: Names of tables that are stored (D, V).

    Returns:
        Tensor -> how many of its rows differ, for those that differ, and how many tensors there are.
    """
    import torch
    from safetensors import safe_open

    differ = {}
    with safe_open(base, framework="pt") as one, safe_open(other, framework="pt") as two:
        names = sorted({*one.keys(), *two.keys()})
        for name in names:
            tensors = (one.get_tensor(name), two.get_tensor(name))
            a, b = (t.t() if name in transposed else t for t in tensors)
            a, b = (t.contiguous().reshape(t.shape[0] if t.dim() else 1, -1).view(torch.uint8) for t in (a, b))
            rows = int((a != b).any(dim=1).sum())
            if rows:
                differ[name] = rows
    return differ, len(names)

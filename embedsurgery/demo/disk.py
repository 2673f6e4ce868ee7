"""The demo's output directory, and hashes, sizes and changed rows of what is in it.

Independent of the code that wrote the files, so that the demo's claims are measured and not repeated.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open

from embedsurgery.errors import ConfigError, OutputExistsError
from embedsurgery.files.copying import list_files


@contextmanager
def fresh_directory(output: Path, *, apart_from: Path | None = None) -> Iterator[None]:
    """Create a directory, or use an empty one; if the block raises, remove everything that it wrote.

    Args:
        output: The directory.
        apart_from: The user's model; ``output`` must not be inside it.

    Raises:
        OutputExistsError: ``output`` exists and is not an empty directory.
        ConfigError: ``output`` is inside ``apart_from``.
    """
    if apart_from is not None and output.resolve().is_relative_to(apart_from.resolve()):
        raise ConfigError("the output is inside the model's directory", where=output, hint="choose another --output")
    empty = output.is_dir() and not any(output.iterdir())
    if os.path.lexists(output) and not empty:
        raise OutputExistsError("the output exists already", where=output, hint="choose another --output, or remove it")
    output.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in output.iterdir():
            shutil.rmtree(path, ignore_errors=True)
        if not empty:
            output.rmdir()
        raise


def hash_directory(directory: Path) -> dict[str, str]:
    """Hash every file below a directory: relative path -> sha256."""
    hashes = {}
    for path, _ in list_files(directory):
        with open(directory / path, "rb") as file:
            hashes[path] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def total_bytes(directory: Path, names: Collection[str] | None = None) -> int:
    """Return the size in bytes of the files below a directory, or of the named ones only."""
    return sum(size for path, size in list_files(directory) if names is None or path in names)


def count_changed_rows(base: Path, other: Path, transposed: Collection[str]) -> tuple[dict[str, int], int]:
    """Compare the tensors of two safetensors files bit by bit.

    Args:
        base: One file.
        other: A file with the same tensors.
        transposed: Names of tables that are stored (D, V).

    Returns:
        Tensor -> number of rows that differ, for the tensors that differ, and the number of tensors.
    """
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

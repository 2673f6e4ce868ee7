"""Bounds on JSON that came with data, looked at before any object is made of it.

A few megabytes of brackets become gigabytes of lists, so it is counted first how much there is to make: in C, on the
text as it lies there. Characters inside strings count too, which the bounds leave room for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from embedsurgery.errors import CheckpointError


@dataclass(frozen=True)
class Bounds:
    """What a kind of file stays below.

    Attributes:
        size: Bytes.
        brackets: Of ``[`` and ``{``.
        commas: Of them.
    """

    size: int
    brackets: int
    commas: int


HEADER = Bounds(16_000_000, 400_000, 2_000_000)
"""Of a safetensors file. The largest known checkpoints have some hundred thousand tensors in dozens of files."""

INDEX = Bounds(64_000_000, 1_000, 500_000)
CONFIG = Bounds(16_000_000, 200_000, 500_000)
NOTE = Bounds(65_536, 1_000, 10_000)
"""Of ours: where an adapter came from, whose a hidden directory is, which merge was taken out."""

TOKENIZER = Bounds(200_000_000, 5_000_000, 20_000_000)
"""Some vocabularies have half a million merges, each a list of its own."""


def refuse_bomb(text: bytes | str, bounds: Bounds, where: object) -> None:
    """Raise CheckpointError where a JSON text goes beyond its bounds."""
    bracket, brace, comma = ("[", "{", ",") if isinstance(text, str) else (b"[", b"{", b",")
    counts = (
        ("bytes", len(text), bounds.size),
        ("brackets", text.count(bracket) + text.count(brace), bounds.brackets),  # type: ignore[arg-type]
        ("commas", text.count(comma), bounds.commas),  # type: ignore[arg-type]
    )
    for what, found, most in counts:
        if found > most:
            raise CheckpointError(f"JSON with too many {what} for what it is", where=where, found=f"{found:,}",
                                  expected=f"at most {most:,}", hint="is it the file that it should be?")  # fmt: skip


def refuse_large(size: int, bounds: Bounds, where: Path) -> None:
    """Raise CheckpointError where a file is larger than its bounds, before it is read."""
    if size > bounds.size:
        raise CheckpointError("file too large for what it is", where=where, expected=f"at most {bounds.size:,} bytes",
                              found=f"{size:,}", hint="is it the file that it should be?")  # fmt: skip

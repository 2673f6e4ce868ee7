"""Describes a soft prompt for people: the vocabulary's tokens nearest to each virtual token, and their norms.

Khashabi et al. 2022, https://arxiv.org/abs/2112.08348, show that nearest tokens need not describe what a prompt does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedsurgery.adapters.adapter import Adapter
from embedsurgery.adapters.locate import locate
from embedsurgery.errors import EmbedSurgeryError, escape_unprintable
from embedsurgery.graph import Table
from embedsurgery.plan.blocks import spans
from embedsurgery.stores.store import Store
from embedsurgery.surgeries.soft_prompt.config import prompts_of
from embedsurgery.surgeries.soft_prompt.lookup_scale import scale_of
from embedsurgery.tensors.raw import ITEMSIZE
from embedsurgery.tokenizer.reading import read_token_texts

_CHUNK = 4096
"""Number of the table's rows that are compared at once."""

_MAX_LISTED = 20
"""Number of virtual tokens that a model card lists."""


@dataclass(frozen=True)
class NearToken:
    """A token of the vocabulary near a virtual token.

    Attributes:
        id: Its id.
        text: Its text, or None if it is not known.
        cosine: Cosine similarity of the two rows.
    """

    id: int
    text: str | None
    cosine: float


@dataclass(frozen=True)
class VirtualToken:
    """A virtual token.

    Attributes:
        norm: Its L2 norm as a row of the table.
        nearest: The tokens with the largest cosines, largest first.
    """

    norm: float
    nearest: tuple[NearToken, ...]


@dataclass(frozen=True)
class PromptComparison:
    """A soft prompt compared with a vocabulary.

    Attributes:
        tokens: The virtual tokens.
        mean_norm: Mean L2 norm of the vocabulary's rows.
        min_norm: Norm of the shortest row.
        max_norm: Norm of the longest row.
    """

    tokens: tuple[VirtualToken, ...]
    mean_norm: float
    min_norm: float
    max_norm: float


def compare_prompt(
    vectors: npt.NDArray[np.float32],
    store: Store,
    table: Table,
    texts: Mapping[int, str] | None = None,
    *,
    scale: float = 1.0,
    most: int = 5,
) -> PromptComparison:
    """Compare virtual tokens with every token of a vocabulary, block by block in bounded memory, without torch.

    Args:
        vectors: The virtual tokens as the lookup returns them, (n, D).
        store: The table's store.
        table: The lookup's table.
        texts: Id -> text of the tokenizer's tokens; rows without a text are skipped. None compares all rows.
        scale: The factor by which the lookup multiplies its rows.
        most: Number of nearest tokens for each virtual token.

    Returns:
        The comparison. Cosines are computed in fp32; rows that are zero or not finite are skipped.
    """
    rows = vectors.astype(np.float32) / np.float32(scale)
    lengths = np.linalg.norm(rows, axis=1)
    unit = rows / np.maximum(lengths, np.finfo(np.float32).tiny)[:, None]
    best = np.full((len(rows), 0), -2.0, dtype=np.float32)
    ids = np.zeros((len(rows), 0), dtype=np.int64)
    total, count, least, greatest = 0.0, 0, np.inf, 0.0
    for index, part, norms in _usable_rows(store, table, texts):
        total, count = total + float(norms.sum(dtype=np.float64)), count + len(index)
        least, greatest = min(least, float(norms.min())), max(greatest, float(norms.max()))
        cosines = unit @ (part / norms[:, None]).T
        best = np.concatenate([best, cosines], axis=1)
        ids = np.concatenate([ids, np.broadcast_to(index, cosines.shape)], axis=1)
        order = np.argsort(-best, axis=1, kind="stable")[:, :most]
        best, ids = np.take_along_axis(best, order, axis=1), np.take_along_axis(ids, order, axis=1)
    tokens = []
    for length, near, scores in zip(lengths, ids, best, strict=True):
        pairs = [(int(i), float(c)) for i, c in zip(near, scores, strict=True)]
        nearest = tuple(NearToken(i, None if texts is None else texts.get(i), cosine) for i, cosine in pairs)
        tokens.append(VirtualToken(float(length), nearest))
    return PromptComparison(tuple(tokens), total / max(count, 1), least if count else 0.0, greatest)


def _usable_rows(
    store: Store, table: Table, texts: Mapping[int, str] | None
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
    """Yield (indices, rows, norms) of the rows that are compared, some thousand at a time."""
    known = None if texts is None else np.zeros(table.shape[0], dtype=bool)
    if known is not None and texts is not None:
        known[[index for index in texts if 0 <= index < table.shape[0]]] = True
    name = store.copies(table)[0]
    for begin, end in spans(table.shape[0], table.shape[1] * ITEMSIZE[table.dtype]):
        block = store.read_block(name, begin, end).float32()
        for start in range(0, end - begin, _CHUNK):
            part = block[start : start + _CHUNK]
            with np.errstate(over="ignore", invalid="ignore"):
                norms = np.linalg.norm(part, axis=1)
            usable = np.isfinite(norms) & (norms > 0)
            if known is not None:
                usable &= known[begin + start : begin + start + len(part)]
            kept = np.flatnonzero(usable)
            if len(kept):
                yield kept + begin + start, part[kept], norms[kept]


def compare_with_checkpoint(vectors: npt.NDArray[np.float32], store: Store, table: Table) -> PromptComparison:
    """As `compare_prompt`, for a table of a checkpoint, with the texts of its tokenizer if they can be read."""
    scale = scale_of(table, store.config)
    try:
        texts = read_token_texts(store.directory)
    except EmbedSurgeryError:
        texts = None
    return compare_prompt(vectors, store, table, texts, scale=1.0 if scale is None else scale.in_dtype(table.dtype))


def card_lines(adapter: Adapter, base: Store | None) -> list[str]:
    """Return the lines of a model card: each virtual token's norm, and its nearest tokens if the base is given.

    Args:
        adapter: The soft prompt.
        base: The base, or None.
    """
    lines = []
    for submodule, raw in prompts_of(adapter).items():
        vectors = raw.float32()
        comparison = _compare_with_base(adapter, vectors, base)
        of = "" if submodule == "model" else f" of the {submodule}"
        lines += [f"Virtual tokens{of}: {len(vectors)}", ""]
        for number, length in enumerate(np.linalg.norm(vectors, axis=1)[:_MAX_LISTED]):
            near = () if comparison is None else comparison.tokens[number].nearest[:3]
            words = ", ".join(
                f"{_inline_code(str(n.text if n.text is not None else n.id))} ({n.cosine:.2f})" for n in near
            )
            lines.append(f"- {number}: norm {length:.3g}" + (f", near {words}" if words else ""))
        lines += [f"- and {len(vectors) - _MAX_LISTED} more"] if len(vectors) > _MAX_LISTED else []
        lines.append("")
    return lines


def _compare_with_base(
    adapter: Adapter, vectors: npt.NDArray[np.float32], base: Store | None
) -> PromptComparison | None:
    """Compare vectors with a base; None without one, or if it is not the adapter's."""
    if base is None:
        return None
    try:
        located = locate(adapter, base)
    except EmbedSurgeryError:
        return None
    return compare_with_checkpoint(vectors, base, located[adapter.manifest.tables[0].name])


def _inline_code(text: str) -> str:
    """Return text as inline code of Markdown, also if it has backticks."""
    shown = escape_unprintable(text)
    return f"`{shown}`" if "`" not in shown else f"`` {shown} ``"

"""A soft prompt read by people: the vocabulary's tokens nearest to each virtual token, and how long it is beside them.

Khashabi et al. 2022, https://arxiv.org/abs/2112.08348, show that nearest words need not mean what a prompt does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedsurgery.adapters.adapter import Adapter
from embedsurgery.adapters.locate import locate
from embedsurgery.errors import EmbedSurgeryError, printable
from embedsurgery.graph import Table
from embedsurgery.plan.blocks import spans
from embedsurgery.stores.store import Store
from embedsurgery.surgeries.soft_prompt.config import prompts_of
from embedsurgery.surgeries.soft_prompt.lookup_scale import scale_of
from embedsurgery.tensors.raw import ITEMSIZE
from embedsurgery.tokenizer.reading import token_texts

_CHUNK = 4096
"""Rows of the table that are looked at together."""

_LISTED = 20
"""Virtual tokens that a card lists."""


@dataclass(frozen=True)
class Near:
    """A token of the vocabulary that is near to a virtual one.

    Attributes:
        id: Its row.
        text: Its text, None where that is not known.
        cosine: Of the angle between the two rows.
    """

    id: int
    text: str | None
    cosine: float


@dataclass(frozen=True)
class VirtualToken:
    """A virtual token.

    Attributes:
        norm: Its length as a row of the table.
        nearest: The tokens with the largest cosine, the nearest first.
    """

    norm: float
    nearest: tuple[Near, ...]


@dataclass(frozen=True)
class Reading:
    """A soft prompt beside a vocabulary.

    Attributes:
        tokens: The virtual tokens.
        mean_norm: Mean length of the vocabulary's rows.
        least_norm: Of the shortest.
        greatest_norm: Of the longest.
    """

    tokens: tuple[VirtualToken, ...]
    mean_norm: float
    least_norm: float
    greatest_norm: float


def read_prompt(
    vectors: npt.NDArray[np.float32],
    store: Store,
    table: Table,
    texts: Mapping[int, str] | None = None,
    *,
    scale: float = 1.0,
    most: int = 5,
) -> Reading:
    """Compare virtual tokens with every token of a vocabulary, block by block in bounded memory, without torch.

    Args:
        vectors: As they leave the lookup, (n, D).
        store: What the table is in.
        table: The lookup's.
        texts: Id -> text of the tokenizer's tokens: rows without one do not count. None counts all rows.
        scale: What the lookup multiplies its rows by.
        most: How many nearest tokens for each, k.

    Returns:
        Cosines are computed in fp32; rows of zeros, NaN or infinity are near to nothing.
    """
    rows = vectors.astype(np.float32) / np.float32(scale)
    lengths = np.linalg.norm(rows, axis=1)
    unit = rows / np.maximum(lengths, np.finfo(np.float32).tiny)[:, None]
    best = np.full((len(rows), 0), -2.0, dtype=np.float32)
    ids = np.zeros((len(rows), 0), dtype=np.int64)
    total, count, least, greatest = 0.0, 0, np.inf, 0.0
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
            good = np.isfinite(norms) & (norms > 0)
            if known is not None:
                good &= known[begin + start : begin + start + len(part)]
            at = np.flatnonzero(good)
            if not len(at):
                continue
            total, count = total + float(norms[at].sum(dtype=np.float64)), count + len(at)
            least, greatest = min(least, float(norms[at].min())), max(greatest, float(norms[at].max()))
            cosines = unit @ (part[at] / norms[at, None]).T
            best = np.concatenate([best, cosines], axis=1)
            ids = np.concatenate([ids, np.broadcast_to(at + begin + start, cosines.shape)], axis=1)
            order = np.argsort(-best, axis=1, kind="stable")[:, :most]
            best, ids = np.take_along_axis(best, order, axis=1), np.take_along_axis(ids, order, axis=1)
    tokens = []
    for length, near, scores in zip(lengths, ids, best, strict=True):
        found = (
            Near(int(i), None if texts is None else texts.get(int(i)), float(c))
            for i, c in zip(near, scores, strict=True)
        )
        tokens.append(VirtualToken(float(length), tuple(found)))
    return Reading(tuple(tokens), total / max(count, 1), least if count else 0.0, greatest)


def read_beside(vectors: npt.NDArray[np.float32], store: Store, table: Table) -> Reading:
    """As `read_prompt`, of a table of a checkpoint, with the texts of its tokenizer where that tells them."""
    scale = scale_of(table, store.config)
    try:
        texts = token_texts(store.directory)
    except EmbedSurgeryError:
        texts = None
    return read_prompt(vectors, store, table, texts, scale=1.0 if scale is None else scale.in_dtype(table.dtype))


def card_lines(adapter: Adapter, base: Store | None) -> list[str]:
    """What a model card says of a soft prompt: each virtual token's length, and its nearest words where the base is.

    Args:
        adapter: The soft prompt.
        base: The base, where it is at hand.
    """
    lines = []
    for submodule, raw in prompts_of(adapter).items():
        vectors = raw.float32()
        reading = _beside(adapter, vectors, base)
        of = "" if submodule == "model" else f" of the {submodule}"
        lines += [f"Virtual tokens{of}: {len(vectors)}", ""]
        for number, length in enumerate(np.linalg.norm(vectors, axis=1)[:_LISTED]):
            near = () if reading is None else reading.tokens[number].nearest[:3]
            words = ", ".join(f"{_code(str(n.text if n.text is not None else n.id))} ({n.cosine:.2f})" for n in near)
            lines.append(f"- {number}: norm {length:.3g}" + (f", near {words}" if words else ""))
        lines += [f"- and {len(vectors) - _LISTED} more"] if len(vectors) > _LISTED else []
        lines.append("")
    return lines


def _beside(adapter: Adapter, vectors: npt.NDArray[np.float32], base: Store | None) -> Reading | None:
    """The reading beside a base; None without one, or for another."""
    if base is None:
        return None
    try:
        located = locate(adapter, base)
    except EmbedSurgeryError:
        return None
    return read_beside(vectors, base, located[adapter.manifest.tables[0].name])


def _code(text: str) -> str:
    """Text from data as inline code, whatever is in it."""
    shown = printable(text)
    return f"`{shown}`" if "`" not in shown else f"`` {shown} ``"

"""Where virtual tokens are inserted in a batch, and how values with one entry per token follow them.

Each sample's prompt is inserted directly before its first real token, so that prompt and text compute what they would
without padding. There are two orders. Both keep the order of the tokens after the first real one:

- *in place*: left padding, prompt, text. A cache needs this order, because generated tokens are appended.
- *rolled*: prompt, text, and behind them what was left padding. Positions then start at 0 in every sample, also in
  models that can only count, and a pooler that reads the first entry finds the same one as without padding.

In a batch whose samples have prompts of different lengths, shorter prompts have *fillers* before them, which are
masked. Everything here is arithmetic on small integer tensors. No value is read back from a device, which would
synchronise it and break a compiled graph. The one exception is `PromptLayout.is_uneven`, which decides on an error.

Masks are extended in ``masks.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

FIRST_ID = -(1 << 24)
"""The id of the first virtual token; those of the others count down from it. No model uses it for padding or images,
and it is never the maximum where a model searches for its largest id."""


@dataclass(frozen=True)
class PromptLayout:
    """How N virtual tokens are inserted into a batch of B samples.

    The *flat order* is N entries for the prompt, right-aligned in each sample, and then the input as it was given.

    Attributes:
        count: N, the length of the longest prompt.
        batch: B.
        length: L, the number of input tokens when the prompt was inserted.
        first: Index of each sample's first real token, int64 (B,); None if it is 0 in every sample.
        lengths: Length of each sample's prompt, int64 (B,); None if all have N.
        rolled: Whether the order is rolled; else it is in place.
    """

    count: int
    batch: int
    length: int
    first: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    rolled: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the model gets its tokens in the flat order."""
        return self.first is None and (self.lengths is None or not self.rolled)

    def is_uneven(self) -> bool:
        """Whether samples, their prompts included, start at different indices. It reads values back."""
        parts = (self.first, None if self.lengths is None else self.count - self.lengths)
        return any(part is not None and bool(part.any()) for part in parts)

    def sources(self, total: int, device: torch.device) -> torch.Tensor:
        """Return for each entry that the model gets its index in the flat order, int64 (B, N + total).

        Args:
            total: Number of input tokens so far, at least L. Those behind the first L are appended.
            device: Device of the result.
        """
        count, length = self.count, self.length
        place = torch.arange(count + length, device=device).unsqueeze(0)
        first = torch.zeros(1, 1, dtype=torch.int64, device=device) if self.first is None else self.first[:, None]
        if self.rolled:
            own = count if self.lengths is None else self.lengths[:, None]
            drop = count - own
            rolled = count + (place - own + first) % max(length, 1)
            # A sample's prompt, its rolled input, and last the fillers of a prompt that is shorter than N.
            found = torch.where(
                place < own, drop + place, torch.where(place < own + length, rolled, place - own - length)
            )
        else:
            # Left padding, the prompt with its fillers, and the text, which has the same index in the flat order.
            found = torch.where(place < first, count + place, torch.where(place < first + count, place - first, place))
        found = found.expand(self.batch, -1)
        if total == length:
            return found
        added = torch.arange(count + length, count + total, device=device).expand(self.batch, -1)
        return torch.cat([found, added], dim=1)

    def prompt_mask(self, device: torch.device) -> torch.Tensor:
        """Return which of the N prompt entries of the flat order are virtual tokens and no fillers, bool (B, N)."""
        place = torch.arange(self.count, device=device).expand(self.batch, -1)
        if self.lengths is None:
            return torch.ones_like(place, dtype=torch.bool)
        return place >= self.count - self.lengths[:, None]

    def prompt_lengths(self) -> torch.Tensor | int:
        """Return the length of each sample's prompt, int64 (B, 1), or one number for all."""
        return self.count if self.lengths is None else self.lengths[:, None]

    def select(self, indices: torch.Tensor) -> PromptLayout:
        """Return the layout of some of the samples, int64 (B',), as a cache selects them for beams."""
        pick = [None if part is None else part.index_select(0, indices.to(part.device)) for part in self._tensors()]
        return replace(self, batch=indices.numel(), first=pick[0], lengths=pick[1])

    def repeat(self, batch: int) -> PromptLayout:
        """Return the layout of a batch that has each sample several times in a row."""
        if batch == self.batch:
            return self
        times = batch // self.batch
        more = [None if part is None else part.repeat_interleave(times) for part in self._tensors()]
        return replace(self, batch=batch, first=more[0], lengths=more[1])

    def _tensors(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return self.first, self.lengths


def is_virtual(ids: torch.Tensor) -> torch.Tensor:
    """Return which ids are virtual tokens', bool of the same shape."""
    return ids <= FIRST_ID


def insert_prefix(prefix: torch.Tensor, given: torch.Tensor, layout: PromptLayout) -> torch.Tensor:
    """Insert the prompt's entries into a tensor with one entry per token, in the order in which the model gets them.

    Args:
        prefix: The prompt's entries in the flat order, (B, N, ...), or (N, ...) for all samples.
        given: The input's entries, (B or 1, total, ...).
        layout: The layout.

    Returns:
        (B, N + total, ...)
    """
    given = given.expand(layout.batch, *given.shape[1:])
    flat = torch.cat([prefix.to(given.dtype).expand(layout.batch, *prefix.shape[-given.dim() + 1 :]), given], dim=1)
    return flat if layout.is_plain else gather_along(flat, layout.sources(given.shape[1], given.device), 1)


def gather_along(values: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
    """Select entries of one axis by an index for each sample.

    Args:
        values: (B, ...).
        index: int64 (B, S).
        dim: The axis, 1 or higher.

    Returns:
        ``values`` with S entries in that axis.
    """
    shape = [1] * values.dim()
    shape[0], shape[dim] = index.shape
    sizes = [*values.shape]
    sizes[dim] = index.shape[1]
    return values.gather(dim, index.reshape(shape).expand(sizes))


def extend_positions(positions: torch.Tensor, layout: PromptLayout) -> torch.Tensor:
    """Extend position ids by the prompt's. The prompt starts where the text did, and the text moves behind it.

    Args:
        positions: The input's position ids, (..., 1 or B, L).
        layout: The layout.

    Returns:
        (..., B, N + L)
    """
    positions = positions.expand(*positions.shape[:-2], layout.batch, -1)
    place = torch.arange(layout.length, device=positions.device)
    first = positions.new_zeros(layout.batch) if layout.first is None else layout.first
    start = positions.gather(-1, first[:, None].expand(*positions.shape[:-1], 1))
    own = torch.arange(layout.count, device=positions.device)
    drop = 0 if layout.lengths is None else layout.count - layout.lengths[:, None]
    prompt = start + (own - drop).clamp(min=0)
    text = positions + torch.where(place >= first[:, None], layout.prompt_lengths(), 0)
    flat = torch.cat([prompt, text], dim=-1)
    if layout.is_plain:
        return flat
    sources = layout.sources(layout.length, positions.device)
    return flat.gather(-1, sources.expand(*flat.shape[:-1], -1))


def count_positions(layout: PromptLayout, start: int | torch.Tensor, length: int, device: torch.device) -> torch.Tensor:
    """Return position ids counted from each sample's first virtual token, int64 (B, length).

    Args:
        layout: The layout, in place.
        start: Number of entries that the cache has.
        length: Number of entries that the model gets now.
        device: Device of the result.
    """
    place = torch.arange(length, device=device) + start
    begin = torch.zeros(layout.batch, 1, dtype=torch.int64, device=device)
    if layout.first is not None:
        begin = begin + layout.first[:, None]
    if layout.lengths is not None:
        begin = begin + layout.count - layout.lengths[:, None]
    return (place - begin).clamp(min=0)


def restore_order(values: torch.Tensor, layout: PromptLayout, dim: int, keep: bool = False) -> torch.Tensor:
    """Put the entries that a model returned into the order of its input.

    Args:
        values: (B, ...), with N + L entries in one axis.
        layout: The layout.
        dim: The axis.
        keep: Leave the prompt's entries in front, in the flat order; else they are removed.
    """
    skip = 0 if keep else layout.count
    if layout.is_plain:
        return values.narrow(dim, skip, values.shape[dim] - skip)
    return gather_along(values, _invert_sources(layout, values.shape[dim], values.device)[:, skip:], dim)


def restore_order_with_extra(values: torch.Tensor, layout: PromptLayout) -> torch.Tensor:
    """As `restore_order`, with an extra entry in front, so that some entry predicts the input's first token.

    In a sample that starts with padding, the prompt's last entry is moved directly before the first real token.

    Returns:
        (B, 1 + L, ...)
    """
    skip = layout.count - 1
    if layout.is_plain:
        return values.narrow(1, skip, values.shape[1] - skip)
    index = _invert_sources(layout, values.shape[1], values.device)
    return gather_along(values, move_last_before_text(layout, index)[:, skip:], 1)


def move_last_before_text(layout: PromptLayout, places: torch.Tensor) -> torch.Tensor:
    """Replace the index before each sample's first real token by that of the prompt's last token.

    Args:
        layout: The layout.
        places: Indices in the flat order, int64 (B, N + L).
    """
    if layout.first is None:
        return places
    column = torch.arange(places.shape[1], device=places.device)
    before = column == (layout.count - 1 + layout.first)[:, None]
    if layout.lengths is not None:
        before = before & (layout.lengths > 0)[:, None]
    return torch.where(before, places[:, layout.count - 1, None], places)


def _invert_sources(layout: PromptLayout, size: int, device: torch.device) -> torch.Tensor:
    """Return for each entry of the flat order its index among those that the model gets, int64 (B, size)."""
    sources = layout.sources(size - layout.count, device)
    place = torch.arange(size, device=device).expand(layout.batch, -1)
    return torch.empty_like(sources).scatter(1, sources, place)

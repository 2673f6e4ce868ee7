"""Where virtual tokens stand in a batch, and what that means for positions and all else that goes by token.

Each sample's prompt stands right before its first real token, so that prompt and text are as they would be alone,
without padding. There are two ways, and both leave the order of the tokens behind the first real one as it is:

- *in place*: padding on the left, prompt, text. A cache needs it, for what is generated is appended.
- *rolled*: prompt, text, and what was padding on the left behind them. Positions then begin at 0 for every sample,
  also in models that only count, and a pooler that takes the first position finds the same as without padding.

A batch in which samples have prompts of several lengths has *fillers* where a prompt is shorter than the longest; they
are masked. Everything here is arithmetic on small integer tensors: no value is read back from a device, but where an
error has to be told from what is right (`Layout.is_uneven`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

FIRST = -(1 << 24)
"""The id that stands for the first virtual token; the others go down from it. It is no model's padding or image token,
and the least wherever a model looks for its greatest id."""


@dataclass(frozen=True)
class Layout:
    """How N virtual tokens come into a batch of B samples.

    The *flat* order is N places for prompts, each sample's at their end, and then the input as it was given.

    Attributes:
        count: N, the length of the longest prompt.
        batch: B.
        length: L, how many tokens of input there were when the prompt came in.
        first: Index of each sample's first real token, int64 (B,); None where all begin at once.
        lengths: Length of each sample's prompt, int64 (B,); None where all have N.
        rolled: Which of the two ways.
    """

    count: int
    batch: int
    length: int
    first: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    rolled: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the flat order is that in which the model gets its tokens."""
        return self.first is None and (self.lengths is None or not self.rolled)

    def is_uneven(self) -> bool:
        """Whether texts begin at several places, prompts included; reads values back."""
        parts = (self.first, None if self.lengths is None else self.count - self.lengths)
        return any(part is not None and bool(part.any()) for part in parts)

    def sources(self, total: int, device: torch.device) -> torch.Tensor:
        """For each place of what the model gets the place in the flat order, int64 (B, N + total).

        Args:
            total: Tokens of input until now, L or more: those behind the first L are appended.
            device: Of the result.
        """
        count, length = self.count, self.length
        place = torch.arange(count + length, device=device).unsqueeze(0)
        first = torch.zeros(1, 1, dtype=torch.int64, device=device) if self.first is None else self.first[:, None]
        if self.rolled:
            own = count if self.lengths is None else self.lengths[:, None]
            drop = count - own
            rolled = count + (place - own + first) % max(length, 1)
            found = torch.where(
                place < own, drop + place, torch.where(place < own + length, rolled, place - own - length)
            )
        else:
            found = torch.where(place < first, count + place, torch.where(place < first + count, place - first, place))
        found = found.expand(self.batch, -1)
        if total == length:
            return found
        added = torch.arange(count + length, count + total, device=device).expand(self.batch, -1)
        return torch.cat([found, added], dim=1)

    def valid(self, device: torch.device) -> torch.Tensor:
        """Which of the flat places for prompts hold one, bool (B, N)."""
        place = torch.arange(self.count, device=device).expand(self.batch, -1)
        if self.lengths is None:
            return torch.ones_like(place, dtype=torch.bool)
        return place >= self.count - self.lengths[:, None]

    def added(self) -> torch.Tensor | int:
        """How many tokens each sample has more, (B, 1) or one number for all."""
        return self.count if self.lengths is None else self.lengths[:, None]

    def chosen(self, indices: torch.Tensor) -> Layout:
        """That of other samples, picked by their numbers."""
        pick = [None if part is None else part.index_select(0, indices.to(part.device)) for part in self._parts()]
        return replace(self, batch=indices.numel(), first=pick[0], lengths=pick[1])

    def repeated(self, batch: int) -> Layout:
        """That of a batch in which each sample stands several times, one after the other."""
        if batch == self.batch:
            return self
        times = batch // self.batch
        more = [None if part is None else part.repeat_interleave(times) for part in self._parts()]
        return replace(self, batch=batch, first=more[0], lengths=more[1])

    def _parts(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return self.first, self.lengths


def is_virtual(ids: torch.Tensor) -> torch.Tensor:
    """Which ids stand for virtual tokens."""
    return ids <= FIRST


def spread(prefix: torch.Tensor, given: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Something that goes by token, with the prompts' part, in the order in which the model gets it.

    Args:
        prefix: The prompts' part in the flat order, (B, N, ...), or (N, ...) of it, one for all samples.
        given: The input's, (B or 1, total, ...).
        layout: Where they stand.

    Returns:
        (B, N + total, ...)
    """
    given = given.expand(layout.batch, *given.shape[1:])
    flat = torch.cat([prefix.to(given.dtype).expand(layout.batch, *prefix.shape[-given.dim() + 1 :]), given], dim=1)
    return flat if layout.is_plain else along(flat, layout.sources(given.shape[1], given.device), 1)


def along(values: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
    """Entries of one axis, picked for each sample.

    Args:
        values: (B, ...).
        index: int64 (B, S).
        dim: Which axis, 1 or further.
    """
    shape = [1] * values.dim()
    shape[0], shape[dim] = index.shape
    sizes = [*values.shape]
    sizes[dim] = index.shape[1]
    return values.gather(dim, index.reshape(shape).expand(sizes))


def extended_positions(positions: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Positions that make room for the prompt, which begins where the text did.

    Args:
        positions: Those of the input, (..., 1 or B, L).
        layout: Where the prompt stands.

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
    text = positions + torch.where(place >= first[:, None], layout.added(), 0)
    flat = torch.cat([prompt, text], dim=-1)
    if layout.is_plain:
        return flat
    sources = layout.sources(layout.length, positions.device)
    return flat.gather(-1, sources.expand(*flat.shape[:-1], -1))


def counted_positions(layout: Layout, start: int | torch.Tensor, length: int, device: torch.device) -> torch.Tensor:
    """The positions of what the model gets, counted from each sample's first virtual token, (B, length).

    Args:
        layout: Where the prompt stands, in place.
        start: How many places the cache holds already.
        length: Places that come in now.
        device: Of the result.
    """
    place = torch.arange(length, device=device) + start
    begin = torch.zeros(layout.batch, 1, dtype=torch.int64, device=device)
    if layout.first is not None:
        begin = begin + layout.first[:, None]
    if layout.lengths is not None:
        begin = begin + layout.count - layout.lengths[:, None]
    return (place - begin).clamp(min=0)


def back(values: torch.Tensor, layout: Layout, dim: int, keep: bool = False) -> torch.Tensor:
    """What the model gave for each place, in the order of the input.

    Args:
        values: (B, ...), N + L entries in one axis.
        layout: Where the prompt stands.
        dim: Which axis.
        keep: Leave the prompts' entries in front, in the flat order.
    """
    skip = 0 if keep else layout.count
    if layout.is_plain:
        return values.narrow(dim, skip, values.shape[dim] - skip)
    return along(values, _places(layout, values.shape[dim], values.device)[:, skip:], dim)


def back_with_one_more(values: torch.Tensor, layout: Layout) -> torch.Tensor:
    """As `back`, with one more entry in front, so that there is one that predicts the input's first token.

    Where a sample begins with padding, the prompt's last entry takes the place before its first real token.

    Returns:
        (B, 1 + L, ...)
    """
    skip = layout.count - 1
    if layout.is_plain:
        return values.narrow(1, skip, values.shape[1] - skip)
    return along(values, before_text(layout, _places(layout, values.shape[1], values.device))[:, skip:], 1)


def before_text(layout: Layout, places: torch.Tensor) -> torch.Tensor:
    """Places in the flat order, with that of the prompt's last token before the first real token of each sample."""
    if layout.first is None:
        return places
    column = torch.arange(places.shape[1], device=places.device)
    before = column == (layout.count - 1 + layout.first)[:, None]
    if layout.lengths is not None:
        before = before & (layout.lengths > 0)[:, None]
    return torch.where(before, places[:, layout.count - 1, None], places)


def _places(layout: Layout, size: int, device: torch.device) -> torch.Tensor:
    """For each place in the flat order where it stands in what the model gets, int64 (B, N + total)."""
    sources = layout.sources(size - layout.count, device)
    place = torch.arange(size, device=device).expand(layout.batch, -1)
    return torch.empty_like(sources).scatter(1, sources, place)

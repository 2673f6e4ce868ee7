"""Attention masks that know a soft prompt, of two axes and of four, and what masks tell of where texts begin.

Where the prompt stands is ``prompt_layout.py``'s; no value is ever read back from a device here either.
"""

from __future__ import annotations

import torch

from embedsurgery.runtime.prompts.layout import Layout, along, spread


def first_real(mask: torch.Tensor) -> torch.Tensor:
    """Index of the first real token of each sample, int64 (B,), 0 where none is.

    Args:
        mask: (B, L), (B, 1 or heads, Q, L): 2-D masks are true at real tokens; in others a real token is one that
            something attends to.
    """
    if mask.dim() == 4:
        mask = attended(mask).flatten(1, 2).any(dim=1)
    return (mask != 0).to(torch.int8).argmax(dim=1)


def attended(mask: torch.Tensor) -> torch.Tensor:
    """A mask as bools: one that is added to scores hides what it makes far smaller than any score."""
    if mask.is_floating_point():
        return mask > torch.finfo(mask.dtype).min / 2
    return mask != 0


def extended_mask(
    mask: torch.Tensor, layout: Layout, window: int | None = None, *, came: bool = True, causal: bool = False
) -> torch.Tensor:
    """An attention mask that knows the prompt.

    Every token sees the prompt. The prompt sees what the first real token sees; where that is itself alone, the tokens
    of the prompt see none behind them either.

    Args:
        mask: (B, total), true at real tokens; or (B or 1, 1 or heads, 1 or Q, K), what attends to what.
        layout: Where the prompt stands.
        window: How far a token sees back, where the mask is one of sliding windows.
        came: Whether the prompt comes in now; else it is in the cache, and a mask of four axes lacks its columns alone.
        causal: Whether tokens of the model see none behind them, where a mask of four axes does not tell.
    """
    if mask.dim() == 2:
        return spread(layout.valid(mask.device), mask, layout)
    mask = mask.expand(layout.batch, *mask.shape[1:])
    if came and mask.shape[2] == 1:  # one row for all tokens
        mask = mask.expand(-1, -1, layout.length, -1)
    seen = attended(mask)
    rows, columns = mask.shape[2:]
    valid = layout.valid(mask.device)
    sources = layout.sources(max(columns, layout.length), mask.device)[:, : layout.count + columns]
    before = valid[:, None, None, :].expand(-1, mask.shape[1], rows, -1)
    flat = torch.cat([before, seen], dim=3)
    if came:
        count = layout.count
        own = torch.ones(count, count, dtype=torch.bool, device=mask.device)
        real, ahead = _seen_by_the_first(seen, layout, causal)
        own = torch.where(ahead, own, own.tril()) & valid[:, None, None, :]
        top = torch.cat([own.expand(-1, mask.shape[1], -1, -1), real.expand(-1, -1, count, -1)], dim=3)
        flat = torch.cat([top, flat], dim=2)
    out = along(flat, sources, 3)
    if came:
        out = along(out, layout.sources(rows, mask.device), 2)
        if window is not None:
            place = torch.arange(out.shape[3], device=mask.device)
            out = out & (place[: out.shape[2], None] - place[None, :] < window)
    if mask.is_floating_point():
        base = torch.cat([mask.new_zeros(*mask.shape[:3], layout.count), mask], dim=3)
        if came:
            base = torch.cat([mask.new_zeros(*mask.shape[:2], layout.count, base.shape[3]), base], dim=2)
        base = along(base, sources, 3)
        base = along(base, layout.sources(rows, mask.device), 2) if came else base
        return torch.where(out, base, torch.finfo(mask.dtype).min)
    return out.to(mask.dtype)


def _seen_by_the_first(seen: torch.Tensor, layout: Layout, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What each sample's first real token attends to behind itself, and whether such tokens do so at all.

    A sample of one token does not tell: the others of its batch do, and else the model.

    Args:
        seen: bool (B, heads, L, K).
        layout: Where the prompt stands.
        causal: Of the model.

    Returns:
        bool (B, heads, 1, K), nothing where they do not; and bool, one for all.
    """
    first = first_real(seen)
    index = first[:, None, None, None]
    row = seen.gather(2, index.expand(-1, seen.shape[1], 1, seen.shape[3]))
    behind = torch.arange(seen.shape[3], device=seen.device) > index
    several = (seen.any(dim=2, keepdim=True) & behind).any()
    ahead = (row & behind).any() | (~several & (not causal))
    return row & ahead, ahead

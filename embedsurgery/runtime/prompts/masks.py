"""Attention masks with the prompt's rows and columns inserted, and where the real tokens start in a mask.

Where the prompt is inserted is decided in ``layout.py``. As there, no value is read back from a device.
"""

from __future__ import annotations

from typing import Any

import torch

from embedsurgery.errors import UnsupportedError
from embedsurgery.runtime.prompts.layout import PromptLayout, gather_along, insert_prefix


def first_real(mask: torch.Tensor) -> torch.Tensor:
    """Return the index of the first real token of each sample, int64 (B,), 0 if there is none.

    Args:
        mask: (B, L), true at real tokens, or (B, 1 or heads, Q, L), where a real token is one that some token
            attends to.
    """
    if mask.dim() == 4:
        mask = to_bool_mask(mask).flatten(1, 2).any(dim=1)
    return (mask != 0).to(torch.int8).argmax(dim=1)


def to_bool_mask(mask: torch.Tensor) -> torch.Tensor:
    """Return a mask as bools of the same shape, true where a token is attended to.

    A float mask is added to the scores, and hides the entries that it makes far smaller than any score.
    """
    if mask.is_floating_point():
        return mask > torch.finfo(mask.dtype).min / 2
    return mask != 0


def extend_masks(mask: Any, layout: PromptLayout, window: int | None, *, inserting: bool, causal: bool) -> Any:
    """Extend what a model takes as ``attention_mask``: one mask, or a dict of them by the kind of attention.

    Args:
        mask: The mask or masks, as `extend_mask` takes them.
        layout: The layout.
        window: The model's sliding window, for the masks of sliding attention.
        inserting: As `extend_mask` takes it.
        causal: As `extend_mask` takes it.

    Raises:
        UnsupportedError: A mask of another form, or of chunked attention, whose chunks the prompt would move.
    """
    if isinstance(mask, dict):
        return {
            kind: None if part is None else _extend_kind(part, layout, window, kind, inserting, causal)
            for kind, part in mask.items()
        }
    return _extend_kind(mask, layout, window, "", inserting, causal)


def _extend_kind(
    mask: Any, layout: PromptLayout, window: int | None, kind: str, inserting: bool, causal: bool
) -> torch.Tensor:
    if not isinstance(mask, torch.Tensor) or mask.dim() not in (2, 4) or "chunked" in kind:
        raise UnsupportedError(
            "a soft prompt does not support this kind of mask",
            where="attention_mask",
            expected="a tensor of two or four axes",
            found=f"{kind} {type(mask).__name__} {list(getattr(mask, 'shape', ()))}".strip(),
            hint="give a mask of two axes",
        )
    return extend_mask(mask, layout, window if "sliding" in kind else None, inserting=inserting, causal=causal)


def extend_mask(
    mask: torch.Tensor, layout: PromptLayout, window: int | None = None, *, inserting: bool = True, causal: bool = False
) -> torch.Tensor:
    """Extend an attention mask by the prompt.

    Every token attends to the prompt. A virtual token attends to what the first real token attends to. If that is
    only itself, virtual tokens attend to nothing behind themselves either.

    Args:
        mask: (B, total), true at real tokens, or (B or 1, 1 or heads, 1 or Q, K), which token attends to which.
        layout: The layout.
        window: How many tokens back a token attends to, if this is the mask of a sliding window.
        inserting: Whether the prompt is inserted in this call. Else it is in the cache, and a 4-D mask gets columns
            for it but no rows.
        causal: Whether the model's tokens attend to none behind themselves, for a 4-D mask that does not tell.

    Returns:
        (B, N + total), or (B, 1 or heads, Q', N + K) with Q' = N + Q if the prompt is inserted and Q else; of the
        mask's dtype.
    """
    if mask.dim() == 2:
        return insert_prefix(layout.prompt_mask(mask.device), mask, layout)
    mask = mask.expand(layout.batch, *mask.shape[1:])
    if inserting and mask.shape[2] == 1:  # encoders may give one row for all tokens; now the prompt's rows differ
        mask = mask.expand(-1, -1, layout.length, -1)
    seen = to_bool_mask(mask)
    rows, columns = mask.shape[2:]
    valid = layout.prompt_mask(mask.device)
    # `sources` takes at least L tokens, and a mask may have fewer columns.
    sources = layout.sources(max(columns, layout.length), mask.device)[:, : layout.count + columns]
    before = valid[:, None, None, :].expand(-1, mask.shape[1], rows, -1)
    flat = torch.cat([before, seen], dim=3)
    if inserting:
        count = layout.count
        own = torch.ones(count, count, dtype=torch.bool, device=mask.device)
        real, ahead = _first_token_row(seen, layout, causal)
        own = torch.where(ahead, own, own.tril()) & valid[:, None, None, :]
        top = torch.cat([own.expand(-1, mask.shape[1], -1, -1), real.expand(-1, -1, count, -1)], dim=3)
        flat = torch.cat([top, flat], dim=2)
    out = gather_along(flat, sources, 3)
    if inserting:
        out = gather_along(out, layout.sources(rows, mask.device), 2)
        if window is not None:
            # The mask was made for the text alone. The virtual tokens count in the window, too.
            place = torch.arange(out.shape[3], device=mask.device)
            out = out & (place[: out.shape[2], None] - place[None, :] < window)
    if mask.is_floating_point():
        # A float mask may hold biases, so its values are moved like the bools and not rebuilt from them.
        base = torch.cat([mask.new_zeros(*mask.shape[:3], layout.count), mask], dim=3)
        if inserting:
            base = torch.cat([mask.new_zeros(*mask.shape[:2], layout.count, base.shape[3]), base], dim=2)
        base = gather_along(base, sources, 3)
        base = gather_along(base, layout.sources(rows, mask.device), 2) if inserting else base
        return torch.where(out, base, torch.finfo(mask.dtype).min)
    return out.to(mask.dtype)


def _first_token_row(seen: torch.Tensor, layout: PromptLayout, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what each sample's first real token attends to behind itself, and whether tokens of this mask do so.

    In a prefix mask, whose first tokens attend to each other, the prompt belongs to that prefix. It must not attend to
    the text behind the prefix, which is to be predicted, so it takes the first token's row and not all columns. A
    sample of one token does not tell whether a mask is causal. Then the other samples decide, and if all are as short,
    the model.

    Args:
        seen: bool (B, heads, L, K).
        layout: The layout.
        causal: Whether the model is causal.

    Returns:
        bool (B, heads, 1, K), all false for a causal mask; and one bool for the batch.
    """
    first = first_real(seen)
    index = first[:, None, None, None]
    row = seen.gather(2, index.expand(-1, seen.shape[1], 1, seen.shape[3]))
    behind = torch.arange(seen.shape[3], device=seen.device) > index
    several = (seen.any(dim=2, keepdim=True) & behind).any()
    ahead = (row & behind).any() | (~several & (not causal))
    return row & ahead, ahead

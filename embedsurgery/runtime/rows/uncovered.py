"""Lets a site use its own weight while ``overlays.py`` covers it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from embedsurgery.runtime.calls import frame_at
from embedsurgery.runtime.rows.overlays import LazyOverlay
from embedsurgery.runtime.rows.sliced_head import remove_sliced_weight


class UncoveredSite:
    """Pre-hook and post-hook of a site: while the site runs, its weight is not covered.

    Args:
        parameter: Name of the weight.
        overlay: The overlay that covers it.
    """

    def __init__(self, parameter: str, overlay: LazyOverlay) -> None:
        self.parameter = parameter
        self.overlay = overlay
        self.before: Any = None

    def enter(self, module: nn.Module, *_: Any) -> None:
        """Pre-hook."""
        remove_sliced_weight(module, self.parameter)
        if torch.compiler.is_compiling():
            self.before = module.__dict__.pop(self.parameter, None)
            return
        with self.overlay.lock:
            self.overlay.running_sites.begin(frame_at(2))
            shared = self.overlay.is_shared()
            self.before = None if shared else module.__dict__.pop(self.parameter, None)

    def leave(self, module: nn.Module, *_: Any) -> None:
        """Post-hook."""
        if not torch.compiler.is_compiling():
            with self.overlay.lock:
                self.overlay.running_sites.end(frame_at())
                self._restore(module)
            return
        self._restore(module)

    def _restore(self, module: nn.Module) -> None:
        if self.before is not None:
            module.__dict__[self.parameter] = self.before
            self.before = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "before": None}

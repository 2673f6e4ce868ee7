"""Sites that see the bare weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from embedsurgery.runtime.calls import frame_at
from embedsurgery.runtime.rows.overlays import StandIns
from embedsurgery.runtime.rows.sliced_head import uncover


class Uncovered:
    """Pre and post hooks of a site: while it runs it has its own weight, whatever stands in for that.

    Args:
        parameter: Name of the weight.
        overlay: What lays stand-ins over it.
    """

    def __init__(self, parameter: str, overlay: StandIns) -> None:
        self.parameter = parameter
        self.overlay = overlay
        self.before: Any = None

    def enter(self, module: nn.Module, *_: Any) -> None:
        """Pre-hook."""
        uncover(module, self.parameter)
        if torch.compiler.is_compiling():
            self.before = module.__dict__.pop(self.parameter, None)
            return
        with self.overlay.lock:
            self.overlay.bare.begin(frame_at(2))
            shared = self.overlay.is_shared()
            self.before = None if shared else module.__dict__.pop(self.parameter, None)

    def leave(self, module: nn.Module, *_: Any) -> None:
        """Post-hook."""
        if not torch.compiler.is_compiling():
            with self.overlay.lock:
                self.overlay.bare.end(frame_at())
                self._cover(module)
            return
        self._cover(module)

    def _cover(self, module: nn.Module) -> None:
        if self.before is not None:
            module.__dict__[self.parameter] = self.before
            self.before = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "before": None}

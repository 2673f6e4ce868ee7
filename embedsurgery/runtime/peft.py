"""PEFT's adapters on the same model: while PEFT disables its adapters, the rows are disabled too.

``with peft_model.disable_adapter():`` means the base, and TRL's trainers use it for their reference model. TRL's other
reference, a copy of the LoRA, has no rows of its own, so it is refused.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from embedsurgery.errors import UnsupportedError
from embedsurgery.runtime.calls import frame_at, frames_from, package_of
from embedsurgery.runtime.rows.rows import Rows

_REFERENCE = ["ref"]
"""PEFT's active adapters while TRL runs the copy of a LoRA that is its reference."""


class PeftSwitch:
    """Pre-hook of a model and its sites, before all others: copies PEFT's switch.

    Args:
        model: The attached model.
        live_rows: Returns the live rows, each with a name for messages.
        on_change: Called after ``off`` has changed.

    Attributes:
        off: Whether PEFT's adapters on the model were disabled when the hook last ran.
    """

    def __init__(
        self, model: nn.Module, live_rows: Callable[[], list[tuple[str, Rows]]], on_change: Callable[[], None]
    ) -> None:
        self.model = (model,)
        self.live_rows = live_rows
        self.on_change = on_change
        self.off = False
        self._reset()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("layer", "searched_at", "name")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def _reset(self) -> None:
        """Start without a known layer, and under a new name: a copy of the model has a switch of its own."""
        self.layer: weakref.ref[Any] | None = None
        self.searched_at = -1
        # Dynamo calls a function that is marked constant with constants only, so traced code passes this name.
        self.name = uuid.uuid4().hex
        _SWITCHES[self.name] = self

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.update()
        elif _needs_update(self.name):
            torch.compiler.disable(self.update)()  # type: ignore[no-untyped-call]

    def update(self) -> None:
        """Copy PEFT's switch.

        Raises:
            UnsupportedError: TRL runs a copy of the LoRA as its reference, while rows train.
        """
        layer = self._find_layer()
        if layer is None and not self.off:
            return
        off = layer is not None and bool(layer._disable_adapters)
        if off != self.off:
            self.off = off
            self.on_change()
        if layer is None or off or list(getattr(layer, "active_adapters", ())) != _REFERENCE:
            return
        trained = [name for name, rows in self.live_rows() if rows.values.requires_grad]
        if trained and _is_called_by("trl"):
            raise UnsupportedError(
                "TRL uses a copy of the LoRA as its reference model, in which the rows that train would be live",
                where="PEFT's adapter 'ref'",
                found=", ".join(trained),
                hint="give the trainer ref_model=copy.deepcopy(model), or a model without LoRA and "
                "peft_config=, so that the base is the reference",
            )

    def _find_layer(self) -> Any:
        """Return one of PEFT's layers, or None. PEFT switches all of them together."""
        layer = None if self.layer is None else self.layer()
        is_gone = layer is None and self.layer is not None
        if is_gone or self.searched_at != _LayerCounter.count:
            self.searched_at = _LayerCounter.count
            layer = next(filter(_is_layer, self.model[0].modules()), None)
            self.layer = None if layer is None else weakref.ref(layer)
        return layer


_SWITCHES: weakref.WeakValueDictionary[str, PeftSwitch] = weakref.WeakValueDictionary()


def _needs_update(name: str) -> bool:
    """Whether a switch differs from PEFT's. Runs while a forward is traced; its result is a constant of the graph."""
    switch = _SWITCHES[name]
    layer = switch._find_layer()
    off = layer is not None and bool(layer._disable_adapters)
    return off != switch.off and (switch.off or bool(switch.live_rows()))


_needs_update._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in rows/sharded.py


def _is_layer(module: nn.Module | None) -> bool:
    return hasattr(type(module), "enable_adapters") and hasattr(module, "_disable_adapters")


class _LayerCounter:
    """Counts the registrations of PEFT's layers in any module: searching the model in each forward would cost more."""

    count = 0

    def __call__(self, module: nn.Module, name: str, child: nn.Module | None) -> None:
        if _is_layer(child):
            _LayerCounter.count += 1


register_module_module_registration_hook(_LayerCounter())


def _is_called_by(package: str) -> bool:
    return any(package_of(frame) == package for frame in frames_from(frame_at()))

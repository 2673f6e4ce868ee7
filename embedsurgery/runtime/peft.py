"""PEFT's adapters on the same model: where they are switched off, so are the rows.

``with peft_model.disable_adapter():`` asks for the base, and so do TRL's trainers by it for their reference. A copy of
the LoRA, which they take for one too, has no rows of its own, and is refused.
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
"""What TRL calls the copy of a LoRA that it takes for its reference."""


class Switch:
    """Pre-hook of a model and its sites, before all others: follows PEFT's switch.

    Args:
        model: The attached model.
        rows: Gives the live rows, with a name for messages.
        turned: Is called when ``off`` has changed.

    Attributes:
        off: Whether PEFT's adapters on the model were off when it last ran.
    """

    def __init__(
        self, model: nn.Module, rows: Callable[[], list[tuple[str, Rows]]], turned: Callable[[], None]
    ) -> None:
        self.model = (model,)
        self.rows = rows
        self.turned = turned
        self.off = False
        self._begin()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("layer", "searched_at", "name")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def _begin(self) -> None:
        """Have found no layer, and be found by what is traced: a copy is another one."""
        self.layer: weakref.ref[Any] | None = None
        self.searched_at = -1
        self.name = uuid.uuid4().hex
        _SWITCHES[self.name] = self

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.turn()
        elif _is_to_turn(self.name):
            torch.compiler.disable(self.turn)()  # type: ignore[no-untyped-call]

    def turn(self) -> None:
        """Follow the switch.

        Raises:
            UnsupportedError: TRL runs a copy of the LoRA as its reference, with rows that train.
        """
        layer = self._found()
        if layer is None and not self.off:
            return
        off = layer is not None and bool(layer._disable_adapters)
        if off != self.off:
            self.off = off
            self.turned()
        if layer is None or off or list(getattr(layer, "active_adapters", ())) != _REFERENCE:
            return
        trained = [name for name, rows in self.rows() if rows.values.requires_grad]
        if trained and _is_run_by("trl"):
            raise UnsupportedError(
                "TRL takes a copy of the LoRA for its reference, and the rows that train would be live in it",
                where="PEFT's adapter 'ref'",
                found=", ".join(trained),
                hint="give the trainer ref_model=copy.deepcopy(model), or a model without LoRA and "
                "peft_config=, for which the base is the reference",
            )

    def _found(self) -> Any:
        """A layer of PEFT's, of which all are switched together."""
        layer = None if self.layer is None else self.layer()
        gone = layer is None and self.layer is not None
        if gone or self.searched_at != _Registered.layers:
            self.searched_at = _Registered.layers
            layer = next(filter(_is_layer, self.model[0].modules()), None)
            self.layer = None if layer is None else weakref.ref(layer)
        return layer


_SWITCHES: weakref.WeakValueDictionary[str, Switch] = weakref.WeakValueDictionary()


def _is_to_turn(name: str) -> bool:
    """Whether a switch is not as PEFT's: asked while a forward is traced, and a constant in what comes out."""
    switch = _SWITCHES[name]
    layer = switch._found()
    off = layer is not None and bool(layer._disable_adapters)
    return off != switch.off and (switch.off or bool(switch.rows()))


_is_to_turn._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in sharded.py


def _is_layer(module: nn.Module | None) -> bool:
    return hasattr(type(module), "enable_adapters") and hasattr(module, "_disable_adapters")


class _Registered:
    """Counts PEFT's layers that have become a part of any module: to search a model in each forward would cost more."""

    layers = 0

    def __call__(self, module: nn.Module, name: str, part: nn.Module | None) -> None:
        if _is_layer(part):
            _Registered.layers += 1


register_module_module_registration_hook(_Registered())


def _is_run_by(package: str) -> bool:
    return any(package_of(frame) == package for frame in frames_from(frame_at()))

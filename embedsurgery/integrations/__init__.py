"""Save and restore attached rows in other libraries' training loops. Each name loads its library on first use.

``trainer.py`` has `EmbedSurgeryCallback` for transformers' Trainer and TRL's, ``lightning.py`` has `LightningCallback`,
and ``accelerate.py`` has `keep_rows` for Accelerate's save_state and load_state. ``saved_rows.py`` is their directory
of rows inside a checkpoint.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedsurgery.integrations.accelerate import keep_rows
    from embedsurgery.integrations.lightning import LightningCallback
    from embedsurgery.integrations.trainer import EmbedSurgeryCallback

_PUBLIC = {"EmbedSurgeryCallback": "trainer", "LightningCallback": "lightning", "keep_rows": "accelerate"}

__all__ = ["EmbedSurgeryCallback", "LightningCallback", "keep_rows"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'embedsurgery.integrations' has no attribute {name!r}")
    value = getattr(import_module(f"embedsurgery.integrations.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

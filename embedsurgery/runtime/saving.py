"""Says that the checkpoint which is being written holds no rows: a state dict is always the base's."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from types import FrameType

from embedsurgery.errors import EmbedSurgeryWarning

_WRITERS = frozenset({"save_pretrained"})
"""Functions that ask for a state dict to write a checkpoint of the model; others may want it for anything."""


def say_that_no_rows_are_saved(names: Sequence[str]) -> None:
    """Warn, at the line that saves the model, where a checkpoint is what the state dict is asked for.

    Args:
        names: The adapters that are live.
    """
    frame: FrameType | None = sys._getframe()
    for _ in range(5):  # this, the hook, and torch's own
        frame = frame.f_back if frame is not None else None
        if frame is not None and frame.f_code.co_name in _WRITERS:
            break
    else:
        return
    writer = frame.f_code
    while frame.f_back is not None and frame.f_code is writer:
        frame = frame.f_back
    warnings.warn_explicit(
        f"the checkpoint that is saved here is the base's, without the rows of {', '.join(names)}: attachment.merge() "
        "first puts them in, attachment.save(directory) writes them by themselves; with the Trainer "
        "embedsurgery.integrations.EmbedSurgeryCallback() does",
        EmbedSurgeryWarning, frame.f_code.co_filename, frame.f_lineno,
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )  # fmt: skip

"""Looks at what asks for a state dict, which is always the base's: a checkpoint that is written so holds no rows."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from types import FrameType

from embedsurgery.errors import EmbedSurgeryWarning, UnsupportedError

_WRITERS = frozenset({"save_pretrained", "get_state_dict"})
"""Functions that ask for a state dict to write a checkpoint of the model (the second is Accelerate's); others may want
it for anything."""

_RESUMABLE = "save_state"
"""Accelerate's, of whose checkpoints a resume without the rows is seen."""

_HASHES = ("trl", "hash_module")
"""The package and its function that takes a hash of a state dict."""


def refuse_to_be_hashed(names: Sequence[str]) -> None:
    """Refuse what takes a hash of the state dict for one of the model: other rows would be the same model to it.

    Args:
        names: The adapters that are live.

    Raises:
        UnsupportedError: TRL does so, to find log-probabilities that it computed before.
    """
    frame: FrameType | None = sys._getframe()
    for _ in range(6):
        frame = frame.f_back if frame is not None else None
        if frame is None:
            return
        if (str(frame.f_globals.get("__name__")).partition(".")[0], frame.f_code.co_name) == _HASHES:
            raise UnsupportedError("TRL finds the reference log-probabilities of a model by a hash of its state dict, "
                                   "which holds no rows, and would take those of other rows for these",
                                   where="precompute_ref_log_probs", found=f"live rows of {', '.join(names)}",
                                   hint="leave precompute_ref_log_probs False, or merge the rows of a reference model "
                                   "into it")  # fmt: skip


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
    above = frame.f_back
    if above is not None and above.f_code.co_name == _RESUMABLE:
        return
    while frame.f_back is not None and frame.f_code is writer:
        frame = frame.f_back
    warnings.warn_explicit(
        f"the checkpoint that is saved here is the base's, without the rows of {', '.join(names)}: attachment.merge() "
        "first puts them in, attachment.save(directory) writes them by themselves; in embedsurgery.integrations "
        "EmbedSurgeryCallback() does so in each checkpoint of a Trainer, and keep_rows(accelerator) in save_state()",
        EmbedSurgeryWarning, frame.f_code.co_filename, frame.f_lineno,
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )  # fmt: skip

"""Looks at what asks for a state dict, which is always the base's: a checkpoint that is written so holds no rows."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import islice

from embedsurgery.errors import EmbedSurgeryWarning, UnsupportedError
from embedsurgery.runtime.calls import frame_at, frames_from, package_of

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
    for frame in islice(frames_from(frame_at(1)), 6):
        if (package_of(frame), frame.f_code.co_name) == _HASHES:
            raise UnsupportedError(
                "TRL finds the reference log-probabilities of a model by a hash of its state dict, "
                "which holds no rows, and would take those of other rows for these",
                where="precompute_ref_log_probs",
                found=f"live rows of {', '.join(names)}",
                hint="leave precompute_ref_log_probs False, or merge the rows of a reference model into it",
            )


def say_that_no_rows_are_saved(names: Sequence[str]) -> None:
    """Warn, at the line that saves the model, where a checkpoint is what the state dict is asked for.

    Args:
        names: The adapters that are live.
    """
    stack = list(frames_from(frame_at(1)))
    near = (n for n, frame in enumerate(stack[:5]) if frame.f_code.co_name in _WRITERS)  # the hook, and torch's own
    number = next(near, None)
    if number is None:
        return
    writer, *above = stack[number:]
    if above and above[0].f_code.co_name == _RESUMABLE:
        return
    frame = next((one for one in above if one.f_code is not writer.f_code), stack[-1])
    warnings.warn_explicit(
        f"the checkpoint that is saved here is the base's, without the rows of {', '.join(names)}: attachment.merge() "
        "first puts them in, attachment.save(directory) writes them by themselves; in embedsurgery.integrations "
        "EmbedSurgeryCallback() does so in each checkpoint of a Trainer, and keep_rows(accelerator) in save_state()",
        EmbedSurgeryWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )

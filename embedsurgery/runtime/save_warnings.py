"""Checks which code makes a state dict: it holds the base only, so a checkpoint written from it has no rows."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import islice

from embedsurgery.errors import EmbedSurgeryWarning, UnsupportedError
from embedsurgery.runtime.calls import frame_at, frames_from, package_of

_WRITERS = frozenset({"save_pretrained", "get_state_dict"})
"""Functions that make a state dict to write a checkpoint of the model (the second is Accelerate's). Others may make one
for any purpose."""

_RESUMABLE_WRITER = "save_state"
"""Accelerate's function that writes a checkpoint to resume from. It needs no warning: a resume without the rows is
refused."""

_HASH_FUNCTION = ("trl", "hash_module")
"""(package, function) that hashes a state dict."""


def refuse_state_dict_hash(names: Sequence[str]) -> None:
    """Refuse a hash of the state dict as the identity of the model: models with different rows would share it.

    Args:
        names: The live adapters.

    Raises:
        UnsupportedError: TRL is looking up cached log-probabilities of a reference model by such a hash.
    """
    for frame in islice(frames_from(frame_at(1)), 6):
        if (package_of(frame), frame.f_code.co_name) == _HASH_FUNCTION:
            raise UnsupportedError(
                "TRL caches a model's reference log-probabilities by a hash of its state dict, which holds no rows, "
                "so it would reuse those of other rows",
                where="precompute_ref_log_probs",
                found=f"live rows of {', '.join(names)}",
                hint="leave precompute_ref_log_probs False, or merge the rows of a reference model into it",
            )


def warn_rows_not_saved(names: Sequence[str]) -> None:
    """Warn, at the line that saves the model, if a state dict is made to write a checkpoint.

    Args:
        names: The live adapters.
    """
    stack = list(frames_from(frame_at(1)))
    # The first frames are the attachment's hook and torch's state_dict().
    near = (n for n, frame in enumerate(stack[:5]) if frame.f_code.co_name in _WRITERS)
    number = next(near, None)
    if number is None:
        return
    writer, *above = stack[number:]
    if above and above[0].f_code.co_name == _RESUMABLE_WRITER:
        return
    frame = next((one for one in above if one.f_code is not writer.f_code), stack[-1])
    warnings.warn_explicit(
        f"this checkpoint holds the base only, without the rows of {', '.join(names)}: call attachment.merge() first "
        "to include them, or attachment.save(directory) to save them separately; embedsurgery.integrations has "
        "EmbedSurgeryCallback() for a Trainer's checkpoints, and keep_rows(accelerator) for save_state()",
        EmbedSurgeryWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )

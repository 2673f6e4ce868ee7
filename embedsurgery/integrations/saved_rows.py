"""Save an attachment's rows in a directory next to a checkpoint's state dict, and restore them from it.

``trainer.py`` and ``accelerate.py`` say which directory. ``lightning.py`` keeps the rows in its one file instead.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote, unquote

import torch

from embedsurgery.adapters.adapter import WEIGHTS_NAME
from embedsurgery.errors import AttachmentError
from embedsurgery.files.json_reading import read_json
from embedsurgery.loading import load
from embedsurgery.runtime.attachment import Attachment
from embedsurgery.runtime.rows.sharded import world_size

DIRECTORY = "embedsurgery"
"""In a checkpoint's directory, with a directory for each adapter. The Trainer and PEFT look for an adapter of their own
one level above."""

_ORDER = "order.json"


def save_rows(attachment: Attachment, folder: Path) -> None:
    """Write each adapter, active or not, to ``folder/NAME``, and the order of the adapters.

    Call it on every rank: sharded rows are gathered. Rank 0 writes.
    """
    for name in attachment.names:
        attachment.save(folder / quote(name, safe=""), name)
    if world_size() == 1 or torch.distributed.get_rank() == 0:
        (folder / _ORDER).write_text(json.dumps({"adapters": attachment.names}) + "\n", encoding="utf-8")


def restore_rows(attachment: Attachment, folder: Path) -> None:
    """Set each adapter's rows to those that `save_rows` wrote. Call it on every rank.

    Raises:
        AttachmentError: The directory has other adapters than those attached, other rows, or another order of adapters
            or rows. An optimizer's state belongs to positions, so the order matters.
        AdapterError: A file is missing or broken.
        CheckpointError: The file with the order is broken.
    """
    found = sorted(unquote(path.parent.name) for path in folder.glob(f"*/{WEIGHTS_NAME}"))
    if found != sorted(attachment.names):
        raise AttachmentError(
            "checkpoint and model have different adapters",
            where=folder,
            expected=", ".join(sorted(attachment.names)),
            found=", ".join(found) or "none",
            hint="attach the same adapters under the same names; without the integration no rows are saved",
        )
    if (folder / _ORDER).exists():
        names = read_json(folder / _ORDER).get("adapters")
        check_order(attachment, names if isinstance(names, list) else [], folder)
    for name in attachment.names:
        attachment.restore(load(folder / quote(name, safe="")), name, in_order=True)


def check_order(attachment: Attachment, names: Sequence[str], where: str | os.PathLike[str]) -> None:
    """Check that a checkpoint's adapters were attached in the same order.

    Raises:
        AttachmentError: The order differs.
    """
    if list(names) != list(attachment.names):
        raise AttachmentError(
            "the checkpoint's adapters were attached in another order",
            where=where,
            expected=", ".join(attachment.names),
            found=", ".join(map(str, names)) or "none",
            hint="optimizer state is stored by position: attach the adapters in the checkpoint's order",
        )

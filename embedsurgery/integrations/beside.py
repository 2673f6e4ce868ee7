"""The rows of an attachment in a directory beside a checkpoint's state dict, which is the base's and holds none."""

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
"""In a checkpoint's directory, with a directory for each adapter: one level below where the Trainer and PEFT look."""


_ORDER = "order.json"


def save_rows(attachment: Attachment, folder: Path) -> None:
    """Write each adapter, active or not, into ``folder/NAME``, and their order; every rank calls it, rank 0 writes."""
    for name in attachment.names:
        attachment.save(folder / quote(name, safe=""), name)
    if world_size() == 1 or torch.distributed.get_rank() == 0:
        (folder / _ORDER).write_text(json.dumps({"adapters": attachment.names}) + "\n", encoding="utf-8")


def restore_rows(attachment: Attachment, folder: Path) -> None:
    """Set each adapter's rows to those that `save_rows` wrote; every rank calls it.

    Raises:
        AttachmentError: There are other adapters than those attached, they are for other rows, or adapters or rows are
            in another order, by which an optimizer's state goes.
        AdapterError: A file is missing or broken.
        CheckpointError: What says their order is broken.
    """
    found = sorted(unquote(path.parent.name) for path in folder.glob(f"*/{WEIGHTS_NAME}"))
    if found != sorted(attachment.names):
        raise AttachmentError(
            "the checkpoint holds other adapters than are attached",
            where=folder,
            expected=", ".join(sorted(attachment.names)),
            found=", ".join(found) or "none",
            hint="attach the same adapters by the same names; one that was saved without the "
            "integration holds no rows at all",
        )
    if (folder / _ORDER).exists():
        names = read_json(folder / _ORDER).get("adapters")
        check_names(attachment, names if isinstance(names, list) else [], folder)
    for name in attachment.names:
        attachment.restore(load(folder / quote(name, safe="")), name, in_order=True)


def check_names(attachment: Attachment, names: Sequence[str], where: str | os.PathLike[str]) -> None:
    """Refuse the adapters of a checkpoint that were attached in another order.

    Raises:
        AttachmentError: They were.
    """
    if list(names) != list(attachment.names):
        raise AttachmentError(
            "the checkpoint's adapters were attached in another order",
            where=where,
            expected=", ".join(attachment.names),
            found=", ".join(map(str, names)) or "none",
            hint="an optimizer's state goes by position: attach them in that order",
        )

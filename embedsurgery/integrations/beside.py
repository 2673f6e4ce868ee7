"""The rows of an attachment in a directory beside a checkpoint's state dict, which is the base's and holds none."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote, unquote

from embedsurgery.adapter import WEIGHTS_NAME
from embedsurgery.errors import AttachmentError
from embedsurgery.reading import load
from embedsurgery.runtime.attach import Attachment

DIRECTORY = "embedsurgery"
"""In a checkpoint's directory, with a directory for each adapter: one level below where the Trainer and PEFT look."""


def save_rows(attachment: Attachment, folder: Path) -> None:
    """Write each adapter, active or not, into ``folder/NAME``; every rank calls it, and rank 0 writes."""
    for name in attachment.names:
        attachment.save(folder / quote(name, safe=""), name)


def restore_rows(attachment: Attachment, folder: Path) -> None:
    """Set each adapter's rows to those that `save_rows` wrote; every rank calls it.

    Raises:
        AttachmentError: There are other adapters than those attached, or they are for other rows.
        AdapterError: A file is missing or broken.
    """
    found = sorted(unquote(path.parent.name) for path in folder.glob(f"*/{WEIGHTS_NAME}"))
    if found != sorted(attachment.names):
        raise AttachmentError("the checkpoint holds other adapters than are attached", where=folder,
                              expected=", ".join(sorted(attachment.names)), found=", ".join(found) or "none",
                              hint="attach the same adapters by the same names; one that was saved without the "
                              "integration holds no rows at all")  # fmt: skip
    for name in attachment.names:
        attachment.restore(load(folder / quote(name, safe="")), name)

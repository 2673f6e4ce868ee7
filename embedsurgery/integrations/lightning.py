"""Lightning: the rows are saved inside each ``.ckpt`` file, and restored from it, whatever loads it with the Trainer.

A LightningModule's state dict is the base's, and holds no rows. What is put beside it are tensors and text, so that
``torch.load(..., weights_only=True)`` reads the file as before.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from embedsurgery.adapters.adapter import Adapter
from embedsurgery.errors import AttachmentError, EmbedSurgeryWarning
from embedsurgery.integrations.beside import check_names
from embedsurgery.loading import load
from embedsurgery.runtime.attachment import Attachment
from embedsurgery.runtime.calls import frame_at, of_library

KEY = "embedsurgery"
"""In a checkpoint: path of an attached model in the LightningModule -> adapter's name -> file name -> bytes, uint8."""

_NAMES = ("lightning.pytorch", "pytorch_lightning")
"""The library, and its older name."""


def _base() -> Any:
    """Lightning's Callback; without the library, which there is then nothing to give it to, no class of its own."""
    found = [name for name in _NAMES if find_spec(name.partition(".")[0]) is not None]
    return import_module(found[0]).Callback if found else object


class LightningCallback(_base()):  # type: ignore[misc]
    """Saves the adapters of every attached model of a LightningModule in each checkpoint, and restores them.

    The rows' Parameters stay the same objects, so the optimizer's state stays theirs. Attach, by the same names, before
    ``trainer.fit``, ``test`` or ``predict``.

    Training with it raises:
        AttachmentError: Nothing is attached; or a checkpoint that is loaded holds no rows, or those of other adapters,
            or its adapters or rows are in another order, by which an optimizer's state goes.
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Tells the attachments that their rows are cared for, and of checkpoints that will hold none."""
        for attachment in _attachments(pl_module).values():
            attachment.saved_beside = of_library(frame_at(1))
        if any(getattr(callback, "save_weights_only", False) for callback in trainer.checkpoint_callbacks):
            warnings.warn(
                "a checkpoint with save_weights_only=True holds no rows: Lightning asks no callback for it",
                EmbedSurgeryWarning,
                stacklevel=2,
            )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuses a module with nothing to train."""
        _some(pl_module)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Puts the rows in, on every rank: sharded ones are gathered."""
        checkpoint[KEY] = {
            path: {name: _files(attachment.adapter(name)) for name in attachment.names}
            for path, attachment in _attachments(pl_module).items()
        }

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Restores the rows, before the optimizer's state."""
        saved, attachments = checkpoint.get(KEY, {}), _some(pl_module)
        found = {path: sorted(adapters) for path, adapters in saved.items()}
        expected = {path: sorted(attachment.names) for path, attachment in attachments.items()}
        if found != expected:
            raise AttachmentError(
                "the checkpoint holds other adapters than are attached",
                expected=_text(expected),
                found=_text(found),
                hint="attach the same adapters by the same names; one that was "
                "saved without LightningCallback holds no rows at all",
            )
        for path, attachment in attachments.items():
            check_names(attachment, list(saved[path]), path or type(pl_module).__name__)
            for name in attachment.names:
                attachment.restore(_adapter(saved[path][name]), name, in_order=True)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Lets the attachments see by themselves again."""
        for attachment in _attachments(pl_module).values():
            attachment.saved_beside = False


def adapters(checkpoint: Mapping[str, Any], path: str | None = None) -> dict[str, Adapter]:
    """The adapters in a loaded checkpoint, by name, for ``embedsurgery.attach`` or ``merge`` without a Trainer.

    Args:
        checkpoint: What ``torch.load`` of the ``.ckpt`` file gives.
        path: Of the attached model in the LightningModule ("model"); may be left out where there is one.

    Raises:
        AttachmentError: The checkpoint holds none there.
    """
    saved = checkpoint.get(KEY, {})
    if path is None and len(saved) == 1:
        (path,) = saved
    if path not in saved:
        raise AttachmentError(
            "the checkpoint holds no rows there",
            where=path,
            found=", ".join(saved) or "none",
            hint="train with LightningCallback(), and name the attached model",
        )
    return {name: _adapter(files) for name, files in saved[path].items()}


def _attachments(pl_module: nn.Module) -> dict[str, Attachment]:
    """Path of each attached model -> its attachment."""
    found = {path: module for path, module in pl_module.named_modules() if isinstance(module, Attachment)}
    return {path.rpartition(".")[0]: attachment for path, attachment in found.items()}


def _some(pl_module: nn.Module) -> dict[str, Attachment]:
    found = _attachments(pl_module)
    if not found:
        raise AttachmentError(
            "nothing is attached to a model of the LightningModule",
            where=type(pl_module).__name__,
            hint="embedsurgery.attach(module.model, config) before trainer.fit()",
        )
    return found


def _files(adapter: Adapter) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        saved = adapter.save(Path(folder) / "adapter")
        return {
            path.name: torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
            for path in sorted(saved.iterdir())
        }


def _adapter(files: Mapping[str, torch.Tensor]) -> Adapter:
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (Path(folder) / Path(name).name).write_bytes(data.cpu().numpy().tobytes())
        return load(folder)


def _text(named: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{path or 'the module'}: {', '.join(names)}" for path, names in named.items()) or "none"

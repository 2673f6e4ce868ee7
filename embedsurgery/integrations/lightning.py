"""Lightning: save attached rows inside each ``.ckpt`` file, and restore them whenever the Trainer loads one.

A LightningModule's state dict holds the base's tensors and no rows. The adapters' files are stored under a key of their
own as uint8 tensors, so that ``torch.load(..., weights_only=True)`` still reads the checkpoint. ``saved_rows.py`` does
the same for libraries whose checkpoint is a directory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from embedsurgery.adapters.adapter import Adapter
from embedsurgery.errors import AttachmentError, warn
from embedsurgery.integrations.saved_rows import check_order
from embedsurgery.loading import load
from embedsurgery.runtime.attachment import Attachment
from embedsurgery.runtime.calls import frame_at, library_entry

KEY = "embedsurgery"
"""In a checkpoint: path of an attached model in the LightningModule -> adapter's name -> file name -> uint8 (N,)."""

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")
"""The library, and its older name."""


def _callback_class() -> Any:
    """Return Lightning's Callback class, or ``object`` without Lightning, which `adapters` does not need."""
    found = [name for name in _PACKAGES if find_spec(name.partition(".")[0]) is not None]
    return import_module(found[0]).Callback if found else object


class LightningCallback(_callback_class()):  # type: ignore[misc]
    """Save the adapters of every attached model of a LightningModule in each checkpoint, and restore them.

    Restoring keeps the rows' Parameter objects, so the optimizer's state still belongs to them. Attach the same
    adapters under the same names before ``trainer.fit``, ``test`` or ``predict``.

    Training with it raises:
        AttachmentError: Nothing is attached; or the loaded checkpoint has no rows, rows of other adapters, or another
            order of adapters or rows. An optimizer's state belongs to positions, so the order matters.
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Tell the attachments that their rows are saved; warn of checkpoints that will have none."""
        for attachment in _attachments(pl_module).values():
            # True only while Lightning's frame runs: an interrupted training may never reach teardown
            attachment.saved_beside = library_entry(frame_at(1))
        if any(getattr(callback, "save_weights_only", False) for callback in trainer.checkpoint_callbacks):
            warn("a checkpoint with save_weights_only=True has no rows: Lightning calls no callback for it")

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that a model of the module has an attachment."""
        _require_attachments(pl_module)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the rows to the checkpoint. Runs on every rank: sharded rows are gathered."""
        checkpoint[KEY] = {
            path: {name: _to_tensors(attachment.adapter(name)) for name in attachment.names}
            for path, attachment in _attachments(pl_module).items()
        }

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Restore the rows. Lightning calls this before it restores the optimizer's state."""
        saved, attachments = checkpoint.get(KEY, {}), _require_attachments(pl_module)
        found = {path: sorted(adapters) for path, adapters in saved.items()}
        expected = {path: sorted(attachment.names) for path, attachment in attachments.items()}
        if found != expected:
            raise AttachmentError(
                "checkpoint and module have different adapters",
                expected=_format_names(expected),
                found=_format_names(found),
                hint="attach the same adapters under the same names; without LightningCallback no rows are saved",
            )
        for path, attachment in attachments.items():
            check_order(attachment, list(saved[path]), path or type(pl_module).__name__)
            for name in attachment.names:
                attachment.restore(_from_tensors(saved[path][name]), name, in_order=True)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Tell the attachments that their rows are no longer saved."""
        for attachment in _attachments(pl_module).values():
            attachment.saved_beside = False


def adapters(checkpoint: Mapping[str, Any], path: str | None = None) -> dict[str, Adapter]:
    """Return the adapters in a loaded checkpoint by name, for ``embedsurgery.attach`` or ``merge`` without a Trainer.

    Args:
        checkpoint: The ``.ckpt`` file as ``torch.load`` returns it.
        path: Path of the attached model in the LightningModule ("model"); optional where there is only one.

    Raises:
        AttachmentError: The checkpoint has no adapters under this path.
    """
    saved = checkpoint.get(KEY, {})
    if path is None and len(saved) == 1:
        (path,) = saved
    if path not in saved:
        raise AttachmentError(
            "the checkpoint has no rows for this model",
            where=path,
            found=", ".join(saved) or "none",
            hint="train with LightningCallback(), and give the path of the attached model",
        )
    return {name: _from_tensors(files) for name, files in saved[path].items()}


def _attachments(pl_module: nn.Module) -> dict[str, Attachment]:
    """Return path of an attached model -> its attachment."""
    found = {path: module for path, module in pl_module.named_modules() if isinstance(module, Attachment)}
    return {path.rpartition(".")[0]: attachment for path, attachment in found.items()}


def _require_attachments(pl_module: nn.Module) -> dict[str, Attachment]:
    found = _attachments(pl_module)
    if not found:
        raise AttachmentError(
            "no model of the LightningModule has an attachment",
            where=type(pl_module).__name__,
            hint="embedsurgery.attach(module.model, config) before trainer.fit()",
        )
    return found


def _to_tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        saved = adapter.save(Path(folder) / "adapter")
        return {
            path.name: torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
            for path in sorted(saved.iterdir())
        }


def _from_tensors(files: Mapping[str, torch.Tensor]) -> Adapter:
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (Path(folder) / Path(name).name).write_bytes(data.cpu().numpy().tobytes())
        return load(folder)


def _format_names(named: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{path or 'the module'}: {', '.join(names)}" for path, names in named.items()) or "none"

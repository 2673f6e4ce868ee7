"""Accelerate: save and restore attached rows in ``save_state`` and ``load_state``.

Both handle state dicts, which hold the base's tensors and no rows. ``saved_rows.py`` reads and writes the rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from embedsurgery.errors import ConfigError
from embedsurgery.integrations.saved_rows import DIRECTORY, restore_rows, save_rows
from embedsurgery.runtime.attachment import find_attachment


def keep_rows(accelerator: Any) -> None:
    """Make an Accelerator's ``save_state`` and ``load_state`` save and restore the rows of attached models.

    The rows are saved in the state's directory, below ``embedsurgery`` (``embedsurgery_1`` for the second prepared
    model, and so on).

    Args:
        accelerator: An ``accelerate.Accelerator``. Call this once for it, in the run that saves and in the run that
            loads.

    Raises:
        ConfigError: The argument is not an Accelerator.

    ``load_state`` then raises what `embedsurgery.integrations.saved_rows.restore_rows` raises.
    """
    if not hasattr(accelerator, "register_save_state_pre_hook"):
        found = type(accelerator).__name__
        raise ConfigError("not an Accelerator", where="keep_rows", expected="accelerate.Accelerator", found=found)

    def save(models: list[Any], weights: list[Any], output_dir: str) -> None:
        for number, model in enumerate(models):
            attachment = find_attachment(model)
            if attachment is not None:
                save_rows(attachment, _rows_directory(output_dir, number))

    def load(models: list[Any], input_dir: str) -> None:
        # load_state passes its hooks no sharded models: it has loaded those before
        for number, model in enumerate(getattr(accelerator, "_models", models)):
            attachment = find_attachment(model)
            if attachment is not None:
                restore_rows(attachment, _rows_directory(input_dir, number))
                attachment.saved_beside = True

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _rows_directory(directory: str, number: int) -> Path:
    return Path(directory) / (DIRECTORY if number == 0 else f"{DIRECTORY}_{number}")

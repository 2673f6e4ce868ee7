"""Accelerate: ``save_state`` and ``load_state`` write and read state dicts, which hold no rows, unless told to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from embedsurgery.errors import ConfigError
from embedsurgery.integrations.beside import DIRECTORY, restore_rows, save_rows
from embedsurgery.runtime.attachment import find


def keep_rows(accelerator: Any) -> None:
    """Make an Accelerator's ``save_state`` and ``load_state`` save and restore the rows of attached models as well.

    The rows lie in the state's directory, below ``embedsurgery`` (``embedsurgery_1`` for the second model prepared,
    and so on).

    Args:
        accelerator: An ``accelerate.Accelerator``. Call this once for it, in the run that saves and in the one
            that loads.

    Raises:
        ConfigError: It is no Accelerator.

    Loading then raises what `embedsurgery.integrations.beside.restore_rows` raises.
    """
    if not hasattr(accelerator, "register_save_state_pre_hook"):
        raise ConfigError(
            "not an Accelerator", where="keep_rows", expected="accelerate.Accelerator", found=type(accelerator).__name__
        )

    def save(models: list[Any], weights: list[Any], output_dir: str) -> None:
        for number, model in enumerate(models):
            attachment = find(model)
            if attachment is not None:
                save_rows(attachment, _folder(output_dir, number))

    def load(models: list[Any], input_dir: str) -> None:
        # of models that are sharded load_state tells its hooks nothing: it has loaded them itself
        for number, model in enumerate(getattr(accelerator, "_models", models)):
            attachment = find(model)
            if attachment is not None:
                restore_rows(attachment, _folder(input_dir, number))
                attachment.saved_beside = True

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _folder(directory: str, number: int) -> Path:
    return Path(directory) / (DIRECTORY if number == 0 else f"{DIRECTORY}_{number}")

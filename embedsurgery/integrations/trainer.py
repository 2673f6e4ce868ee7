"""transformers' Trainer: save attached rows in each checkpoint; restore them on resume and with the best model.

A Trainer's checkpoint holds the base's state dict and the optimizer's state, and no rows. Without this callback a
resumed AdamW would continue with the moments of rows that are not restored. ``runtime/resume.py`` refuses the first
optimizer step then, and also where there are no moments (SGD without momentum, ``save_only_model=True``), because it
sees that the Trainer has loaded a checkpoint. ``saved_rows.py`` reads and writes the rows.
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from embedsurgery.errors import AttachmentError, CheckpointError, warn
from embedsurgery.files.json_reading import read_json
from embedsurgery.integrations.saved_rows import DIRECTORY, restore_rows, save_rows
from embedsurgery.runtime.attachment import Attachment, find_attachment
from embedsurgery.runtime.calls import frame_at, library_entry

_RUN = "run.json"
"""Beside the rows: run id and step that they belong to."""


class EmbedSurgeryCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Save every attached adapter in each checkpoint, as ``checkpoint-N/embedsurgery/NAME``, and restore it.

    Restoring keeps the rows' Parameter objects, so the optimizer's state still belongs to them. The Trainer does not
    tell its callbacks which checkpoint it resumes from. So the rows are searched in ``output_dir`` and next to the best
    checkpoint, and recognised by a run id that ``trainer_state.json`` records.

    Args:
        resume_from_checkpoint: The checkpoint that ``train`` resumes from, if it is in neither place.

    Training with it raises:
        AttachmentError: Nothing is attached, or the rows are merged; or the checkpoint's rows are not found, or belong
            to other adapters.
    """

    restores_rows = True
    """Read by ``runtime/resume.py`` when the Trainer loads a state dict: the rows follow."""

    def __init__(self, resume_from_checkpoint: str | None = None) -> None:
        self.resume_from_checkpoint = resume_from_checkpoint
        self.run = ""

    def state(self) -> dict[str, Any]:
        """Return what ``trainer_state.json`` records: the id of the run whose rows the checkpoint has."""
        return {"args": {"resume_from_checkpoint": None}, "attributes": {"run": self.run}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the rows if training resumes."""
        attachment = _require_attachment(kwargs["model"])
        if attachment.merged:
            raise AttachmentError(
                "merged rows cannot be trained", where="trainer.train()", hint="call attachment.unmerge() first"
            )
        # True only while the Trainer's frame runs: an interrupted training never reaches on_train_end
        attachment.saved_beside = library_entry(frame_at(1))
        if state.global_step > 0:
            restore_rows(attachment, self._find_rows(args, state))
        self.run = uuid.uuid4().hex
        if not any(parameter.requires_grad for parameter in attachment.parameters()):
            warn(
                "every row is frozen and will not be trained; call attachment.unfreeze() before the Trainer creates "
                "its optimizer"
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the rows in the checkpoint that the Trainer has written."""
        folder = self._find_written_checkpoint(args, state) / DIRECTORY
        save_rows(_require_attachment(kwargs["model"]), folder)
        if state.is_world_process_zero:  # written last: without this file the rows count as incomplete
            mark = {"run": self.run, "step": state.global_step}
            (folder / _RUN).write_text(json.dumps(mark) + "\n", encoding="utf-8")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the best rows. The Trainer has loaded the best checkpoint before."""
        attachment = _require_attachment(kwargs["model"])
        attachment.saved_beside = False
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            restore_rows(attachment, Path(state.best_model_checkpoint) / DIRECTORY)

    def _find_written_checkpoint(self, args: TrainingArguments, state: TrainerState) -> Path:
        """Find the checkpoint that the Trainer has written."""
        name = f"checkpoint-{state.global_step}"
        if state.is_hyper_param_search:  # in a directory for the trial, and callbacks are not given the trial's name
            for place in Path(args.output_dir).glob(f"*/{name}"):
                written = TrainerState.load_from_json(str(place / "trainer_state.json"))
                if self.run in self._run_ids(written):
                    return place
        return Path(args.output_dir) / name

    def _find_rows(self, args: TrainingArguments, state: TrainerState) -> Path:
        """Find the rows of the checkpoint whose state the Trainer has loaded.

        Raises:
            AttachmentError: The checkpoint was saved without rows, or they are in none of the known directories.
        """
        runs = self._run_ids(state)
        if not runs:
            raise AttachmentError(
                "the checkpoint has no rows",
                where=f"step {state.global_step}",
                found="a checkpoint saved without EmbedSurgeryCallback",
                hint="start again, or attach an adapter and train without resuming",
            )
        name = f"checkpoint-{state.global_step}"
        places = [
            Path(given)
            for given in (self.resume_from_checkpoint, args.resume_from_checkpoint)
            if isinstance(given, str)
        ]
        places.append(Path(args.output_dir) / name)
        if state.best_model_checkpoint is not None:
            places.append(Path(state.best_model_checkpoint).parent / name)
        for place in places:
            if any(_has_rows(place / DIRECTORY, run, state.global_step) for run in runs):
                return place / DIRECTORY
        raise AttachmentError(
            "the checkpoint's rows were not found",
            where=", ".join(dict.fromkeys(map(str, places))),
            expected=f"{DIRECTORY}/{_RUN} of run {' or '.join(sorted(runs))}, step {state.global_step}",
            hint="pass the directory that train() resumes from: EmbedSurgeryCallback(resume_from_checkpoint=...)",
        )

    def _run_ids(self, state: TrainerState) -> set[str]:
        """Return the ids of the runs that a checkpoint's state records; two if the Trainer has the callback twice."""
        saved = state.stateful_callbacks.get(type(self).__name__, [])
        return {entry["attributes"]["run"] for entry in (saved if isinstance(saved, list) else [saved])}


def _require_attachment(model: Any) -> Attachment:
    attachment = find_attachment(model)
    if attachment is None:
        raise AttachmentError(
            "the Trainer's model has no attachment",
            where=type(model).__name__,
            hint="embedsurgery.attach(model, config) before trainer.train()",
        )
    return attachment


def _has_rows(folder: Path, run: str, step: int) -> bool:
    """Whether a directory has the complete rows of a run's step."""
    try:
        return read_json(folder / _RUN) == {"run": run, "step": step}
    except CheckpointError:
        return False
